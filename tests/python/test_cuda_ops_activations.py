"""The CUDA kernels of the activation functions on the emulated GPU."""

from __future__ import annotations

import activation_cases
import pytest
import torch
from activation_cases import BF16, FP16, FP32, ActivationCase
from backends import needs_emulator

import flash_attn
from flash_attn.ops import activations

pytestmark = needs_emulator


@pytest.mark.parametrize("case", activation_cases.cases([(3, 104)]), ids=str)
def test_values(case):
    activation_cases.check(case, flash_attn.emulator)


SHAPES = [(), (1,), (7,), (8,), (0,), (0, 5), (5, 0), (2, 3, 40), (67, 12)]


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(shape):
    case = ActivationCase("silu", BF16, bias=len(shape) > 0, gate=True, shape=shape)
    activation_cases.check(case, flash_attn.emulator)


@pytest.mark.parametrize(("mode", "seed"), [("late", 0), ("random", 1), ("random", 2)])
def test_schedules_do_not_change_results(mode, seed):
    tensors = ActivationCase("gelu_approx", FP16, True, True, shape=(50, 40)).tensors()
    results = []
    for options in ({}, {"mode": mode, "seed": seed}):
        with flash_attn.emulator(**options):
            results.append(activations._backward(*tensors, 0, True))
    assert all(map(torch.equal, *results))


def moved(gpu, name):
    """Bytes of a kernel's accesses to global memory, all of which are full sectors."""
    (counted,) = (c["global"] for kernel, c in gpu.counters.items() if name in kernel)
    assert counted["sectors"] == counted["ideal_sectors"] > 0
    return 32 * counted["sectors"]


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("gate", [False, True])
def test_bytes_are_those_that_must_be_moved(dtype, gate):
    """Every element once."""
    dout, x, _, y = ActivationCase("silu", dtype, gate=gate, shape=(16, 512)).tensors()
    with flash_attn.emulator(checks="none") as gpu:
        activations._forward(x, None, y, 3)
        activations._backward(dout, x, None, y, 3, False)
    for name, tensors in (("fwd", 2 + gate), ("bwd", 3 + 2 * gate)):
        ideal = tensors * x.numel() * x.itemsize
        assert ideal <= moved(gpu, name) <= 1.02 * ideal


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_bytes_of_sums(dtype):
    """Every element once, bias too for each row, and the sums of strips of eight rows, which long
    tensors have more of, there and back."""
    dout, x, bias, _ = ActivationCase("relu", dtype, bias=True, shape=(64, 512)).tensors()
    with flash_attn.emulator(checks="none") as gpu:
        activations._backward(dout, x, bias, None, 1, True)
    of_sums = 64 // 8 * 512 * 4
    ideal = 4 * x.numel() * x.itemsize + of_sums
    # A thread's eight sums are two accesses, half of a sector each: 16-bit chunks have eight.
    (counted,) = (c["global"] for kernel, c in gpu.counters.items() if "activation_bwd" in kernel)
    assert 32 * counted["ideal_sectors"] == ideal
    assert 32 * counted["sectors"] == ideal + (of_sums if dtype == BF16 else 0)
    ideal = of_sums + 512 * 4
    assert ideal <= moved(gpu, "activation_dbias") <= 1.02 * ideal
