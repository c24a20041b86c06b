"""The example of ring attention over four processes, on a shorter sequence."""

from __future__ import annotations

import json
import subprocess
import sys

from scripts import ROOT


def test_processes_are_one(tmp_path):
    report = tmp_path / "report.json"
    script = str(ROOT / "examples" / "long_context_ring.py")
    command = [sys.executable, script, "--tokens", "4096", "--json", str(report)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to one process" in result.stdout
    found = json.loads(report.read_text())
    assert found["processes"] == 4
    alone, shared = found["peak_mib"]
    # A fourth, and what does not shrink: buffers of messages, the allocator's rest.
    assert shared < 0.45 * alone
