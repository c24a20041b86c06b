"""What the emulated GPU counted, as ``flash_attn.emulator`` shows it."""

from __future__ import annotations

import pytest
import torch
from backends import needs_emulator

import flash_attn


@pytest.fixture(scope="module")
def gpu():
    q, k, v = torch.randn(3, 1, 130, 2, 64).half()
    with flash_attn.emulator() as gpu:
        flash_attn.flash_attn_func(q, k, v, causal=True)
    return gpu


@needs_emulator
def test_counters_can_be_printed(gpu):
    (kernel,) = gpu.counters.values()
    assert kernel["launches"] == 1
    assert kernel["ctas"] == 4
    assert "lines" not in kernel
    assert len(str(gpu.counters)) < 2000


@needs_emulator
def test_counters_of_lines_add_up(gpu):
    assert gpu.line_counters.keys() == gpu.counters.keys()
    for name, lines in gpu.line_counters.items():
        executed = sum(line["executed"] for line in lines)
        assert executed == gpu.counters[name]["warp_instructions"]
        assert any(line["text"].startswith("mma") for line in lines)
