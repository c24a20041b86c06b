"""Faults that are planted into the Hopper forward are noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import hopper_faults


@pytest.fixture(scope="module")
def report(emulator_library):
    command = [sys.executable, hopper_faults.__file__, emulator_library]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("fault", [fault.__name__ for fault in hopper_faults.FAULTS])
def test_a_planted_fault_is_noticed(fault, report):
    assert report[fault], "no mode notices it"
    # It is the fault that is noticed, and not that the changed PTX is none.
    assert not any("PTX line" in said and "expected" in said for said in report[fault].values())
