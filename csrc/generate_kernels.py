"""The CUDA kernels of this library: the one list that the build, C++, tools and tests read.

    python csrc/generate_kernels.py         # print the kernels' names
    python csrc/generate_kernels.py OUT     # write their sources into OUT/generated

That folder then holds NAME.cu, a translation unit for each kernel; BACKEND_KIND.inc, the table that
C++ makes of the list; embedded_kernels.S, which gives NAME_fatbin the bytes of OUT/NAME.fatbin; and
kernels.cmake, the names and their flags for nvcc. Files that would not change are left alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# What values of an axis are called in C++; numbers are called by themselves.
CPP = {
    "fp16": "Dtype::kFloat16",
    "bf16": "Dtype::kBFloat16",
    "fp32": "Dtype::kFloat32",
    "e4m3": "Dtype::kFloat8E4M3",
    "unmasked": "ScoreClass::kUnmasked",
    "masked": "ScoreClass::kMasked",
    "modified": "ScoreClass::kModified",
}

DTYPES = ("fp16", "bf16")
ALL_DTYPES = (*DTYPES, "fp32")


@dataclass(frozen=True)
class Architecture:
    name: str  # of compute_NAME and sm_NAME
    label: str  # in the names of kernels


# PTX is embedded beside the machine code: for newer devices, and for the emulated GPU.
ARCHITECTURES = {
    "sm80": Architecture("80", "sm80"),
    "hopper": Architecture("90a", "sm90"),  # whose PTX is for compute capability 9.0 alone
}


@dataclass(frozen=True)
class Kind:
    """Kernels that differ in their config alone: for each dtype one for each of ``configs``."""

    backend: str  # a key of ARCHITECTURES, a namespace and a folder of the sources
    name: str
    config: str  # the C++ type whose members are a dtype and the values of one of ``configs``
    parameters: tuple[str, ...]  # C++ types of the entry's parameters
    entry: str  # the device function, a template of the config
    # Head dims of q and k, of v, ..., as in the tile table; or nothing. A number after these is one
    # of keys.
    configs: tuple[tuple, ...] = ((),)
    dtypes: tuple[str, ...] = DTYPES
    # Of fused operators: a namespace, a folder of csrc/, and the header that has the entry.
    operator: str = ""
    file: str = ""  # of the entry, if it is not that of ``name``
    clusters: bool = False  # the config has cluster(), CTAs of a cluster

    @property
    def header(self) -> str:
        if self.operator:
            return f"{self.operator}/{self.backend}/{self.operator}.h"
        return f"{self.backend}/{self.file or self.name}.h"

    @property
    def namespace(self) -> str:
        names = ("flash", self.operator, self.backend)
        return "::".join(name for name in names if name)

    def kernels(self) -> list[Kernel]:
        """Return them in the order of ``configs``, for one dtype after the other."""
        return [Kernel(self, (dtype, *config)) for dtype in self.dtypes for config in self.configs]


@dataclass(frozen=True)
class Kernel:
    kind: Kind
    values: tuple

    @property
    def name(self) -> str:
        """flash_KIND_ARCHITECTURE_DTYPE, head dims if any and what follows: d128, d192x128."""
        dtype, *rest = self.values
        if rest:
            head_dim, head_dim_v, *rest = rest
            dims = f"d{head_dim}" if head_dim == head_dim_v else f"d{head_dim}x{head_dim_v}"
            rest = [dims, *(f"n{value}" if isinstance(value, int) else value for value in rest)]
        architecture = ARCHITECTURES[self.kind.backend].label
        return "_".join(["flash", self.kind.name, architecture, dtype, *rest])

    @property
    def config(self) -> str:
        members = ", ".join(CPP.get(value, str(value)) for value in self.values)
        return f"{self.kind.config}{{{members}}}"

    def source(self) -> str:
        kind = self.kind
        names = [f"argument{i}" for i in range(len(kind.parameters))]
        parameters = ",\n    ".join(
            f"const __grid_constant__ {type_} {name}" for type_, name in zip(kind.parameters, names)
        )
        bounds = "__launch_bounds__(kConfig.threads(), kConfig.ctas_per_sm())"
        if kind.clusters:
            bounds += " __cluster_dims__(kConfig.cluster(), 1, 1)"
        return f"""// Made by generate_kernels.py.
#include "{kind.header}"

namespace {kind.namespace} {{

inline constexpr {self.config.replace(kind.config, kind.config + " kConfig", 1)};

extern "C" __global__ void {bounds} {self.name}(
    {parameters}) {{
  {kind.entry}<kConfig>({", ".join(names)});
}}

}}  // namespace {kind.namespace}
"""


KINDS = [
    Kind(
        backend="sm80",
        name="fwd",
        config="FwdConfig",
        configs=(
            (32, 32, "masked"),
            (64, 64, "unmasked"),
            (64, 64, "masked"),
            (96, 96, "masked"),
            (128, 128, "masked"),
            (192, 128, "masked"),
            (192, 192, "masked"),
            (256, 256, "masked"),
            (32, 32, "modified"),
            (64, 64, "modified"),
            (96, 96, "modified"),
            (128, 128, "modified"),
            (192, 192, "modified"),
            (256, 256, "modified"),
        ),
        parameters=("FwdParams", "FwdLaunch"),
        entry="mha_fwd",
    ),
    Kind(
        backend="hopper",
        name="fwd",
        config="FwdConfig",
        configs=(
            (64, 64, "masked"),
            (96, 96, "masked"),
            (128, 128, "unmasked"),
            (128, 128, "masked"),
            (192, 128, "unmasked"),
            (192, 128, "masked"),
            (192, 192, "masked"),
            (256, 256, "unmasked"),
            (256, 256, "masked"),
            (64, 64, "modified"),
            (96, 96, "modified"),
            (128, 128, "modified"),
            (192, 192, "modified"),
            (256, 256, "modified"),
        ),
        parameters=("FwdParams", "FwdLaunch"),
        entry="mha_fwd",
        file="fwd_kernel",
        clusters=True,
    ),
    Kind(
        backend="hopper",
        name="fwd",
        config="FwdConfig",
        configs=(
            (64, 64, "masked"),
            (128, 128, "masked"),
            (192, 128, "masked"),
            (256, 256, "masked"),
            (64, 64, "modified"),
            (128, 128, "modified"),
            (256, 256, "modified"),
        ),
        parameters=("FwdParams", "FwdLaunch"),
        entry="mha_fwd",
        dtypes=("e4m3",),
        file="fwd_kernel",
        clusters=True,
    ),
    Kind(
        backend="hopper",
        name="decode",
        config="DecodeConfig",
        configs=((64, 64), (128, 128), (256, 256), (576, 512)),
        parameters=("FwdParams", "DecodeLaunch"),
        entry="mha_decode",
    ),
    Kind(
        backend="sm80",
        name="bwd",
        config="BwdConfig",
        configs=(
            (32, 32, "masked", 128),
            (64, 64, "masked", 128),
            (96, 96, "masked", 64),
            (128, 128, "masked", 128),
            (128, 128, "masked", 64),
            (192, 192, "masked", 64),
            (256, 256, "masked", 64),
            (256, 256, "masked", 32),
            (64, 64, "modified", 128),
            (128, 128, "modified", 64),
            (256, 256, "modified", 32),
        ),
        parameters=("BwdParams", "BwdLaunch"),
        entry="mha_bwd",
    ),
    Kind(
        backend="hopper",
        name="bwd",
        config="BwdConfig",
        configs=tuple((d, d, "masked") for d in (64, 96, 128, 192, 256)),
        parameters=("BwdParams", "BwdLaunch"),
        entry="mha_bwd",
        file="bwd_kernel",
    ),
    Kind(
        backend="sm80",
        name="bias_gradient",
        config="BwdConfig",
        configs=((128, 128, "modified", 64), (256, 256, "modified", 32)),
        parameters=("BwdParams", "BwdLaunch"),
        entry="bias_gradient",
    ),
    Kind(
        backend="sm80",
        name="bwd_prepare",
        config="RowConfig",
        parameters=("BwdParams", "BwdPrepareLaunch"),
        entry="prepare",
    ),
    Kind(
        backend="hopper",
        name="bwd_prepare",
        config="RowConfig",
        parameters=("BwdParams", "BwdPrepareLaunch"),
        entry="prepare",
    ),
    Kind(
        backend="sm80",
        name="sink_gradient",
        config="RowConfig",
        parameters=("BwdParams", "BwdPrepareLaunch"),
        entry="sink_gradient",
        dtypes=("fp32",),
    ),
    Kind(
        backend="sm80",
        name="append",
        config="RowConfig",
        parameters=("FwdParams", "AppendLaunch"),
        entry="append",
    ),
    Kind(
        backend="sm80",
        name="combine",
        config="RowConfig",
        parameters=("Combine_params",),
        entry="combine",
        dtypes=("fp32",),
    ),
    Kind(
        backend="sm80",
        name="dmask",
        config="RowConfig",
        parameters=("DmaskParams", "DmaskLaunch"),
        entry="dmask",
    ),
    Kind(
        backend="sm80",
        name="decode",
        config="DecodeConfig",
        configs=((64, 64), (128, 128), (256, 256)),
        parameters=("FwdParams", "DecodeLaunch"),
        entry="mha_decode",
    ),
    Kind(
        backend="sm80",
        name="decode_wide",
        config="DecodeConfig",
        configs=((576, 512),),
        parameters=("FwdParams", "DecodeLaunch"),
        entry="mha_decode_wide",
    ),
    *(
        Kind(
            backend="sm80",
            operator="activations",
            name=name,
            config="RowConfig",
            parameters=("Params", "Launch"),
            entry=name,
            dtypes=ALL_DTYPES,
        )
        for name in ("activation_fwd", "activation_bwd")
    ),
    Kind(
        backend="sm80",
        operator="activations",
        name="activation_dbias",
        config="RowConfig",
        parameters=("Params", "Launch"),
        entry="activation_dbias",
        dtypes=("fp32",),
    ),
    Kind(
        backend="sm80",
        operator="rotary",
        name="rotary",
        config="RowConfig",
        parameters=("Params", "Launch"),
        entry="rotary",
        dtypes=ALL_DTYPES,
    ),
    *(
        Kind(
            backend="sm80",
            operator="layer_norm",
            name=name,
            config="NormConfig",
            parameters=parameters,
            entry=name,
            dtypes=("fp32",),
        )
        for name, parameters in (
            ("layer_norm_fwd", ("FwdParams", "Launch")),
            ("layer_norm_bwd", ("BwdParams", "Launch", "Partials", "int")),
            ("layer_norm_sums", ("SumsLaunch",)),
        )
    ),
    *(
        Kind(
            backend="sm80",
            operator="xentropy",
            name=name,
            config="RowConfig",
            parameters=("Params", "Launch"),
            entry=name,
            dtypes=ALL_DTYPES,
        )
        for name in ("xentropy_fwd", "xentropy_bwd")
    ),
]

HEADER = "// Made by generate_kernels.py.\n"
KERNELS = [kernel for kind in KINDS for kernel in kind.kernels()]


def table(kind: Kind) -> str:
    lines = (f"FLASH_KERNEL({kernel.name}, {kernel.config})\n" for kernel in kind.kernels())
    return "".join(lines)


def embedding(fatbins: Path) -> str:
    """Return the assembler source: each fatbin under its kernel's name, hidden from others."""
    text = '  .section .nv_fatbin, "a"\n'
    for kernel in KERNELS:
        symbol = f"{kernel.name}_fatbin"
        text += f"  .global {symbol}\n  .hidden {symbol}\n  .balign 64\n{symbol}:\n"
        text += f'  .incbin "{fatbins / kernel.name}.fatbin"\n'
    return text + '  .section .note.GNU-stack, "", @progbits\n'


def cmake_list() -> str:
    text = f"set(FLASH_ATTN_KERNELS {' '.join(kernel.name for kernel in KERNELS)})\n"
    for kernel in KERNELS:
        architecture = ARCHITECTURES[kernel.kind.backend]
        text += f"set(FLASH_ATTN_FLAGS_OF_{kernel.name} -DARCH={architecture.name})\n"
    return text


def files(out: Path) -> dict[str, str]:
    """Return what is written into ``out / "generated"``, by file name."""
    sources = {f"{kernel.name}.cu": kernel.source() for kernel in KERNELS}
    tables: dict[str, str] = {}
    for kind in KINDS:
        name = f"{kind.backend}_{kind.name}.inc"
        tables[name] = tables.get(name, HEADER) + table(kind)
    return {
        **sources,
        **tables,
        "embedded_kernels.S": embedding(out),
        "kernels.cmake": cmake_list(),
    }


def write(out: Path) -> None:
    folder = out / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files(out).items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        write(Path(sys.argv[1]).resolve())
    else:
        print("\n".join(kernel.name for kernel in KERNELS))
