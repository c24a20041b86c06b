"""Every deletion of a synchronising instruction is noticed, or listed as equivalent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def mutate(case: str, library: str, *options: str) -> subprocess.CompletedProcess:
    tool = HERE.parent.parent / "tools" / "mutate.py"
    command = [sys.executable, str(tool), str(HERE / f"{case}.py"), "--library", library, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800)


@pytest.mark.parametrize(
    "case",
    [
        "sm80_fwd",
        "sm80_bwd",
        "sm80_dims",
        "sm80_packed",
        "sm80_decode",
        "sm80_decode_wide",
        "sm80_pages",
        "sm80_cache",
        "hopper_fwd",
        "hopper_packed",
        "hopper_in_place",
        "hopper_unmasked",
        "hopper_fp8",
        "hopper_decode",
        "hopper_latent",
    ],
)
def test_no_deletion_survives(case, emulator_library):
    result = mutate(case, emulator_library)
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_that_synchronise_nothing(emulator_library):
    """Where there is nothing to delete no case is needed."""
    result = mutate("sm80_rows", emulator_library, "--kernel", "dmask|combine")
    assert "\n0 deletions, " in result.stdout, result.stdout + result.stderr
