"""Every deletion of a synchronising instruction is noticed, or listed as equivalent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIBRARY = os.environ.get("GPU_EMULATOR_LIBRARY") or next(
    (
        str(path)
        for directory in [os.environ.get("FLASH_ATTN_LIBRARY_DIR", "")]
        if directory and (path := Path(directory) / "libgpu_emulator.so").exists()
    ),
    None,
)


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
