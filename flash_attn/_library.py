"""The compiled library: the one place where it is found and loaded.

``lib`` holds its functions as attributes (``lib.mha_fwd`` and so on). Their arguments are those of
the C header ``flash_attn/flash_attn.h``, tensors as anything that speaks DLPack, absent ones as
None. They raise RuntimeError with the library's sentence, MemoryError when memory runs out, and
TypeError or OverflowError for an argument that is not of the expected kind.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch  # before the library, so that both share torch's OpenMP threads

_FILE_NAME = "libflash_attn_ffi.so"
_NO_EXTENSION = "TVM_FFI_DISABLE_TORCH_C_DLPACK"  # read by tvm_ffi when it is imported
# Long calls let other Python threads run; the short ones would only lose time by it.
_LONG_CALLS = (
    "mha_fwd",
    "mha_varlen_fwd",
    "mha_bwd",
    "mha_varlen_bwd",
    "mha_fwd_kvcache",
    "combine",
)
_SHORT_CALLS = (
    "version",
    "kernels",
    "cpu_isas",
    "cpu_isa",
    "set_cpu_isa",
    "cpu_threads",
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
    functions = SimpleNamespace()
    for name in _LONG_CALLS + _SHORT_CALLS:
        function = module.get_function(name)
        function.release_gil = name in _LONG_CALLS
        setattr(functions, name, function)
    return functions


lib = _load()


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
