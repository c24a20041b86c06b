"""tools/gpu_report.sh, which runs on a machine with a GPU: its time limits and what it starts."""

from __future__ import annotations

import re
import subprocess

from scripts import ROOT

REPORT = ROOT / "tools" / "gpu_report.sh"
TEXT = REPORT.read_text()


def test_limits_add_up_to_less_than_nine_minutes():
    loop = re.search(r"for tool in (.*); do\n +step \S+ (\d+) ", TEXT)
    limits = [int(seconds) for seconds in re.findall(r"^\s*step \S+ (\d+) ", TEXT, re.MULTILINE)]
    again = (len(loop[1].split()) - 1) * int(loop[2])
    assert len(limits) > 8
    assert sum(limits) + again < 540


def test_what_it_starts_is_there():
    subprocess.run(["bash", "-n", REPORT], check=True)
    scripts = re.findall(r"\b((?:tools|benchmarks|tests)/\S+\.py)", TEXT)
    assert {"tools/gpu_launches.py", "benchmarks/benchmark_cuda.py"} <= set(scripts)
    assert all((ROOT / name).is_file() for name in scripts)
