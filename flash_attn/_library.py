"""The compiled library: the one place where it is found and loaded.

``bind`` makes its functions callable; ``lib`` holds those that take no tensors as attributes.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Callable

import torch  # before the library, so that both share torch's OpenMP threads

_FILE_NAME = "libflash_attn_ffi.so"
_NO_EXTENSION = "TVM_FFI_DISABLE_TORCH_C_DLPACK"  # read by tvm_ffi when it is imported
_CPU = 1  # DLPack's number of the device
_FUNCTIONS = (
    "arguments",
    "bind",
    "version",
    "kernels",
    "cpu_isas",
    "cpu_isa",
    "set_cpu_isa",
    "cpu_threads",
    "set_allocator",
    "use_emulator",
    "emulator_counters",
)


def library_path() -> Path:
    """Return the library's path: in ``$FLASH_ATTN_LIBRARY_DIR`` if set, else beside this file.

    Raises ImportError if it is not there.
    """
    directory = os.environ.get("FLASH_ATTN_LIBRARY_DIR") or Path(__file__).parent
    path = Path(directory).resolve() / _FILE_NAME
    if not path.is_file():
        raise ImportError(
            f"{path} not found: build it (see README.md), or set FLASH_ATTN_LIBRARY_DIR to the "
            f"directory that holds {_FILE_NAME}"
        )
    return path


def _import_tvm_ffi() -> ModuleType:
    """Import tvm_ffi without letting it compile anything, where calls do without.

    torch before 2.10 lacks the C side of DLPack's exchange. tvm_ffi's import then compiles an
    extension that has it, for two minutes. CPU tensors cross without it; CUDA needs it to tell the
    current stream.
    """
    has_exchange = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    if has_exchange or find_spec("torch_c_dlpack_ext") or torch.cuda.is_available():
        return importlib.import_module("tvm_ffi")
    before = os.environ.get(_NO_EXTENSION)
    os.environ[_NO_EXTENSION] = "1"
    try:
        return importlib.import_module("tvm_ffi")
    finally:
        if before is None:
            del os.environ[_NO_EXTENSION]
        else:
            os.environ[_NO_EXTENSION] = before


def _load() -> SimpleNamespace:
    module = _import_tvm_ffi().load_module(library_path())
    functions = {name: module.get_function(name) for name in _FUNCTIONS}
    for function in functions.values():
        function.release_gil = False  # they are short
    return SimpleNamespace(**functions)


def _allocate(size: int, device_type: int, device_id: int) -> torch.Tensor:
    """Return ``size`` bytes on a device of DLPack's: what a kernel needs while it runs."""
    device = torch.device("cpu") if device_type == _CPU else torch.device("cuda", device_id)
    return torch.empty(size, dtype=torch.uint8, device=device)


lib = _load()
lib.set_allocator(_allocate)


def bind(function: str, names: str) -> Callable[..., None]:
    """Return a function of the C interface that takes the named arguments by position.

    Args:
        function: "mha_fwd", "mha_varlen_fwd", "mha_bwd", "mha_varlen_bwd", "mha_fwd_kvcache" or
            "combine".
        names: of members of its struct in ``flash_attn/flash_attn.h``, separated by spaces; "_" for
            an argument that the library does without. What is not named is absent.

    Tensors are anything that speaks DLPack, absent ones None. Other Python threads run during a
    call. It raises RuntimeError with the library's sentence, MemoryError when memory runs out, and
    TypeError or OverflowError for an argument that is not of the expected kind. ``bind`` raises
    ValueError for a name that there is not.
    """
    bound = lib.bind(function, names)
    bound.release_gil = True
    return bound


def arguments(function: str) -> list[str]:
    """Return the names of the arguments of a function of the C interface."""
    return str(lib.arguments(function)).split()


@functools.cache
def largest_head_dims(backend: str, operation: str) -> int:
    """Return the largest head dim of q and v that a backend has an operation for; 0: none."""
    rows = [line.split() for line in str(lib.kernels()).splitlines()]
    limits = [row[-1] for row in rows if row[0] == backend and row[2] == operation]
    return max((int(limit.split(",")[0].split("-")[1]) for limit in limits), default=0)


def cpu_isas() -> list[str]:
    """Return the instruction sets that this build has and this CPU runs, best last."""
    return lib.cpu_isas().split()


def cpu_isa() -> str:
    """Return the instruction set in use."""
    return str(lib.cpu_isa())


def set_cpu_isa(name: str | None) -> None:
    """Use instruction set ``name`` from now on, in the whole process; None restores the default.

    Raises RuntimeError if ``name`` is not one of ``cpu_isas()``.
    """
    lib.set_cpu_isa(name)
