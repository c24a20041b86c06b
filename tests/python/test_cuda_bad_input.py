"""Malformed calls with CUDA tensors raise the CPU's sentences, and nothing is written; elements of
index tensors alone are left to the kernels."""

from __future__ import annotations

import malformed_on_device
import pytest
from backends import needs_emulator
from malformed_calls import ENTRIES
from scripts import report_of_emulated_driver

pytestmark = needs_emulator

FUNCTIONS = [entry.name for entry in ENTRIES if entry.name.startswith("lib.")]


@pytest.fixture(scope="module", params=[150, pytest.param(3000, marks=pytest.mark.slow)])
def report(request):
    return report_of_emulated_driver(malformed_on_device.__file__, str(request.param))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sentences_are_the_cpus(report, name):
    assert report[name]["wrong"] == []
    assert report[name]["raised"] > 20
    assert report[name]["returned"] > 10 or "bwd" in name
