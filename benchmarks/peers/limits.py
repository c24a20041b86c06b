"""The machine's limits, measured in turns with the kernels: what no attention can exceed.

``fma_peak`` multiplies and adds fp32 vectors in registers, ``dot_peak`` bf16 vectors, ``amx_peak``
bf16 tiles (random data: zeros run faster), ``exp_peak`` computes 2^x of fp32 in L1,
``read`` reads a decode case's keys and values. All on the threads that torch uses.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Callable

import torch
from cases.case import Case, Inputs, Work
from native import build

from peers.unsupported import Unsupported

_ITERATIONS = {
    "fma": 1_000_000,
    "dot": 1_000_000,
    "amx": 20_000,
    "exp": 4_000,
}  # a few milliseconds


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = build.load("limits")
    except build.BuildError as error:
        raise Unsupported(f"limits.cpp does not compile: {error}") from error
    for name in _ITERATIONS:
        getattr(library, f"limits_{name}").argtypes = (ctypes.c_int, ctypes.c_int64)
        getattr(library, f"limits_{name}_work").restype = ctypes.c_int64
    library.limits_amx_rate.argtypes = (ctypes.c_int, ctypes.c_double)
    library.limits_amx_rate.restype = ctypes.c_double
    library.limits_read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
    return library


def _loop(name: str) -> tuple[Callable[[], tuple], float]:
    """A function that does the work, and how much that is."""
    library, threads = _library(), torch.get_num_threads()
    iterations = _ITERATIONS[name]
    work = getattr(library, f"limits_{name}_work")() * iterations * threads
    if not work:
        raise Unsupported("this CPU has no such instruction")
    function = getattr(library, f"limits_{name}")

    def run():
        function(threads, iterations)
        return ()

    return run, float(work)


def amx_rate(wake_seconds: float = 4e-4) -> float:
    """Operations a second of bf16 tile products at this moment, after ``wake_seconds`` of them; 0
    without AMX."""
    return _library().limits_amx_rate(torch.get_num_threads(), wake_seconds)


def fma_peak(case: Case, inputs: Inputs):
    """Fused multiply-adds of fp32 vectors."""
    run, work = _loop("fma")
    return run, Work(flops=work)


def dot_peak(case: Case, inputs: Inputs):
    """Dot products of bf16 vectors."""
    run, work = _loop("dot")
    return run, Work(flops=work)


def amx_peak(case: Case, inputs: Inputs):
    """Products of bf16 tiles."""
    run, work = _loop("amx")
    return run, Work(flops=work)


def exp_peak(case: Case, inputs: Inputs):
    """Exponentials of fp32 vectors."""
    run, work = _loop("exp")
    return run, Work(exps=work)


def read(case: Case, inputs: Inputs):
    """Reading the keys and values once, a contiguous share a thread."""
    library, threads = _library(), torch.get_num_threads()
    parts = [(x.data_ptr(), x.numel() * x.element_size()) for x in (inputs.k, inputs.v)]

    def run():
        for address, size in parts:
            library.limits_read(threads, address, size)
        return ()

    return run, Work(bytes=float(sum(size for _, size in parts)))


LIMITS = {
    "fma_peak": fma_peak,
    "dot_peak": dot_peak,
    "amx_peak": amx_peak,
    "exp_peak": exp_peak,
    "read": read,
}
