"""The forward in fp8 (e4m3) of compute capability 9.0, on the emulated H100."""

from __future__ import annotations

import pytest
import torch
from backends import HOPPER, needs_emulator
from hopper_fp8_cases import FP8, Problem, assert_close, attention, cache, dense, packed
from reference import visible
from test_cuda_budgets import MASKS
from test_cuda_hopper_budgets import visible_blocks
from test_varlen import cumulative

from flash_attn.v3 import flash_attn_with_kvcache

pytestmark = needs_emulator

NAN = torch.tensor(0x7F, dtype=torch.uint8).view(FP8)
# Head dims, and those of the kernel that takes them.
HEADDIMS = {
    (64, 64): "64",
    (128, 128): "128",
    (192, 128): "192x128",
    (256, 256): "256",
    (96, 96): "128",
    (32, 48): "64",
    (192, 192): "256",
}
BLOCKS = {
    "heads": (False, False, False),
    "blocks": (True, True, True),
    "blocks of k": (False, True, False),
    "blocks of v": (False, False, True),
}
WINDOWS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (90, 30)},
    "left": {"window_size": (100, 0)},
}


def on_hopper(call, *args, mode="eager", seed=0, checks="all", **options):
    """A call's result, and the kernel that it took."""
    with HOPPER.emulator(mode=mode, seed=seed, checks=checks) as gpu:
        result = call(*args, **options)
    (kernel,) = gpu.counters
    assert kernel.startswith("flash_fwd_sm90_e4m3_")
    return result


def solve(problem, *, call=dense, **options):
    return on_hopper(call, *problem.numbers, problem.factors, **options)


@pytest.mark.parametrize("mask", WINDOWS)
@pytest.mark.parametrize("dims", HEADDIMS)
def test_error_is_that_of_quantising(dims, mask):
    problem = Problem(dims=dims, batch=2, seqlens=(150, 330))
    with HOPPER.emulator(mode="random", seed=1) as gpu:
        result = dense(*problem.numbers, problem.factors, **WINDOWS[mask])
    assert list(gpu.counters) == [f"flash_fwd_sm90_e4m3_d{HEADDIMS[dims]}_masked"]
    assert_close(result, problem.values, problem.exact, **WINDOWS[mask])


@pytest.mark.parametrize("by_blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 3)])
def test_factors(heads, by_blocks):
    """Of heads, and of blocks of 128 rows, that differ much."""
    problem = Problem(batch=2, heads=heads, seqlens=(200, 400), dims=(64, 64), by_blocks=by_blocks)
    q, k, v = problem.exact
    scaled = [x * 4.0 ** torch.arange(x.shape[2]).view(1, 1, -1, 1) / 4 for x in (k, v)]
    steps = 2.0 ** (torch.arange(400) // 128).view(1, -1, 1, 1)
    problem.quantise((q, scaled[0] / steps, scaled[1] * steps), by_blocks)
    assert_close(solve(problem, causal=True), problem.values, causal=True)


def test_factors_with_strides_of_zero_and_none():
    problem = Problem(batch=2, heads=(4, 2))
    one = torch.tensor([0.25])
    values = [x.double() * 0.25 for x in problem.numbers]
    values[1] = problem.numbers[1].double()
    shared = one.expand(2, 2)
    assert shared.stride() == (0, 0)
    result = on_hopper(dense, *problem.numbers, (shared, None, shared), softmax_scale=1e-3)
    assert_close(result, values, softmax_scale=1e-3)


@pytest.mark.parametrize("sign", ["scale", "factor"])
def test_negative_scales(sign):
    problem = Problem(dims=(64, 64))
    q, k, v = problem.factors
    factors = (-q, k, v) if sign == "factor" else (q, k, v)
    scale = -0.1 if sign == "scale" else 0.1
    result = on_hopper(dense, *problem.numbers, factors, softmax_scale=scale, causal=True)
    assert_close(result, problem.values, softmax_scale=-0.1, causal=True)


@pytest.mark.parametrize("dims", [(64, 64), (256, 256)])
def test_rows_without_keys(dims):
    """Above the first key's diagonal: 0, and a softmax_lse of +inf."""
    problem = Problem(dims=dims, seqlens=(300, 100))
    out, lse = solve(problem, causal=True, mode="late")
    assert (out[:, :200] == 0).all()
    assert (lse[:, :, :200] == float("inf")).all()
    assert_close((out, lse), problem.values, problem.exact, causal=True)


@pytest.mark.parametrize("dims", [(64, 64), (256, 256)])
def test_calls_without_keys_or_queries(dims):
    problem = Problem(dims=dims, seqlens=(70, 40))
    q, k, v = problem.numbers
    out, lse = on_hopper(dense, q, k[:, :0], v[:, :0], problem.factors)
    assert (out == 0).all() and (lse == float("inf")).all()
    for some in (slice(0), slice(None)):
        queries = q[:, :0] if some == slice(None) else q[some]
        with HOPPER.emulator() as gpu:
            out, lse = dense(queries, k[some], v[some], [x[some] for x in problem.factors])
        assert out.numel() == lse.numel() == 0
        assert gpu.counters == {}


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_sinks(dims):
    problem = Problem(dims=dims, heads=(4, 2))
    sinks = torch.tensor([-2.0, 0.0, 3.0, 40.0])
    assert_close(solve(problem, s_aux=sinks), problem.values, s_aux=sinks)


@pytest.mark.parametrize("by_blocks", ["heads", "blocks"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_modified_scores(dims, by_blocks):
    problem = Problem(dims=dims, heads=(2, 1), seqlens=(150, 330), by_blocks=BLOCKS[by_blocks])
    slopes = torch.tensor([0.02, 0.3])
    modifiers = [{"softcap": 2.0, "causal": True}, {"softcap": 100.0},
                 {"alibi_slopes": slopes, "window_size": (200, 40)},
                 {"alibi_slopes": slopes, "softcap": 5.0, "softmax_scale": -0.3}]  # fmt: skip
    for seed, options in enumerate(modifiers):
        with HOPPER.emulator(mode="random", seed=seed) as gpu:
            result = dense(*problem.numbers, problem.factors, **options)
        (kernel,) = gpu.counters
        assert kernel.startswith("flash_fwd_sm90_e4m3_") and kernel.endswith("_modified")
        assert_close(result, problem.values, **options)


@pytest.mark.parametrize("spread", [30.0, 400.0])
def test_scores_far_from_0_and_from_each_other(spread):
    problem = Problem(dims=(64, 64), seqlens=(130, 300), spread=spread)
    out, lse = solve(problem, causal=True)
    expected, expected_lse = attention(*problem.values, causal=True)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-5)
    # Few keys have weight: those that share a row's largest are rounded alike.
    assert (out.double() - expected).abs().max() <= 2**-4 * problem.values[2].abs().max()


SCHEDULES = [("late", 0), ("random", 1), ("random", 2)]


@pytest.mark.parametrize("mask", WINDOWS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_schedules_agree_bitwise(dims, mask):
    problem = Problem(dims=dims, seqlens=(200, 700), by_blocks=(True, True, True))
    out, lse = solve(problem, **WINDOWS[mask])
    for mode, seed in SCHEDULES:
        others = solve(problem, mode=mode, seed=seed, **WINDOWS[mask])
        assert torch.equal(out, others[0]) and torch.equal(lse, others[1])


def test_more_tiles_than_multiprocessors():
    """By a counter; each head as if it were alone."""
    problem = Problem(batch=2, heads=(80, 80), seqlens=(20, 40), dims=(64, 64))
    out, lse = solve(problem, causal=True, mode="late")
    for batch, head in ((0, 0), (1, 31), (1, 79)):
        one = (slice(batch, batch + 1), slice(None), slice(head, head + 1))
        numbers = [x[one] for x in problem.numbers]
        factors = [x[batch : batch + 1, head : head + 1] for x in problem.factors]
        alone = on_hopper(dense, *numbers, factors, causal=True, mode="random", seed=head)
        assert torch.equal(out[one], alone[0])
        assert torch.equal(lse[batch, head], alone[1][0, 0])


# ------------------------------------------------------------------------------------------------
# Sequences of different lengths, whose neighbours are NaN


LENGTHS_Q, LENGTHS_K = [70, 0, 150, 33, 9], [200, 30, 140, 0, 300]


@pytest.mark.parametrize("mask", WINDOWS)
@pytest.mark.parametrize("by_blocks", ["heads", "blocks"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_packed(dims, by_blocks, mask):
    problems = [
        Problem(seed, seqlens=lengths, heads=(2, 1), dims=dims, by_blocks=BLOCKS[by_blocks])
        for seed, lengths in enumerate(zip(LENGTHS_Q, LENGTHS_K))
    ]
    numbers = [torch.cat([p.numbers[i][0].view(torch.uint8) for p in problems]).view(FP8)
               for i in range(3)]  # fmt: skip
    factors = []
    for i in range(3):
        own = [p.factors[i][0] for p in problems]
        if by_blocks == "heads":
            factors.append(torch.stack(own))
            continue
        longest = max(x.shape[-1] for x in own)
        own = [torch.nn.functional.pad(x, (0, longest - x.shape[-1]), value=NAN.float().item())
               for x in own]  # fmt: skip
        factors.append(torch.stack(own))
    ends = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    out, lse = on_hopper(packed, *numbers, *ends, 150, 300, factors, mode="random", seed=5,
                         **WINDOWS[mask])  # fmt: skip
    for i, problem in enumerate(problems):
        rows = slice(int(ends[0][i]), int(ends[0][i + 1]))
        if LENGTHS_Q[i] == 0:
            continue
        if LENGTHS_K[i] == 0:
            assert (out[rows] == 0).all() and (lse[:, rows] == float("inf")).all()
            continue
        assert_close((out[None, rows], lse[None, :, rows]), problem.values, **WINDOWS[mask])


@pytest.mark.parametrize("mask", WINDOWS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_neighbours_of_a_packed_sequence(dims, mask):
    """Of NaN: they reach none of its rows."""
    problem = Problem(seqlens=(223, 250), dims=dims)
    q, k, v = (x[0].view(torch.uint8).clone() for x in problem.numbers)
    lengths = cumulative([40, 150, 33]), cumulative([50, 140, 60]), 150, 140
    factors = [x.expand(3, -1) for x in problem.factors]
    options = {**WINDOWS[mask], "mode": "late"}
    clean = on_hopper(packed, *(x.view(FP8) for x in (q, k, v)), *lengths, factors, **options)
    for x, (start, end) in ((q, (40, 190)), (k, (50, 190)), (v, (50, 190))):
        x[:start] = x[end:] = 0x7F
    out, lse = on_hopper(packed, *(x.view(FP8) for x in (q, k, v)), *lengths, factors, **options)
    assert torch.equal(out[40:190], clean[0][40:190])
    assert torch.equal(lse[:, 40:190], clean[1][:, 40:190])


@pytest.mark.parametrize("page_size", [0, 8, 48, 64, 256])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_cache(dims, page_size):
    """Keys behind a sequence's last, rows and pages that are not its own are NaN. Few queries take
    the same kernel."""
    lengths = [5, 300, 130]
    for rows in (3, 140):
        problem = Problem(batch=3, seqlens=(rows, 320), dims=dims, heads=(4, 2))
        q, *kv = problem.numbers
        options = {"causal": True, "cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
        place = torch.tensor([3, 0, 2], dtype=torch.int32)
        size = page_size or 320
        count = -(-320 // size)  # pages of a sequence
        stores = [torch.full((4 * count + 2, size, 2, x.shape[-1]), 0x7F, dtype=torch.uint8)
                  for x in kv]  # fmt: skip
        gen = torch.Generator().manual_seed(page_size)
        pages = torch.randperm(4 * count + 2, generator=gen)[: 3 * count].view(3, count)
        if not page_size:
            pages = place.long()[:, None]
        for store, x in zip(stores, kv):
            for i, length in enumerate(lengths):
                used = torch.full((count * size, *x.shape[2:]), 0x7F, dtype=torch.uint8)
                used[:length] = x[i, :length].view(torch.uint8)
                store[pages[i]] = used.view(count, size, *x.shape[2:])
        if page_size:
            options["block_table"] = pages.to(torch.int32)
        else:
            options["cache_batch_idx"] = place
        out, lse = on_hopper(cache, q, *(x.view(FP8) for x in stores), problem.factors,
                             mode="random", seed=2, **options)  # fmt: skip
        for i, length in enumerate(lengths):
            one = slice(i, i + 1)
            q_i, k_i, v_i = (x[one] for x in problem.values)
            values = q_i, k_i[:, :length], v_i[:, :length]
            assert_close((out[one], lse[one]), values, causal=True)


def test_packed_queries_with_keys_to_append():
    """New keys are written by torch operations, then the kernel attends over the pages."""
    starts, lengths = cumulative([5, 3]), torch.tensor([12, 130], dtype=torch.int32)
    gen = torch.Generator().manual_seed(0)
    q, *new = (torch.randn(8, heads, 64, generator=gen).to(FP8) for heads in (4, 2, 2))
    pages = torch.randn(2, 20, 16, 2, 64, generator=gen).to(FP8)
    table = torch.randperm(20, generator=gen).view(2, 10).to(torch.int32)

    def call(k_cache, v_cache):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, *new, cache_seqlens=lengths, page_table=table, causal=True,
            cu_seqlens_q=starts, cu_seqlens_k_new=starts, max_seqlen_q=5,
        ), k_cache, v_cache  # fmt: skip

    here, there = call(*pages.clone()), on_hopper(call, *pages.clone())
    torch.testing.assert_close(there[0], here[0], rtol=0.05, atol=0.05)
    for x, y in zip(here[1:], there[1:]):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_left_padding():
    problem = Problem(batch=2, seqlens=(140, 300), dims=(64, 64))
    pads = [7, 150]
    out, lse = on_hopper(cache, *problem.numbers, problem.factors,
                         leftpad=torch.tensor(pads, dtype=torch.int32),
                         cache_seqlens=torch.tensor([300, 260], dtype=torch.int32))  # fmt: skip
    for i, end in enumerate((300, 260)):
        one = slice(i, i + 1)
        q, k, v = (x[one] for x in problem.values)
        assert_close((out[one], lse[one]), (q, k[:, pads[i] : end], v[:, pads[i] : end]))


BAD_KEYS = [200, 279]


@pytest.mark.parametrize("mask", ["causal", "window"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_nan_in_v_reaches_the_rows_that_see_it(dims, mask):
    problem = Problem(dims=dims, seqlens=(150, 280), by_blocks=BLOCKS["blocks of v"])
    q, k, v = problem.numbers
    v = v.view(torch.uint8).clone()
    v[0, BAD_KEYS, 0, 5] = 0xFF
    out, lse = on_hopper(dense, q, k, v.view(FP8), problem.factors, mode="random", seed=3,
                         **WINDOWS[mask])  # fmt: skip
    q, k, v = problem.values
    seen = visible(150, 280, **WINDOWS[mask])
    reached = seen[:, BAD_KEYS].any(1)
    assert 0 < reached.sum() < 150
    assert torch.equal(out[0, :, :, 5].isnan(), reached[:, None].expand(150, 2))
    v = v.nan_to_num()
    clean, clean_lse = attention(q, k, v, **WINDOWS[mask])
    torch.testing.assert_close(lse.double(), clean_lse, atol=2e-4, rtol=1e-5)
    rest = out.double().clone()
    rest[0, reached, :, 5] = clean[0, reached, :, 5]
    assert_close((rest, lse), (q, k, v), **WINDOWS[mask])


@pytest.mark.parametrize("which", ["q", "k"])
def test_nan_in_q_and_k(which):
    problem = Problem(dims=(64, 64), seqlens=(100, 200))
    numbers = {n: x.view(torch.uint8).clone() for n, x in zip("qkv", problem.numbers)}
    numbers[which][0, 60, 0, 3] = 0x7F
    out, lse = on_hopper(dense, *(x.view(FP8) for x in numbers.values()), problem.factors,
                         causal=True)  # fmt: skip
    head = torch.tensor([True, which == "k"])
    rows = torch.arange(100) == 60 if which == "q" else visible(100, 200, causal=True)[:, 60]
    wanted = (rows[:, None] & head).expand(100, 2)
    assert torch.equal(out[0].isnan().all(-1), wanted)
    assert torch.equal(out[0].isnan().any(-1), wanted)
    assert torch.equal(lse[0].isnan(), wanted.T)


@pytest.mark.parametrize("page_size", [0, 16], ids=["contiguous", "pages"])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (48, 80)], ids=str)
def test_new_keys_are_appended(dims, page_size):
    """The cache then holds them, and results are bitwise those of a call that finds them there."""
    problem = Problem(dims=dims, batch=2, heads=(4, 2), seqlens=(5, 208))
    q, *keys = problem.numbers
    lengths, count = torch.tensor([150, 90], dtype=torch.int32), 33

    def caches(ends):
        """The first rows of each sequence, NaN behind them, in chunks of 16 bytes."""
        made = []
        for x in keys:
            rows = x.new_full((*x.shape[:-1], -(-x.shape[-1] // 16) * 16), float("nan"))
            for i, end in enumerate(ends):
                rows[i, :end, :, : x.shape[-1]].copy_(x[i, :end])
            rows = rows[..., : x.shape[-1]]
            made.append(rows.unflatten(1, (-1, page_size)).flatten(0, 1) if page_size else rows)
        return made

    options = {"causal": True, "return_softmax_lse": True}
    if page_size:
        options["page_table"] = torch.arange(26, dtype=torch.int32).view(2, 13)
    with HOPPER.emulator(mode="late") as gpu:
        found = caches(lengths + count)
        expected = flash_attn_with_kvcache(q, *found, cache_seqlens=lengths + count, **options)
        assert len(gpu.counters) == 1
        written = caches(lengths)
        rows = [torch.stack([x[i, n : n + count] for i, n in enumerate(lengths)]) for x in keys]
        actual = flash_attn_with_kvcache(q, *written, *rows, cache_seqlens=lengths, **options)
        assert len(gpu.counters) == 2
    for x, y in zip(actual[:2], expected[:2]):
        assert x.isfinite().all()
        assert torch.equal(x, y)
    for x, y in zip(written, found):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


# ------------------------------------------------------------------------------------------------
# What is not there


def refused(call, *args, **options):
    with HOPPER.emulator(), pytest.raises(RuntimeError) as info:
        call(*args, **options)
    return str(info.value)


def test_what_is_refused_by_name():
    problem = Problem(dims=(64, 64), seqlens=(64, 128))
    q, k, v = problem.numbers
    bias = torch.zeros(1, 1, 64, 128)
    assert "attention bias" in refused(dense, q, k, v, attn_bias=bias)
    assert "not bf16" in refused(dense, q, k, v, out_dtype=torch.float16)
    assert "fp8 beside wider queries" in refused(dense, q.to(torch.bfloat16), k, v)
    both = (x.expand(-1, -1, 2, -1) for x in (k, v))
    assert "multiples of 16 bytes" in refused(dense, q, *both)
    pages = [x.view(-1, 4, 1, 64) for x in (k, v)]
    table = torch.arange(32, dtype=torch.int32)[None]
    assert "pages" in refused(cache, q, *pages, block_table=table)


# ------------------------------------------------------------------------------------------------
# Costs

QUERIES, KEYS, ROWS = 128, 128, 64  # of a tile, of a block, of a warpgroup
PV_COLUMNS = {(256, 256): 64}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_costs(dims, mask):
    """As many wgmma and boxes of TMA as blocks with a visible score need; no bank conflicts, the
    transposition of V included; no sector of global memory is moved in vain."""
    seqlens = 200, 328
    problem = Problem(dims=dims, seqlens=seqlens)
    with HOPPER.emulator(checks="none") as gpu:
        dense(*problem.numbers, problem.factors, **MASKS[mask])
    ((name, counters),) = gpu.counters.items()
    assert counters["shared"]["wavefronts"] == counters["shared"]["ideal_wavefronts"] > 0
    blocks = 2 * visible_blocks(seqlens, mask, ROWS, KEYS)
    columns = PV_COLUMNS.get(dims, dims[1])
    expected = {}
    for n, products in ((KEYS, dims[0] // 32), (columns, KEYS // 32 * dims[1] // columns)):
        shape = f"wgmma.m64n{n}k32.e4m3"
        expected[shape] = expected.get(shape, 0) + 4 * blocks * products  # of four warps
    assert counters["tensor"] == expected
    lines = gpu.line_counters[name]
    loads = sum(line["executed"] for line in lines
                if "cp.async.bulk.tensor.4d.shared::cluster" in line["text"])  # fmt: skip
    q, v = (d // 128 if d % 128 == 0 else d // 64 for d in dims)
    tiles = visible_blocks(seqlens, mask, QUERIES, seqlens[1])
    assert loads == 2 * (tiles * q + visible_blocks(seqlens, mask, QUERIES, KEYS) * (q + v))
