"""The rotary operator's CUDA kernels on the emulated GPU."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import rotary_cases
import torch
from backends import needs_emulator
from rotary_cases import BF16, DTYPES, FP16, FP32, RotaryCase, tables

import flash_attn
from flash_attn.layers import rotary
from flash_attn.ops.triton.rotary import apply_rotary

pytestmark = needs_emulator

DIMS = [(7, 6), (64, 32), (128, 128), (100, 34)]


@pytest.mark.parametrize("case", rotary_cases.cases(DIMS), ids=str)
def test_values(case):
    rotary_cases.check(case, flash_attn.emulator)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (1, 300, 2)])
@pytest.mark.parametrize("dims", [(1, 0), (16, 8)])
def test_sizes(shape, dims):
    rotary_cases.check(RotaryCase(BF16, dims, shape=shape), flash_attn.emulator)


def test_threads_of_several_heads():
    """Of more than a device runs at a time: they read the tables once for two heads."""
    case = RotaryCase(FP32, (64, 64), shape=(1, 131, 63), before=3, gap=5, inplace=True)
    rotary_cases.check(case, flash_attn.emulator)


def packed_results(context, dtype=FP16, interleaved=False):
    """All that one call turns: sequences with offsets, a tail of none, queries and keys."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 3, 40, generator=generator).to(dtype)
    qkv = torch.randn(2, 5, 7, 64, generator=generator).to(dtype)
    offsets = torch.tensor([2, 0, 3, 5])
    cu_seqlens = torch.tensor([0, 9, 9, 10, 20], dtype=torch.int32)
    of_q = tables(9, 64, FP32)
    of_k = tuple(2 * t for t in of_q)
    options = (interleaved, torch.tensor([4, 1], dtype=torch.int32), 3)
    with context:
        out = apply_rotary(x, *tables(16, 32, dtype), offsets, cu_seqlens, 10, interleaved)
        rotary.apply_rotary_emb_qkv_(qkv, *of_q, *of_k, *options)
    return out, qkv


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_results_are_the_cpus(dtype, interleaved):
    actual = packed_results(flash_attn.emulator(), dtype, interleaved)
    expected = packed_results(contextlib.nullcontext(), dtype, interleaved)
    tolerance = {FP32: 1e-6, FP16: 1e-3, BF16: 8e-3}[dtype]
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("mode", "seed"), [("late", 0), ("random", 1), ("random", 2)])
def test_schedules_do_not_change_results(mode, seed):
    expected = packed_results(flash_attn.emulator())
    for ours, theirs in zip(packed_results(flash_attn.emulator(mode=mode, seed=seed)), expected):
        assert torch.equal(ours, theirs)


def counters(case, **more):
    headdim, rotary_dim = case.dims
    x = torch.randn(*case.shape, headdim).to(case.dtype)
    cos, sin = tables(case.shape[1], rotary_dim, FP32 if case.fp32_tables else case.dtype)
    with flash_attn.emulator(checks="none") as gpu:
        apply_rotary(x, cos, sin, interleaved=case.interleaved, inplace=case.inplace, **more)
    (kernel,) = gpu.counters.values()
    return kernel


COUNTED = {
    "halves": RotaryCase(BF16, (128, 128)),
    "in place": RotaryCase(FP16, (128, 128), inplace=True),
    "half of a head": RotaryCase(BF16, (128, 64)),
    "half of a head, in place": RotaryCase(BF16, (128, 64), inplace=True),
    "fp32": RotaryCase(FP32, (64, 64)),
    "interleaved": RotaryCase(BF16, (128, 128), interleaved=True),
    "interleaved fp32": RotaryCase(FP32, (64, 64), interleaved=True, inplace=True),
}


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_are_those_that_must_be_moved(name):
    """Each element once each way, and for each token a row of the tables."""
    case = dataclasses.replace(COUNTED[name], shape=(2, 8, 1))
    kernel = counters(case)
    batch, seqlen, heads = case.shape
    elements = batch * seqlen * heads * (case.dims[1] if case.inplace else case.dims[0])
    of_tables = batch * seqlen * heads * case.dims[1]
    ideal = (2 * elements + of_tables) * case.dtype.itemsize
    moved = kernel["global"]
    assert ideal <= 32 * moved["sectors"] <= 1.02 * ideal
    assert moved["sectors"] == moved["ideal_sectors"] > 0


BAD = {
    "seqlen_offsets": {"offsets": [0, 4]},
    "seqlen_offsets, negative": {"offsets": [0, -1]},
    "seqlen_offsets, wide": {"offsets": [0, 2**62]},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_out_of_range_leave_the_sequence_and_are_reported(name, inplace):
    x, (cos, sin) = torch.randn(2, 6, 3, 16), tables(9, 16, FP32)
    offsets = torch.tensor(BAD[name]["offsets"])
    with flash_attn.emulator():
        out = apply_rotary(x.clone(), cos, sin, offsets, inplace=inplace)
        with pytest.raises(RuntimeError, match="out of range in seqlen_offsets: "):
            apply_rotary(x.clone(), cos, sin)
        apply_rotary(x.clone(), cos, sin)
    assert torch.equal(out[1], x[1])
    torch.testing.assert_close(out[:1], rotary.apply_rotary_emb_torch(x[:1], cos[:6], sin[:6]))


@pytest.mark.parametrize("starts", [[0, 4, 9], [1, 4, 7], [0, 6, 5], [0, -3, 4], [0, 2**31 - 1, 4]])
def test_cu_seqlens_out_of_range_are_reported(starts):
    x, (cos, sin) = torch.randn(7, 3, 16), tables(9, 16, FP32)
    out = torch.full_like(x, torch.nan)
    run = flash_attn._library.bind("rotary", "x out cos sin cu_seqlens max_seqlen")
    with flash_attn.emulator():
        run(x, out, cos, sin, torch.tensor(starts, dtype=torch.int32), 7)
        with pytest.raises(RuntimeError, match="out of range in cu_seqlens: "):
            apply_rotary(x[None], cos, sin)
        apply_rotary(x[None], cos, sin)
    assert out.isfinite().all()
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
