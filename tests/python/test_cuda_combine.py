"""Merging partial results on the emulated GPU, against the definition."""

from __future__ import annotations

import pytest
import torch
from backends import BF16, FP16, FP32, needs_emulator
from reference import INF

import flash_attn
from flash_attn._library import bind

pytestmark = needs_emulator

combine = bind("combine", "out_partial lse_partial out lse")
TOLERANCE = {FP32: 1e-5, FP16: 1e-3, BF16: 8e-3}
NAN = float("nan")


def partials(splits, b, s, h, dv, gen):
    """Each part is empty in one of three cases, its output then NaN; all of the first row's are."""
    out = 3.0 * torch.randn(splits, b, s, h, dv, generator=gen)
    lse = 3.0 * torch.randn(splits, b, s, h, generator=gen)
    empty = torch.rand(lse.shape, generator=gen) < 1 / 3
    empty[:, 0, 0] = True
    mark = torch.where(torch.rand(lse.shape, generator=gen) < 0.5, INF, -INF)
    return out.masked_fill(empty[..., None], NAN), torch.where(empty, mark, lse)


def definition(out, lse):
    lse = lse.double().masked_fill(lse == INF, -INF)
    total = lse.logsumexp(0)
    weight = (lse - total).exp().nan_to_num(0.0)[..., None]
    merged = torch.where(weight == 0, 0.0, weight * out.double()).sum(0)
    return merged, total


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize(
    "shape",
    [(4, 2, 5, 3, 20), (1, 1, 1, 1, 1), (7, 2, 9, 2, 40), (128, 1, 3, 2, 576), (40, 2, 20, 4, 130)],
)
@pytest.mark.parametrize("with_lse", [True, False])
def test_definition(shape, dtype, with_lse):
    gen = torch.Generator().manual_seed(shape[-1])
    out_partial, lse_partial = partials(*shape, gen)
    exact, exact_lse = definition(out_partial, lse_partial)
    out, lse = torch.empty(exact.shape, dtype=dtype), torch.empty(exact_lse.shape)
    with flash_attn.emulator() as gpu:
        combine(out_partial, lse_partial, out, lse if with_lse else None)
        assert list(gpu.counters) == ["flash_combine_sm80_fp32"]
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=10 * tolerance)
    if with_lse:
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


def test_strided():
    """Parts, out and lse in any order in memory but for the last dimension."""
    gen = torch.Generator().manual_seed(0)
    out_partial, lse_partial = partials(3, 2, 5, 4, 33, gen)
    results = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        inverse = [order.index(i) for i in range(4)]
        parts = out_partial.permute(*order, 4).contiguous().permute(*inverse, 4)
        lses = lse_partial.permute(order).contiguous().permute(inverse)
        out = torch.empty(4, 2, 5, 40)[..., :33].permute(1, 2, 0, 3)
        lse = torch.empty(4, 5, 2).permute(2, 1, 0)
        with flash_attn.emulator():
            combine(parts, lses, out, lse)
        results.append((out, lse))
    assert all(torch.equal(x, y) for x, y in zip(*results))


def test_nan_reaches_its_row_alone():
    out_partial, lse_partial = torch.randn(3, 1, 2, 2, 8), torch.randn(3, 1, 2, 2)
    lse_partial[1, 0, 0, 1] = NAN
    out, lse = torch.empty(1, 2, 2, 8), torch.empty(1, 2, 2)
    with flash_attn.emulator():
        combine(out_partial, lse_partial, out, lse)
    expected = torch.zeros(1, 2, 2, dtype=torch.bool)
    expected[0, 0, 1] = True
    assert torch.equal(out.isnan().all(-1), expected)
    assert torch.equal(out.isnan().any(-1), expected)
    assert torch.equal(lse.isnan(), expected)


@pytest.mark.parametrize("shape", [(2, 0, 3, 1, 8), (2, 1, 0, 1, 8)])
def test_nothing_to_merge(shape):
    out_partial, lse_partial = torch.zeros(shape), torch.zeros(shape[:-1])
    with flash_attn.emulator() as gpu:
        combine(out_partial, lse_partial, torch.empty(shape[1:]), torch.empty(shape[1:-1]))
        assert gpu.counters == {}


def test_reads_parts_once():
    """In whole sectors; the LSEs of a row, which lie apart, are read twice."""
    splits, rows = 8, 32
    out_partial, lse_partial = torch.randn(splits, 1, 4, 8, 128), torch.randn(splits, 1, 4, 8)
    out, lse = torch.empty(1, 4, 8, 128), torch.empty(1, 4, 8)
    with flash_attn.emulator() as gpu:
        combine(out_partial, lse_partial, out, lse)
        counted = gpu.counters["flash_combine_sm80_fp32"]["global"]
    assert counted["sectors"] - counted["ideal_sectors"] == 2 * rows * (splits - 1)
