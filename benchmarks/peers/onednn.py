"""oneDNN's fused attention (Graph API), by way of native/onednn_sdpa.cpp."""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from pathlib import Path

import torch
from cases.case import Case, Inputs
from native import build

from peers.unsupported import Unsupported

INSTALL = "pip install onednn-devel (headers and library), and a C++ compiler"
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
# libdnnl.so of PyPI runs on SYCL and finds these only if they are loaded already.
_RUNTIME = (
    "libtbb.so.12",
    "libintlc.so.5",
    "libimf.so",
    "libsvml.so",
    "libur_loader.so.0",
    "libsycl.so.9",
)


def _load_runtime(directory: Path) -> None:
    driver = directory / "libintelocl.so"  # the OpenCL driver that makes a CPU a SYCL device
    if driver.is_file():
        os.environ.setdefault("OCL_ICD_FILENAMES", str(driver))
    for name in _RUNTIME:
        if (directory / name).is_file():
            ctypes.CDLL(str(directory / name), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _library() -> ctypes.CDLL:
    prefix = Path(sysconfig.get_paths()["data"])
    if not (prefix / "include" / "oneapi" / "dnnl" / "dnnl_graph.hpp").is_file():
        raise Unsupported(f"not installed: {INSTALL}")
    directory = prefix / "lib"
    flags = (f"-L{directory}", "-ldnnl", f"-Wl,-rpath,{directory}", "-Wl,--allow-shlib-undefined")
    try:
        _load_runtime(directory)
        library = build.load("onednn_sdpa", f"-I{prefix / 'include'}", *flags)
    except (build.BuildError, OSError) as error:
        raise Unsupported(f"its library cannot be used: {error}") from error
    library.onednn_version.restype = ctypes.c_char_p
    library.onednn_sdpa_create.restype = ctypes.c_void_p
    library.onednn_sdpa_create.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_bool)
    library.onednn_sdpa_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float)
    library.onednn_sdpa_destroy.argtypes = (ctypes.c_void_p,)
    library.onednn_error.restype = ctypes.c_char_p
    return library


def version() -> str:
    """oneDNN's version. Raises Unsupported where it is missing."""
    return _library().onednn_version().decode()


class _Attention:
    """A compiled graph for one shape."""

    def __init__(self, shape, dtype: str, masked: bool):
        self._library = _library()
        dims = (ctypes.c_int64 * 4)(*shape)
        self._handle = self._library.onednn_sdpa_create(dims, _DTYPES[dtype], masked)
        if not self._handle:
            raise Unsupported(self._library.onednn_error().decode())

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.onednn_sdpa_destroy(self._handle)

    def __call__(self, addresses, scale: float) -> None:
        if self._library.onednn_sdpa_run(self._handle, addresses, scale):
            raise RuntimeError(self._library.onednn_error().decode())


def onednn(case: Case, inputs: Inputs):
    """Forward of equal head counts; a causal mask is added as a tensor, as the pattern has it."""
    if case.op != "fwd" or case.window or case.nheads != case.nheads_k:
        raise Unsupported("measured for forward with equal head counts")
    if case.headdim != case.headdim_v:
        raise Unsupported("measured for one head dim")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    attention = _Attention(q.shape, case.dtype, case.causal)
    mask = torch.full((case.seqlen_q, case.seqlen_k), -torch.inf).triu_(1) if case.causal else None
    out = torch.empty_like(q)
    pointers = [x.data_ptr() if x is not None else None for x in (q, k, v, mask, out)]
    addresses, scale = (ctypes.c_void_p * 5)(*pointers), case.headdim**-0.5

    def run(kept=(q, k, v, mask)):
        attention(addresses, scale)
        return (out.transpose(1, 2),)

    return run
