"""flash_attn_with_kvcache: what it appends, what it leaves alone, and the attention that it
returns."""

from __future__ import annotations

import pytest
import torch
from backends import BF16, FP16, FP32
from cache_cases import NAN, Case, Problem, as_bytes, check, sampled_cases
from reference import INF

from flash_attn import flash_attn_func, flash_attn_with_kvcache

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("case", sampled_cases(60, seed=1), ids=str)
def test_feature_product(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(800, seed=2), ids=str)
def test_feature_product_at_length(case):
    check(case)


@pytest.mark.parametrize("rotary", ["interleaved", "halves"])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (20, 3)}])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_rotary(rotary, mask, dtype):
    options = {"dtype": dtype, "rotary": rotary, "seqlen_q": 7, "seqlen_new": 7, **mask}
    check(Case(**options, rotary_dim=64))
    check(Case(**options, rotary_dim=16, leftpad=True))
    check(Case(**options, rotary_dim=32, page_size=16))


@pytest.mark.parametrize("rotary", ["interleaved", "halves"])
@pytest.mark.parametrize("rotary_dim", [2, 6, 10, 14, 18, 34])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_rotary_dim(rotary, rotary_dim, dtype):
    """Any even number up to headdim, also one that fills no vector."""
    options = {"dtype": dtype, "rotary": rotary, "rotary_dim": rotary_dim, "seqlen_new": 3}
    check(Case(**options, seqlen_q=3, causal=True))
    check(Case(**options, seqlen_q=1, page_size=16, capacity=200))
    check(Case(**options, seqlen_q=40, dims=(rotary_dim, 40), window_size=(20, 3)))
    check(Case(**options, seqlen_q=2, dims=(rotary_dim + 1, 8)))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("num_splits", [0, 1, 3, 8])
def test_paged(page_size, num_splits):
    options = {"page_size": page_size, "num_splits": num_splits, "seqlen_new": 5}
    check(Case(**options, seqlen_q=5, causal=True))
    check(Case(**options, seqlen_q=1, window_size=(90, 0), heads=(8, 1)))


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 8, 128])
@pytest.mark.parametrize("seqlen_q", [1, 9])
def test_splits(num_splits, seqlen_q):
    """Also with more splits than there are keys, and with empty caches."""
    options = {"num_splits": num_splits, "seqlen_q": seqlen_q}
    check(Case(**options, capacity=700, seed=1))
    check(Case(**options, capacity=20, seqlen_new=1, causal=True, sinks=True, seed=2))
    check(Case(**options, capacity=300, window_size=(10, 0), softcap=3.0, alibi="bh", seed=3))


def test_splits_agree():
    problem = Problem(Case(capacity=700, lengths="int", seqlen_q=5, causal=True))
    out, lse = problem.call(num_splits=1)
    for num_splits in (0, 2, 3, 8, 32):
        other_out, other_lse = problem.call(num_splits=num_splits)
        torch.testing.assert_close(other_out, out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other_lse, lse, rtol=1e-6, atol=1e-6)


def test_empty_cache():
    q = torch.randn(2, 3, 4, 40)
    cache = torch.full((2, 20, 2, 40), NAN)
    lengths = torch.zeros(2, dtype=torch.int32)
    for num_splits in (0, 1, 3):
        out, lse = flash_attn_with_kvcache(
            q,
            cache,
            cache,
            cache_seqlens=lengths,
            num_splits=num_splits,
            return_softmax_lse=True,
        )
        assert (out == 0).all()
        assert (lse == INF).all()


def test_returns_out_alone_by_default():
    q, cache = torch.randn(2, 1, 4, 40), torch.randn(2, 20, 2, 40)
    out = flash_attn_with_kvcache(q, cache, cache)
    assert torch.equal(out, flash_attn_with_kvcache(q, cache, cache, return_softmax_lse=True)[0])


def test_cache_seqlens_int_equals_tensor():
    problem = Problem(Case(lengths="int", seqlen_new=4, causal=True, seqlen_q=4))
    as_int = problem.call()
    lengths = torch.tensor(problem.lengths, dtype=torch.int32)
    as_tensor = problem.call(cache_seqlens=lengths)
    assert torch.equal(as_int[0], as_tensor[0])
    assert torch.equal(as_int[1], as_tensor[1])


def test_one_split_equals_flash_attn_func():
    """Bitwise: a cache is nothing but keys and values."""
    q = torch.randn(2, 40, 4, 64)
    k, v = torch.randn(2, 2, 300, 2, 64).unbind(0)
    expected = flash_attn_func(q, k, v, causal=True)
    actual = flash_attn_with_kvcache(q, k, v, causal=True, num_splits=1)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("page_size", [0, 16])
def test_token_by_token_equals_all_at_once(page_size):
    """Decoding with rotary embedding, as a model does it."""
    total, h, d = 40, 4, 32
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, total, h, d, generator=gen).unbind(0)
    angles = torch.rand(total, d // 2, generator=gen)
    table = None
    cache_shape = (1, total, h, d)
    if page_size:
        table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
        cache_shape = (3, page_size, h, d)
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "block_table": table}
    if page_size:
        pad = torch.zeros(3 * page_size - total, d // 2)
        rotary["rotary_cos"] = torch.cat([angles.cos(), pad])
        rotary["rotary_sin"] = torch.cat([angles.sin(), pad])
    caches = [torch.full(cache_shape, NAN) for _ in range(4)]
    together = flash_attn_with_kvcache(q, *caches[:2], k, v, cache_seqlens=0, causal=True, **rotary)
    for t in range(total):
        now = slice(t, t + 1)
        out = flash_attn_with_kvcache(
            q[:, now], *caches[2:], k[:, now], v[:, now], cache_seqlens=t, causal=True, **rotary
        )
        torch.testing.assert_close(out, together[:, now], rtol=1e-5, atol=1e-5)
    assert torch.equal(as_bytes(caches[0]), as_bytes(caches[2]))
    assert torch.equal(as_bytes(caches[1]), as_bytes(caches[3]))


def test_strided_inputs():
    """Caches laid out (b, hk, s, d), and new keys that are slices of one packed projection."""
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3, 8, 64, generator=gen)
    q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]
    dense = torch.randn(2, 2, 50, 2, 64, generator=gen)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense]
    dense = [x.clone() for x in dense]
    arguments = {"cache_seqlens": 30, "causal": True}
    expected = flash_attn_with_kvcache(
        q.contiguous(), *dense, k.contiguous(), v.contiguous(), **arguments
    )
    actual = flash_attn_with_kvcache(q, *strided, k, v, **arguments)
    assert torch.equal(actual, expected)
    assert all(torch.equal(x, y) for x, y in zip(strided, dense))
