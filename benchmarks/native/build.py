"""The benchmarks' C++ helpers: compiled for this machine when first used, loaded with ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import machine

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = _ROOT / "benchmarks" / "native"
_LIBRARY_SOURCES = (_ROOT / "csrc", _ROOT / "csrc" / "flash_attn" / "src")
_BUILT = _ROOT / "build" / "bench" / "native"
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *(f"-I{folder}" for folder in _LIBRARY_SOURCES),
    # Sums may be reordered. Not -ffast-math: linked with it, a library flushes the subnormal
    # numbers of the thread that loads it.
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
    "-ffp-contract=fast",
)


class BuildError(RuntimeError):
    """There is no compiler, or it refused."""


def _text_with_headers(source: Path) -> str:
    """The file and the headers that it includes of the library."""
    text = source.read_text()
    names = re.findall(r'^#include "(.+)"', text, re.M)
    headers = [folder / name for name in names for folder in _LIBRARY_SOURCES]
    return "".join([text, *(_text_with_headers(header) for header in headers if header.is_file())])


def command(source: Path, library: Path, *flags: str) -> list[str]:
    """The compiler's command that makes ``library`` of ``source``, for this machine."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    return [*compiler, *_FLAGS, str(source), "-o", str(library), *flags]


@functools.cache
def load(name: str, *link_flags: str) -> ctypes.CDLL:
    """The library of ``native/<name>.cpp``. Raises BuildError with the compiler's message."""
    source = _SOURCES / f"{name}.cpp"
    identity = (
        _text_with_headers(source),
        machine.cpu_model(),
        *command(source, _BUILT, *link_flags),
    )
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    library = _BUILT / f"{name}-{digest}.so"
    if not library.is_file():
        _BUILT.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        build = command(source, unfinished, *link_flags)
        try:
            finished = subprocess.run(build, capture_output=True, text=True)
        except OSError as error:
            raise BuildError(f"{build[0]}: {error.strerror}") from error
        if finished.returncode != 0:
            raise BuildError(finished.stderr.strip().splitlines()[0])
        unfinished.replace(library)
    return ctypes.CDLL(str(library))
