"""``python -m flash_attn``: what a bug report needs; with ``--kernels``, every kernel instead."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Optional

import torch

import flash_attn
from flash_attn import _library


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _mapped_openmp_libraries() -> list[str]:
    """Return the files of OpenMP runtimes that this process has mapped."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp")))


def _openmp() -> str:
    libraries = _mapped_openmp_libraries()
    text = ", ".join(libraries) or "none mapped, or not known on this system"
    if len({os.path.realpath(p) for p in libraries}) > 1:
        text += (
            "\n  More than one OpenMP runtime is loaded: torch brings its own and shares no threads"
            "\n  with flash_attn. Results are right, but calls in turns with torch's are slower."
        )
    return text


def _gpus() -> str:
    driver = Path("/proc/driver/nvidia/version")
    seen = driver.read_text().splitlines()[0] if driver.is_file() else "NVIDIA driver not seen"
    if not torch.cuda.is_available():
        return f"{seen}; torch.cuda is not available"
    devices = [
        f"\n  cuda:{i} {torch.cuda.get_device_name(i)}, "
        f"compute capability {'.'.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    ]
    return seen + "".join(devices)


def _emulator() -> str:
    path = _library.library_path().parent / "libgpu_emulator.so"
    text = str(path) if path.is_file() else "not built"
    whole_process = os.environ.get("FLASH_ATTENTION_EMULATOR")
    return text + (f" (FLASH_ATTENTION_EMULATOR={whole_process})" if whole_process else "")


def _instruction_sets() -> str:
    lib = _library.lib
    forced = os.environ.get("FLASH_ATTENTION_CPU_ISA")
    try:
        in_use = str(lib.cpu_isa())
    except RuntimeError as error:
        return f"{lib.cpu_isas()}; {error}"
    return f"{lib.cpu_isas()}; in use: {in_use}" + (
        f" (FLASH_ATTENTION_CPU_ISA={forced})" if forced else ""
    )


def every_kernel() -> str:
    """Return the list of kernels under a line of headings, one a line."""
    return "backend isa operation dtypes head_dims\n" + str(_library.lib.kernels()).strip()


def _kernels() -> str:
    """Return a line for each backend, of CUDA for each generation of kernels."""
    backends = {}
    for line in str(_library.lib.kernels()).strip().splitlines():
        backend, isa, operation, dtypes, head_dims = line.split()
        if backend != "cpu":
            backend = f"{backend} {isa}"
        backends.setdefault((backend, dtypes, head_dims), {})[operation] = None
    return "".join(
        f"\n  {backend}: {', '.join(operations)} ({dtypes}; head dims {head_dims})"
        for (backend, dtypes, head_dims), operations in backends.items()
    )


def report() -> str:
    """Return the versions, the machine and the kernels, one item a line."""
    lib = _library.lib
    items = {
        "flash_attn": f"{flash_attn.__version__} in {Path(flash_attn.__file__).parent}",
        "library": f"{lib.version()} in {_library.library_path()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "apache-tvm-ffi": _version("apache-tvm-ffi"),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "CPU": f"{_cpu_model()}, {os.cpu_count()} logical CPUs",
        "instruction sets": _instruction_sets(),
        "threads": f"{lib.cpu_threads()} (torch: {torch.get_num_threads()})",
        "OpenMP": _openmp(),
        "GPUs": _gpus(),
        "emulated GPU": _emulator(),
        "kernels": _kernels(),
    }
    return "\n".join(
        f"{name}:{value}" if value.startswith("\n") else f"{name}: {value}"
        for name, value in items.items()
    )


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Print what the command line's arguments ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn",
        description="Print what a bug report needs: versions, machine, kernels.",
    )
    parser.add_argument("--kernels", action="store_true", help="print every kernel instead")
    print(every_kernel() if parser.parse_args(arguments).kernels else report())


if __name__ == "__main__":
    main()
