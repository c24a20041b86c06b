"""The benchmarks' C++ helpers: compiled for this machine when first used, loaded with ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

import machine

_SOURCES = Path(__file__).resolve().parent / "native"
_BUILT = Path(__file__).resolve().parents[1] / "build" / "bench" / "native"
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Sums may be reordered. Not -ffast-math: linked with it, a library flushes the subnormal
    # numbers of the thread that loads it.
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
    "-ffp-contract=fast",
)


class BuildError(RuntimeError):
    """There is no compiler, or it refused."""


@functools.cache
def load(name: str, *link_flags: str) -> ctypes.CDLL:
    """The library of ``native/<name>.cpp``. Raises BuildError with the compiler's message."""
    source = _SOURCES / f"{name}.cpp"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    identity = (source.read_text(), machine.cpu_model(), *compiler, *_FLAGS, *link_flags)
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    library = _BUILT / f"{name}-{digest}.so"
    if not library.is_file():
        _BUILT.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [*compiler, *_FLAGS, str(source), "-o", str(unfinished), *link_flags]
        try:
            finished = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise BuildError(f"{compiler[0]}: {error.strerror}") from error
        if finished.returncode != 0:
            raise BuildError(finished.stderr.strip().splitlines()[0])
        unfinished.replace(library)
    return ctypes.CDLL(str(library))
