"""Where the emulator is, and whether there are kernels for it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def find_library() -> str | None:
    """libgpu_emulator.so of the environment, or of the installed package."""
    package = importlib.util.find_spec("flash_attn")
    directories = [os.environ.get("FLASH_ATTN_LIBRARY_DIR")]
    directories += package.submodule_search_locations if package else []
    candidates = [Path(d) / "libgpu_emulator.so" for d in directories if d]
    found = next((str(path) for path in candidates if path.exists()), None)
    return os.environ.get("GPU_EMULATOR_LIBRARY") or found


@pytest.fixture(scope="session")
def emulator_library() -> str:
    """The library's path; skips the test where it or the CUDA kernels were not built."""
    library = find_library()
    flash_attn = pytest.importorskip("flash_attn._library")
    if library is None or "cuda sm80" not in str(flash_attn.lib.kernels()):
        pytest.skip("built without nvcc or the emulated GPU")
    return library
