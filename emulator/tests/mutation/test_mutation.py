"""Every deletion of a synchronising instruction is noticed, or listed as equivalent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("case", ["sm80_fwd", "sm80_bwd", "sm80_decode", "sm80_cache"])
def test_no_deletion_survives(case, emulator_library):
    tool = HERE.parent.parent / "tools" / "mutate.py"
    command = [sys.executable, str(tool), str(HERE / f"{case}.py"), "--library", emulator_library]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
