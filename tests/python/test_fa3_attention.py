"""FlashAttention-3's functions: results and gradients against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import BF16, FP16, FP32
from fa3_cases import Case, Problem, check
from reference import INF

from flash_attn import flash_attn_func as flash_attn_2_func
from flash_attn import v3

EQUAL = ((60, 90),) * 2
CHUNKS = [1, 7, 32, 64, 1000]


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": True},
        {"window_size": (9, 3), "softcap": 2.0},
        {"causal": True, "sinks": True, "dtype": BF16},
        {"causal": True, "dtype": BF16, "dims": (40, 24)},
        {"window_size": (-1, 5), "dtype": FP16},
    ],
    ids=str,
)
def test_masks(fields, is_dense):
    lengths = {"lengths": EQUAL} if is_dense else {}
    check(Case(**lengths, **fields, is_dense=is_dense))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("is_dense", [False, True])
def test_chunks(chunk, causal, is_dense):
    """Queries before the first key, and sequences that end within a chunk, among them."""
    lengths = EQUAL if is_dense else ((64, 64), (33, 90), (90, 33), (0, 20), (20, 0), (1, 70))
    check(Case(lengths=lengths, attention_chunk=chunk, causal=causal, is_dense=is_dense))


@pytest.mark.parametrize(
    "fields",
    [
        {"window_size": (10, 0)},
        {"window_size": (5, 9), "softcap": 3.0},
        {"sinks": True, "causal": True},
        {"used": True, "causal": True},
        {"qv": True},
        {"dtype": BF16, "causal": True, "dims": (64, 64)},
    ],
    ids=str,
)
def test_chunks_with_other_features(fields):
    check(Case(attention_chunk=32, **fields))


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_used_rows(is_dense, causal):
    lengths = ((40, 60),) * 4 if is_dense else ((40, 60), (60, 40), (7, 9), (30, 31))
    check(Case(lengths=lengths, used=True, causal=causal, is_dense=is_dense))
    check(Case(lengths=lengths, used=True, causal=causal, is_dense=is_dense, dtype=BF16))


@pytest.mark.parametrize("fields", [{}, {"is_dense": True, "lengths": EQUAL}, {"dtype": BF16}])
def test_queries_of_values(fields):
    check(Case(qv=True, causal=True, dims=(16, 48), **fields))


def test_neighbouring_keys_and_values_are_read_where_they_are(monkeypatch):
    """k and v of one latent cache: no copy, on either side, and the same result."""
    latent = torch.randn(2, 30, 1, 40)
    rows = latent.squeeze(2)
    q, qv = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4, 32)
    cat, joined = torch.cat, []
    for k, v in (
        (latent[..., 32:], latent[..., :32]),
        (latent[..., :8], latent[..., 8:]),
        (rows[..., 32:].unsqueeze(2), rows[..., :32].unsqueeze(2)),
    ):
        together = v3.flash_attn_func(q, k, v, qv=qv, causal=True)
        apart = v3.flash_attn_func(q, k.clone(), v.clone(), qv=qv, causal=True)
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
        joined.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cat", lambda x, dim: joined.append(x) or cat(x, dim))
            v3.flash_attn_func(q, k, v, qv=qv)
        assert len(joined) == 1  # the queries alone
        assert {id(x) for x in joined[0]} == {id(q), id(qv)}


def test_schedules_change_nothing():
    problem = Problem(Case(causal=True, attention_chunk=32))
    expected = problem.call()
    for num_splits, pack_gqa, sm_margin, deterministic in itertools.product(
        (0, 1), (None, True), (0, 4), (False, True)
    ):
        schedule = {
            "num_splits": num_splits,
            "pack_gqa": pack_gqa,
            "sm_margin": sm_margin,
            "deterministic": deterministic,
        }
        actual = problem.call(**schedule)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_marks_of_rows_without_keys():
    """-inf where the other functions of this package have +inf; both have +inf without any key."""
    q, k = torch.randn(1, 8, 2, 16), torch.randn(1, 5, 2, 16)
    out, lse = v3.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    _, other, _ = flash_attn_2_func(q, k, k, causal=True, return_attn_probs=True)
    assert (lse[..., :3] == -INF).all()
    assert (other[..., :3] == INF).all()
    assert torch.equal(lse[..., 3:], other[..., 3:])
    assert not out[:, :3].any()
    nothing = torch.empty(1, 0, 2, 16)
    _, lse = v3.flash_attn_func(q, nothing, nothing, return_attn_probs=True)
    assert (lse == INF).all()
    cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
    sequences = (cu_seqlens, torch.zeros_like(cu_seqlens), 8, 0)
    _, lse = v3.flash_attn_varlen_func(
        q[0], nothing[0], nothing[0], *sequences, return_attn_probs=True
    )
    assert (lse == INF).all()


def test_an_infinite_score_is_no_empty_row():
    q, k = torch.full((1, 1, 1, 8), 1e30), torch.full((1, 3, 1, 8), 1e30)
    _, lse = v3.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert not (lse == -INF).any()


def test_results_by_themselves():
    q = torch.randn(1, 4, 2, 16)
    out = v3.flash_attn_func(q, q, q)
    assert isinstance(out, torch.Tensor)
    pair = v3.flash_attn_func(q, q, q, return_attn_probs=True)
    assert len(pair) == 2
    assert torch.equal(pair[0], out)


@pytest.mark.parametrize("heads", [None, (4, 2)])
def test_packed_projections(heads):
    nheads = 4
    qkv = torch.randn(2, 9, *((3, nheads) if heads is None else (8,)), 16, requires_grad=True)
    if heads is None:
        q, k, v = qkv.unbind(2)
    else:
        q, k, v = qkv.split((4, 2, 2), dim=2)
    options = {"causal": True, "window_size": (4, 0), "softcap": 2.0, "attention_chunk": 4}
    expected = v3.flash_attn_func(q, k, v, **options)
    num_heads_q = None if heads is None else heads[0]
    actual = v3.flash_attn_qkvpacked_func(qkv, **options, num_heads_q=num_heads_q)
    assert torch.equal(actual, expected)
    dout = torch.randn_like(actual)
    (gradient,) = torch.autograd.grad(actual, qkv, dout)
    (expected_gradient,) = torch.autograd.grad(expected, qkv, dout)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_merging_parts(dtype):
    """flash_attn_combine of keys in three parts, one of them empty, equals all keys at once."""
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 30, 2, 16), torch.randn(2, 30, 2, 16)
    whole, lse = v3.flash_attn_func(q, k, v, return_attn_probs=True)
    parts = [
        v3.flash_attn_func(q, k[:, s], v[:, s], return_attn_probs=True)
        for s in (slice(0, 11), slice(11, 30))
    ]
    outs = torch.stack([*(out for out, _ in parts), torch.full_like(whole, 5.0)])
    lses = torch.stack([*(x.transpose(1, 2) for _, x in parts), torch.full((2, 9, 4), -INF)])
    out, merged = v3.flash_attn_combine(outs, lses, out_dtype=dtype)
    assert out.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == FP32 else {"rtol": 8e-3, "atol": 8e-3}
    torch.testing.assert_close(out.float(), whole, **tolerance)
    torch.testing.assert_close(merged, lse.transpose(1, 2), rtol=1e-6, atol=1e-6)
    given = torch.empty_like(out)
    returned, _ = v3.flash_attn_combine(outs, lses, out=given)
    assert returned is given
    assert torch.equal(given, out)
    none, empty = v3.flash_attn_combine(outs, torch.full_like(lses, -INF))
    assert not none.any()
    assert (empty == -INF).all()
