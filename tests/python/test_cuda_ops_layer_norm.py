"""The CUDA kernels of layer norm and RMS norm on the emulated GPU."""

from __future__ import annotations

import norm_cases
import pytest
import torch
from backends import needs_emulator
from norm_cases import BF16, EPSILON, FP16, FP32, NormCase

import flash_attn
from flash_attn.ops import layer_norm as ln
from flash_attn.ops._layer_norm import add_norm
from flash_attn.ops.triton import layer_norm as triton

pytestmark = needs_emulator


@pytest.mark.parametrize("case", norm_cases.cases((3, 72))[::3], ids=str)
def test_values(case):
    norm_cases.check(case, flash_attn.emulator)


@pytest.mark.parametrize("n", [1, 7, 8, 257, 300, 1028])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_sizes(n, dtype):
    features = {"residual": FP32, "dropout_p": 0.1, "colscale": True}
    norm_cases.check(NormCase(dtype, (5, n), **features), flash_attn.emulator)


@pytest.mark.parametrize("features", [{}, {"x1": True, "weight1": True, "residual": FP32}])
def test_rows_of_several_tiles(features):
    norm_cases.check(NormCase(BF16, (2, 4100), **features), flash_attn.emulator)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_rows(rows):
    norm_cases.check(NormCase(FP32, (rows, 24), residual=FP32), flash_attn.emulator)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,)])
def test_empty(shape):
    x, weight = (torch.randn(s, requires_grad=True) for s in (shape, shape[-1:]))
    with flash_attn.emulator():
        out = triton.layer_norm_fn(x, weight, None)
        grads = torch.autograd.grad(out.sum(), (x, weight))
    assert out.shape == shape
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_large_means(mean):
    norm_cases.check(NormCase(FP32, (2, 1000), mean=mean), flash_attn.emulator)


@pytest.mark.parametrize("is_strided", [False, True])
def test_mask_is_the_documented_function(is_strided):
    """Of rows that are made of chunks, and of others."""
    n = 77 if is_strided else 80
    torch.manual_seed(3)
    with flash_attn.emulator():
        normed = add_norm(
            torch.randn(3, n),
            None,
            None,
            EPSILON,
            x1=torch.randn(3, n),
            dropout_p=0.4,
            wants_mask=True,
        )
    for branch, mask in enumerate((normed.dropout_mask, normed.dropout_mask1)):
        assert torch.equal(mask, norm_cases.expected_mask(3, n, 0.4, normed.rng_state, branch))


@pytest.mark.parametrize(("mode", "seed"), [("late", 0), ("random", 1), ("random", 2)])
def test_schedules_do_not_change_results(mode, seed):
    case = NormCase(FP16, (40, 40), dropout_p=0.1, residual=FP32, colscale=True)
    tensors = case.tensors()

    def run(t):
        normed = add_norm(epsilon=EPSILON, **t, **case.options)
        return normed.out, normed.x

    results = []
    for options in ({}, {"mode": mode, "seed": seed}):
        torch.manual_seed(0)
        douts = [torch.ones(case.shape)] * 2
        with flash_attn.emulator(**options):
            results.append(norm_cases.results_and_gradients(run, tensors, douts))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def subsets(entries):
    x0, residual = torch.randn(4, 40), torch.randn(6, 40)
    x0_subset = torch.tensor(entries, dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (x0, residual)]
    out, x = ln.dropout_add_layer_norm_subset(
        *leaves,
        torch.ones(40),
        None,
        0.0,
        EPSILON,
        x0_subset=x0_subset,
        out_subset=x0_subset,
        out_numrows=4,
        prenorm=True,
    )
    return out, x, *torch.autograd.grad(out.square().sum() + x.sum(), leaves)


def test_subsets():
    results = []
    for gpu in (flash_attn.emulator(), torch.enable_grad()):
        torch.manual_seed(0)
        with gpu:
            results.append(subsets([1, 0, 2, 0, 4, 3]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("entry", [-1, 5, 2**31 - 1])
def test_rows_out_of_range(entry):
    """Their x0 and out are left out, and the next call says so."""
    with flash_attn.emulator(), torch.no_grad():
        x0, residual, subset = torch.ones(4, 8), torch.zeros(3, 8), torch.tensor([1, entry, 2])
        args = x0, residual, None, None, 0.0, EPSILON
        _, x = ln.dropout_add_layer_norm_subset(*args, x0_subset=subset, prenorm=True)
        assert torch.equal(x[:, 0], torch.tensor([1.0, 0.0, 1.0]))
        with pytest.raises(RuntimeError, match="values out of range in x0_subset"):
            triton.layer_norm_fn(x0, None, None)
        triton.layer_norm_fn(x0, None, None)


def moved(gpu, name):
    """Bytes of a kernel's accesses to global memory, all of which are full sectors."""
    (counted,) = (c["global"] for kernel, c in gpu.counters.items() if name in kernel)
    assert counted["sectors"] == counted["ideal_sectors"] > 0
    return 32 * counted["sectors"]


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("n", [256, 2048])
def test_bytes_are_those_that_must_be_moved(dtype, n):
    """Every element once, and of each row the weights, which are in the first-level cache."""
    rows = 32
    x, residual, dout = (torch.randn(rows, n).to(dtype) for _ in range(3))
    weight = torch.randn(n)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    with flash_attn.emulator(checks="none") as gpu:
        out, summed = triton.layer_norm_fn(x, weight, None, residual, prenorm=True)
        torch.autograd.grad((out, summed), leaves, (dout, dout))
    element, weights = x.numel() * x.itemsize, rows * n * 4
    ctas = -(-rows // max(512 // (n // 8), 1))
    fwd, bwd = 4 * element + weights, 4 * element + weights + ctas * n * 4
    statistics = 64 * rows  # a sector of mean and of rstd for each row at most
    assert fwd <= moved(gpu, "layer_norm_fwd") <= 1.02 * fwd + statistics
    assert bwd <= moved(gpu, "layer_norm_bwd") <= 1.02 * bwd + statistics
    assert moved(gpu, "layer_norm_sums") == (ctas + 1) * n * 4


def test_no_bank_conflicts():
    x = torch.randn(20, 300, requires_grad=True)
    with flash_attn.emulator(checks="none") as gpu:
        triton.layer_norm_fn(x, None, torch.ones(300, requires_grad=True)).sum().backward()
    for counted in gpu.counters.values():
        shared = counted["shared"]
        assert shared["wavefronts"] == shared["ideal_wavefronts"]
