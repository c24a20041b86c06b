"""flash_attn_with_kvcache of the CUDA kernels, on the emulated GPU."""

from __future__ import annotations

import pytest
import torch
from backends import BF16, EMULATOR, FP16, needs_emulator
from cache_cases import Case, Problem, as_bytes, check, sampled_cases
from decode_step import DecodeStep

import flash_attn
from flash_attn import flash_attn_with_kvcache

pytestmark = needs_emulator

ANGLES = ("rotary_cos", "rotary_sin")


@pytest.mark.parametrize("case", sampled_cases(60, seed=1, backend=EMULATOR), ids=str)
def test_feature_product(case):
    check(case, EMULATOR)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(400, seed=2, backend=EMULATOR), ids=str)
def test_feature_product_at_length(case):
    check(case, EMULATOR)


@pytest.mark.parametrize("rotary", ["interleaved", "halves"])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (20, 3)}])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_rotary(rotary, mask, dtype):
    options = {"dtype": dtype, "rotary": rotary, "seqlen_q": 7, "seqlen_new": 7, "capacity": 80}
    check(Case(**options, **mask, rotary_dim=64), EMULATOR)
    check(Case(**options, **mask, rotary_dim=16, leftpad=True, seed=1), EMULATOR)
    check(Case(**options, **mask, rotary_dim=34, page_size=16, seed=2), EMULATOR)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("seed", range(3))  # one for each mode of the emulator
def test_paged(page_size, seed):
    options = {"page_size": page_size, "capacity": 140, "seqlen_new": 5, "seed": seed}
    check(Case(dtype=FP16, seqlen_q=5, causal=True, leftpad=True, **options), EMULATOR)
    check(Case(dtype=BF16, window_size=(90, 0), heads=(8, 1), dims=(128, 72), **options), EMULATOR)


@pytest.mark.parametrize(
    ("more", "launches"),
    [
        ({}, {"decode": 1}),
        ({"seqlen_new": 1, "rotary": "halves"}, {"decode": 1}),
        ({"seqlen_new": 16, "seqlen_q": 8, "page_size": 3}, {"decode": 1}),
        ({"seqlen_new": 17}, {"append": 1, "decode": 1}),
        ({"seqlen_new": 1, "seqlen_q": 9}, {"append": 1, "decode": 1}),  # of 2 heads: two tiles
    ],
)
@pytest.mark.parametrize("dims", [(64, 64), (17, 17), (128, 64), (256, 256), (576, 512)])
def test_a_decode_step_is_one_launch(dims, more, launches):
    """New rows are appended by the launch that attends to them, if they and the queries are few."""
    problem = Problem(Case(dtype=FP16, dims=dims, heads=(4, 2), **more))
    with flash_attn.emulator() as gpu:
        problem.call()
    assert {name.split("_")[1]: x["launches"] for name, x in gpu.counters.items()} == launches


@pytest.mark.parametrize(("seqlen_new", "kernel"), [(33, "append"), (3, "decode")])
def test_append_moves_whole_sectors(seqlen_new, kernel):
    problem = Problem(Case(dtype=FP16, seqlen_new=seqlen_new, heads=(8, 8), dims=(128, 128)))
    with flash_attn.emulator() as gpu:
        problem.call()
    (counted,) = (x["global"] for name, x in gpu.counters.items() if kernel in name)
    assert counted["sectors"] == counted["ideal_sectors"] > 0


class Steps(Problem):
    """Lengths whose new rows are a sequence's first, lie in two units, or, of those that a window
    of two keys does not touch, before the first unit that is read; and that leave no room."""

    def random_lengths(self):
        return [0, 251, 125, self.case.capacity - self.case.seqlen_new]


@pytest.mark.parametrize("dims", [(64, 64), (17, 40), (128, 128), (256, 256), (576, 512)])
@pytest.mark.parametrize("page_size", [0, 5, 16])
@pytest.mark.parametrize(("num_splits", "window_size"), [(0, (-1, 0)), (1, (-1, -1)), (7, (1, 0))])
def test_append_and_attention_in_one_launch(dims, page_size, num_splits, window_size):
    """Bit for bit what they give in two: a launch that only appends, and one that finds the new
    rows in their places."""
    case = Case(
        dtype=BF16, batch=4, dims=dims, heads=(4, 1), capacity=720, seqlen_new=6, rotary="halves",
        num_splits=num_splits, window_size=window_size, page_size=page_size,
        leftpad=num_splits == 1, batch_idx=not page_size, seed=num_splits,
    )  # fmt: skip
    together, apart, only_appended = Steps(case), Steps(case), Steps(case)
    with flash_attn.emulator(mode="random", seed=page_size) as gpu:
        out, lse = together.call()
    assert [kernel["launches"] for kernel in gpu.counters.values()] == [1]
    with flash_attn.emulator():
        only_appended.q = only_appended.q[:, :0]
        only_appended.call()
        apart.k_buffer.copy_(only_appended.k_buffer)
        apart.v_buffer.copy_(only_appended.v_buffer)
        other, other_lse = apart.call()
    assert out.isfinite().all()
    assert torch.equal(out, other)
    assert torch.equal(lse, other_lse)
    for name in ("k_buffer", "v_buffer"):
        assert torch.equal(*(as_bytes(getattr(x, name)) for x in (together, only_appended)))


@pytest.mark.parametrize("rotary_dim", [0, 16])
def test_rows_that_are_in_place(rotary_dim):
    """New keys and values that the caller has written to their places in the cache."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 64, generator=gen).to(FP16) for n in (3, 40, 40))
    lengths = torch.tensor([20, 20], dtype=torch.int32)
    angles = torch.rand(40, rotary_dim // 2, generator=gen)
    options = {"cache_seqlens": lengths, "causal": True}
    if rotary_dim:
        options |= {"rotary_cos": angles.cos().to(FP16), "rotary_sin": angles.sin().to(FP16)}
    results = []
    for in_place in (False, True):
        caches = k.clone(), v.clone()
        new = [x[:, 20:23] for x in (caches if in_place else (k, v))]
        with flash_attn.emulator():
            out = flash_attn_with_kvcache(q, *caches, *new, **options)
        results.append((out, *caches))
    assert all(torch.equal(x, y) for x, y in zip(*results))


@pytest.mark.parametrize("values_within_keys", [True, False])
@pytest.mark.parametrize("page_size", [0, 4])
def test_caches_that_share_rows(values_within_keys, page_size):
    """The values of latent attention are a part of the keys, which rotation leaves alone."""
    gen = torch.Generator().manual_seed(0)

    def parts(x):
        whole, part = x, x[..., 16:] if values_within_keys else x[..., :48]
        return (whole, part) if values_within_keys else (part, whole)

    cache, new = (torch.randn(2, n, 1, 64, generator=gen).to(BF16) for n in (40, 4))
    options = {"cache_seqlens": 20, "causal": True}
    if values_within_keys:
        options |= {name: torch.rand(40, 8, generator=gen).to(BF16) for name in ANGLES}
    if page_size:
        cache = cache.view(-1, page_size, 1, 64)
        options["block_table"] = torch.randperm(20, generator=gen).int().view(2, 10)
    k_cache, v_cache = (x.clone() for x in parts(cache))
    q = torch.randn(2, 4, 3, k_cache.shape[-1], generator=gen).to(BF16)
    with flash_attn.emulator():
        apart = flash_attn_with_kvcache(q, k_cache, v_cache, *parts(new), **options)
        shared = flash_attn_with_kvcache(q, *parts(cache), *parts(new), **options)
    assert torch.equal(shared, apart)
    assert torch.equal(parts(cache)[0], k_cache)
    assert torch.equal(parts(cache)[1], v_cache)


def test_strided_inputs():
    """Caches laid out (b, hk, s, d), and new keys that are slices of one packed projection."""
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3, 8, 64, generator=gen).to(FP16)
    q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]
    dense = torch.randn(2, 2, 50, 2, 64, generator=gen).to(FP16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense]
    with flash_attn.emulator():
        expected = flash_attn_with_kvcache(q, *dense, k, v, cache_seqlens=30, causal=True)
        actual = flash_attn_with_kvcache(q, *strided, k, v, cache_seqlens=30, causal=True)
    assert torch.equal(actual, expected)
    assert all(torch.equal(x, y) for x, y in zip(strided, dense))


def test_appends_without_queries():
    k_cache, v_cache, k, v = (torch.randn(1, n, 1, 8).to(FP16) for n in (9, 9, 2, 2))
    with flash_attn.emulator():
        flash_attn_with_kvcache(k[:, :0], k_cache, v_cache, k, v, cache_seqlens=4)
    assert torch.equal(k_cache[:, 4:6], k)
    assert torch.equal(v_cache[:, 4:6], v)


def test_decode_step_of_the_tests_on_a_gpu():
    """The CPU's results, for its first lengths and others."""
    step, on_cpu = DecodeStep("cpu"), DecodeStep("cpu")
    for seed, lengths in enumerate([(100, 1500, 0, 700), (1599, 3, 900, 0)]):
        for each in (step, on_cpu):
            each.set(lengths, seed)
        with flash_attn.emulator(mode="late") as gpu:
            out = step()
        torch.testing.assert_close(out, on_cpu(), rtol=0, atol=1.6e-2)
        for x, y in zip(step.caches, on_cpu.caches):
            torch.testing.assert_close(x, y, rtol=0, atol=3.2e-2)  # of rotated rows
        (decode,) = (kernel for name, kernel in gpu.counters.items() if "decode" in name)
        assert decode["classes"]["atomic"] > 0  # several CTAs share a tile
