"""The list of known failures names tests that there are."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from known_failures import KNOWN_FAILURES, name_without_isa, reason_to_fail
from scripts import ROOT

from flash_attn import _library

TESTS = ROOT / "tests" / "python"


@pytest.fixture(scope="module")
def names():
    """File and test of everything that runs on this machine's best instruction set."""
    files = {pattern.split("::")[0] for _, pattern, _ in KNOWN_FAILURES}
    isa = _library.cpu_isas()[-1]
    arguments = [f"--config-file={ROOT / 'pyproject.toml'}", "-q", "--collect-only"]
    command = [sys.executable, "-m", "pytest", *arguments, *(str(TESTS / file) for file in files)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name_without_isa(line, isa) for line in lines if f"[{isa}-" in line]


@pytest.mark.parametrize(("isas", "pattern", "reason"), KNOWN_FAILURES)
def test_each_is_a_test(names, isas, pattern, reason):
    assert set(isas) <= {"avx512", "avx512bf16", "amx"}
    assert any(re.fullmatch(pattern, name) for name in names)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_it_is_known_on_its_instruction_sets_alone(isa):
    nodeid = f"tests/python/test_attention.py::test_large_scores[{isa}-dtype1]"
    reason = reason_to_fail(nodeid, isa)
    assert (reason is not None) == (isa == "amx")
    assert reason_to_fail(nodeid.replace("dtype1", "dtype2"), isa) is None
