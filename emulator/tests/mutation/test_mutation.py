"""Every deletion of a synchronising instruction is noticed, or listed as equivalent."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def find_library() -> str | None:
    """libgpu_emulator.so of the environment, or of the installed package."""
    package = importlib.util.find_spec("flash_attn")
    directories = [os.environ.get("FLASH_ATTN_LIBRARY_DIR")]
    directories += package.submodule_search_locations if package else []
    candidates = [Path(d) / "libgpu_emulator.so" for d in directories if d]
    found = next((str(path) for path in candidates if path.exists()), None)
    return os.environ.get("GPU_EMULATOR_LIBRARY") or found


LIBRARY = find_library()


@pytest.mark.skipif(LIBRARY is None, reason="the emulator's library was not built")
@pytest.mark.parametrize("case", ["sm80_fwd"])
def test_no_deletion_survives(case):
    flash_attn = pytest.importorskip("flash_attn")
    if not hasattr(flash_attn, "emulator"):
        pytest.skip("flash_attn without CUDA kernels")
    tool = HERE.parent.parent / "tools" / "mutate.py"
    command = [sys.executable, str(tool), str(HERE / f"{case}.py"), "--library", LIBRARY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
