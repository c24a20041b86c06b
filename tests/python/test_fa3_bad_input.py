"""What FlashAttention-3's functions refuse, and that they do it before anything is written."""

from __future__ import annotations

import re

import pytest
import torch
from reference import INF

from flash_attn import v3

INT32 = torch.int32
Q, K = torch.randn(2, 6, 4, 16), torch.randn(2, 8, 2, 16)
OTHER_FP8 = getattr(torch, "float8_e5m2", None)
CU_Q, CU_K = torch.tensor([0, 6, 12], dtype=INT32), torch.tensor([0, 8, 16], dtype=INT32)
LENGTHS = torch.tensor([3, 5], dtype=INT32)


def dense(**more):
    return v3.flash_attn_func(Q, K, K, **more)


def varlen(**more):
    given = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 6, "max_seqlen_k": 8}
    return v3.flash_attn_varlen_func(
        Q.flatten(0, 1), K.flatten(0, 1), K.flatten(0, 1), **{**given, **more}
    )


def cache(**more):
    given = {"q": Q, "k_cache": K, "v_cache": K, "cache_seqlens": LENGTHS}
    return v3.flash_attn_with_kvcache(**{**given, **more})


def packed_cache(**more):
    return cache(
        **{"q": Q.flatten(0, 1), "cu_seqlens_q": CU_Q, "max_seqlen_q": 6, **more},
    )


def ints(*values):
    return torch.tensor(values, dtype=INT32)


NEW = {"k": torch.zeros(3, 2, 16), "v": torch.zeros(3, 2, 16), "cu_seqlens_k_new": ints(0, 1, 3)}
TWO = torch.full((2, 2), 2.0)
METADATA = {
    "batch_size": 2,
    "max_seqlen_q": 1,
    "max_seqlen_k": 8,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "headdim": 64,
    "cache_seqlens": LENGTHS,
}
REFUSED = [
    (dense, {"q_descale": TWO}, NotImplementedError, "q_descale belongs to fp8"),
    (cache, {"v_descale": TWO}, NotImplementedError, "v_descale belongs to fp8"),
    (varlen, {"k_descale": TWO.double()}, ValueError, "k_descale must be fp32"),
    (dense, {"k_descale": 1.0}, TypeError, "k_descale must be a torch.Tensor"),
    (dense, {"attention_chunk": -1}, ValueError, "attention_chunk must not be negative"),
    (dense, {"attention_chunk": 1.5}, TypeError, "attention_chunk must be an int"),
    (dense, {"num_splits": 257}, ValueError, "num_splits must be from 0 to 256, got 257"),
    (dense, {"sm_margin": -2}, ValueError, "sm_margin must not be negative, got -2"),
    (cache, {"scheduler_metadata": torch.zeros(3)}, ValueError, "scheduler_metadata must be int32"),
    (cache, {"scheduler_metadata": 3}, TypeError, "scheduler_metadata must be a torch.Tensor"),
    (dense, {"qv": torch.zeros(2, 6, 4, 8)}, ValueError, "qv must have shape (2, 6, 4, 16)"),
    (dense, {"qv": Q.double()}, ValueError, "qv must have the dtype and device of q"),
    (varlen, {"max_seqlen_q": None}, ValueError, "max_seqlen_q must be provided"),
    (varlen, {"cu_seqlens_q": CU_Q.long()}, ValueError, "cu_seqlens_q must be int32"),
    (varlen, {"cu_seqlens_k": CU_K[:2]}, RuntimeError, "cu_seqlens_k"),
    (varlen, {"seqused_q": ints(7, 1)}, ValueError, "seqused_q[0] = 7 is outside"),
    (varlen, {"seqused_k": ints(1, -1)}, ValueError, "seqused_k[1] = -1 is outside"),
    (varlen, {"seqused_k": ints(1, 2, 3)}, ValueError, "seqused_k must be int32 with one"),
    (varlen, {"cu_seqlens_q": None}, ValueError, "q must have shape (batch, seqlen, nheads"),
    (cache, {"k": torch.zeros(2, 1, 2, 16)}, RuntimeError, "value must also be passed in"),
    (cache, {"cache_seqlens": None, **NEW}, ValueError, "cache_seqlens must be given"),
    (packed_cache, {"max_seqlen_q": None}, ValueError, "max_seqlen_q must be provided"),
    (packed_cache, {"q": Q}, ValueError, "q must have shape (total_q, nheads, headdim)"),
    (packed_cache, {"cache_seqlens": ints(9, 1)}, ValueError, "cache_seqlens[0] = 9"),
    (packed_cache, {"cache_batch_idx": ints(0, 2)}, ValueError, "from 0 to 1, got [0, 2]"),
    (packed_cache, {"page_table": ints(0, 7).view(2, 1)}, RuntimeError, "page_table[1][0] = 7"),
    (cache, {"page_table": ints(0, 7).view(2, 1)}, RuntimeError, "page_table[1][0] = 7"),
    (packed_cache, {"cache_leftpad": ints(0, 6)}, ValueError, "cache_leftpad[1] = 6 is outside"),
    (packed_cache, {"max_seqlen_q": 5}, ValueError, "max_seqlen_q = 5 is less than the 6 rows"),
    (
        varlen,
        {"max_seqlen_q": 5, "attention_chunk": 4},
        ValueError,
        "max_seqlen_q = 5 is less than the 6 rows of sequence 0",
    ),
    (
        varlen,
        {"cu_seqlens_k": ints(0, 8, 7), "attention_chunk": 4},
        ValueError,
        "cu_seqlens_k must not decrease: entry 2 is 7 after 8",
    ),
    (
        varlen,
        {"cu_seqlens_k": ints(0, 9, 18), "seqused_k": ints(1, 1)},
        ValueError,
        "less than the 9 rows",
    ),
    (packed_cache, {"page_table": CU_Q}, ValueError, "page_table must be int32 (2, max_pages"),
    (packed_cache, {**NEW, "cache_seqlens": ints(3, 7)}, ValueError, "cache_seqlens[1] = 7 plus 2"),
    (packed_cache, {**NEW, "page_table": ints(0, 5).view(2, 1)}, ValueError, "page_table names 5"),
    (
        packed_cache,
        {**NEW, "cache_batch_idx": ints(1, 1), "cache_seqlens": ints(5, 5)},
        ValueError,
        "cache_batch_idx appends twice",
    ),
    (packed_cache, {**NEW, "v": None}, ValueError, "k and v must be given together"),
    (packed_cache, {**NEW, "k": NEW["k"][:, :1]}, ValueError, "k must be torch.float32 of shape"),
    (
        packed_cache,
        {**NEW, "cu_seqlens_k_new": ints(0, 1, 4)},
        ValueError,
        "beyond the 3 rows of k",
    ),
    (packed_cache, {**NEW, "cu_seqlens_k_new": ints(0, 3, 2)}, ValueError, "decreases"),
    (
        packed_cache,
        {**NEW, "rotary_cos": torch.ones(5, 8), "rotary_sin": torch.zeros(5, 8)},
        ValueError,
        "rotary_cos has 5 rows",
    ),
    (packed_cache, {**NEW, "rotary_cos": torch.ones(9, 8)}, ValueError, "given together"),
    (
        packed_cache,
        {"rotary_cos": torch.ones(9, 8), "rotary_sin": torch.ones(9, 8)},
        ValueError,
        "k and v must be given",
    ),
    (
        lambda **more: v3.get_scheduler_metadata(**{**METADATA, **more}),
        {"num_heads_kv": 3},
        ValueError,
        "num_heads_kv must divide num_heads_q = 4, got 3",
    ),
    (
        lambda **more: v3.get_scheduler_metadata(**{**METADATA, **more}),
        {"cache_seqlens": ints(1)},
        ValueError,
        "cache_seqlens must be int32 with one dimension of 2 elements",
    ),
    (
        lambda **more: v3.flash_attn_combine(torch.zeros(2, 1, 3, 2, 8), **more),
        {"lse_partial": torch.zeros(2, 1, 2, 3)},
        ValueError,
        "lse_partial must have shape (2, 1, 3, 2)",
    ),
    (
        lambda **more: v3.flash_attn_combine(torch.zeros(2, 1, 3, 2, 8).half(), **more),
        {"lse_partial": torch.zeros(2, 1, 3, 2)},
        ValueError,
        "out_partial must be fp32",
    ),
]


def numbered(cases):
    """As parameters, whose names are the same in every process."""
    return [pytest.param(*case, id=f"{i}-{case[-1]}") for i, case in enumerate(cases)]


@pytest.mark.parametrize(("function", "given", "error", "text"), numbered(REFUSED))
def test_refused(function, given, error, text):
    before = K.clone()
    with pytest.raises(error, match=re.escape(text)):
        function(**given)
    assert torch.equal(K, before)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"s_aux": torch.zeros(3)}, "s_aux"),
        ({"qv": torch.zeros(12, 4, 8)}, "qv must have shape (12, 4, 16)"),
        ({"q": Q.flatten(0, 1).half()}, "same dtype"),
        ({"rotary_cos": torch.ones(4, 8), "rotary_sin": torch.ones(4, 8)}, "rotary_cos has 4 rows"),
    ],
    ids=["sinks", "qv", "dtype", "rotary"],
)
def test_refused_before_the_cache_is_written(more, text):
    """What only attention finds wrong is found before new tokens are in the cache."""
    k_cache, v_cache = K.clone(), K.clone()
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    new = {"k": torch.ones(3, 2, 16), "v": torch.ones(3, 2, 16)}
    packed_cache(**caches, **{**NEW, **new})  # is a call that works
    assert not torch.equal(k_cache, K)
    k_cache.copy_(K)
    v_cache.copy_(K)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(text)):
        packed_cache(**caches, **{**NEW, **new, **more})
    assert torch.equal(k_cache, K)
    assert torch.equal(v_cache, K)


def test_an_out_that_does_not_fit():
    cache = K.clone()
    new = torch.ones(2, 1, 2, 16)
    with pytest.raises(ValueError, match="out must be"):
        torch.ops.flash_attn_3.fwd(
            Q, cache, cache.clone(), new, new, None, Q[:1], seqused_k=LENGTHS
        )
    assert torch.equal(cache, K)


@pytest.mark.skipif(OTHER_FP8 is None, reason="a torch without fp8")
@pytest.mark.parametrize("name", ["q", "k", "v", "qv", "k_new"])
def test_other_fp8_is_refused_by_name(name):
    given = {"q": Q, "k": K, "v": K, name: (Q if name.startswith("q") else K).to(OTHER_FP8)}
    with pytest.raises(NotImplementedError, match=rf"^{name} has dtype torch.float8_e5m2"):
        torch.ops.flash_attn_3.fwd(**{("q_v" if n == "qv" else n): x for n, x in given.items()})


def test_descales_of_one_change_nothing():
    ones = torch.ones(1).expand(2, 2)
    plain = dense()
    assert torch.equal(dense(q_descale=ones, k_descale=ones, v_descale=ones), plain)


def test_rows_without_keys_of_a_cache():
    out, lse, *_ = cache(cache_seqlens=ints(0, 2), causal=True, return_softmax_lse=True)
    assert (lse[0] == -INF).all()
    assert (lse[1, :, :4] == -INF).all()
    assert lse[1, :, 4:].isfinite().all()
    assert not out[0].any()
