"""The attention kernel under all checks, its tensors in memory of cuMemAlloc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "device_memory.py"


def run(case: str, library: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FLASH_ATTENTION_CUDA_DRIVER": library}
    command = [sys.executable, str(SCRIPT), case]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_written_tensors_give_no_report(emulator_library):
    result = run("complete", emulator_library)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 0.02


def test_a_row_never_written_is_reported(emulator_library):
    result = run("partial", emulator_library)
    assert result.returncode != 0
    assert "An undefined value is written to global memory" in result.stderr, result.stderr
    assert "never written" in result.stderr
