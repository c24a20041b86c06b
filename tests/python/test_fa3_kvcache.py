"""FlashAttention-3's flash_attn_with_kvcache: what it appends, what it leaves alone, and the
attention that it returns."""

from __future__ import annotations

import dataclasses

import cache_cases
import pytest
import torch
from backends import CPU, FP32
from cache_cases import GUARD, sampled_cases
from fa3_cases import Case as Mask
from fa3_cases import as_reference, reference
from reference import assert_attention_close

from flash_attn import v3


class Problem(cache_cases.Problem):
    """A case by FlashAttention-3's function; ``packed``: queries and new tokens are packed."""

    packed = False

    def call(self, **changes):
        case, here = self.case, self.backend.here
        arguments = {
            "k": self.k,
            "v": self.v,
            "rotary_cos": self.cos,
            "rotary_sin": self.sin,
            "cache_batch_idx": self.batch_idx,
            "page_table": self.block_table,
            "causal": case.causal,
            "window_size": case.window_size,
            "softcap": case.softcap,
            "rotary_interleaved": case.rotary == "interleaved",
            "num_splits": case.num_splits,
            "s_aux": self.sinks,
            "return_softmax_lse": True,
        }
        if case.leftpad:
            arguments["cache_leftpad"] = torch.tensor(self.first, dtype=torch.int32)
        if case.lengths == "int":
            arguments["cache_seqlens"] = self.lengths[0]
        elif case.lengths == "tensor" or case.page_size:
            arguments["cache_seqlens"] = torch.tensor(self.lengths, dtype=torch.int32)
        q = self.q
        if self.packed:
            q = q.flatten(0, 1)
            arguments |= {
                "cu_seqlens_q": torch.arange(case.batch + 1, dtype=torch.int32) * case.seqlen_q,
                "max_seqlen_q": case.seqlen_q,
            }
            if self.k is not None:
                steps = torch.arange(case.batch + 1, dtype=torch.int32)
                arguments |= {
                    "k": self.k.flatten(0, 1),
                    "v": self.v.flatten(0, 1),
                    "cu_seqlens_k_new": steps * case.seqlen_new,
                }
        arguments = {name: here(x) for name, x in (arguments | changes).items()}
        buffers = here(self.k_buffer), here(self.v_buffer)
        caches = (buffer[:, GUARD:-GUARD] for buffer in buffers)
        with self.backend.calls(case.seed):
            out, lse, *rest = v3.flash_attn_with_kvcache(here(q), *caches, **arguments)
        assert [x.numel() for x in rest] == [0, 0]
        self.k_buffer.copy_(buffers[0])
        self.v_buffer.copy_(buffers[1])
        if self.packed:
            out = out.unflatten(0, (case.batch, case.seqlen_q))
            lse = lse.unflatten(1, (case.batch, case.seqlen_q)).transpose(0, 1)
        return out.cpu(), as_reference(lse.cpu())


class PackedProblem(Problem):
    packed = True


def check(case, backend=CPU, packed=False):
    case = dataclasses.replace(case, alibi="")
    problem = (PackedProblem if packed else Problem)(case, backend)
    before = problem.k_buffer.clone(), problem.v_buffer.clone()
    out, lse = problem.call()
    assert out.dtype == case.dtype
    assert lse.dtype == FP32
    cache_cases.check_attention(problem, out, lse)
    cache_cases.check_appended(problem, *before)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", sampled_cases(40, seed=11), ids=str)
def test_feature_product(case, packed):
    check(case, packed=packed)


def cache_of(lengths, capacity=60, heads=2, dim=16):
    k, v = torch.randn(2, len(lengths), capacity, heads, dim)
    return k, v, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("seqlen_q", [1, 6, 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, 33])
@pytest.mark.parametrize("leftpad", [False, True])
def test_chunks(seqlen_q, causal, chunk, leftpad):
    lengths, first = (0, 5, 33, 60), (0, 2, 9, 0)
    k, v, seqlens = cache_of(lengths)
    q = torch.randn(4, seqlen_q, 4, 16)
    options = {"causal": causal, "attention_chunk": chunk, "return_softmax_lse": True}
    if leftpad:
        options["cache_leftpad"] = torch.tensor(first, dtype=torch.int32)
    out, lse, *_ = v3.flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens, **options)
    case = Mask(causal=causal, attention_chunk=chunk)
    for i, last in enumerate(lengths):
        keys = slice(first[i] if leftpad else 0, last)
        tensors = (q[i], k[i, keys], v[i, keys])
        exact, plain = (
            reference(case, *(x.to(dtype) for x in tensors)) for dtype in (torch.float64, FP32)
        )
        assert_attention_close(out[i], exact[0], plain[0], f"out of {i}")
        assert_attention_close(lse[i], exact[1], plain[1], f"lse of {i}")


def test_queries_of_values_over_pages():
    """Latent attention: one cache of which k and v are parts, packed queries, and new tokens."""
    lengths, new, queries = [0, 7, 25], [2, 0, 5], [2, 1, 5]
    latent = torch.full((12, 4, 1, 40), float("nan"))
    table = torch.tensor([[0] * 8, [1, 2] + [0] * 6, [3, 4, 5, 6, 7, 8, 9, 10]], dtype=torch.int32)
    latent[table[1, :2].long()] = torch.randn(2, 4, 1, 40)
    latent[table[2, :7].long()] = torch.randn(7, 4, 1, 40)
    k_cache, v_cache = latent[..., 32:], latent[..., :32]
    q, qv = torch.randn(8, 4, 8), torch.randn(8, 4, 32)
    k, v = torch.randn(7, 1, 8), torch.randn(7, 1, 32)
    before = latent.clone()
    cu_q, cu_new = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in (queries, new))
    out, lse, *_ = v3.flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v, qv),
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        page_table=table,
        cu_seqlens_q=cu_q,
        cu_seqlens_k_new=cu_new,
        max_seqlen_q=5,
        causal=True,
        return_softmax_lse=True,
    )
    written = torch.zeros(12, 4, dtype=torch.bool)
    for i, (length, count) in enumerate(zip(lengths, new)):
        rows = slice(cu_new[i], cu_new[i + 1])
        for j in range(count):
            page, slot = int(table[i, (length + j) // 4]), (length + j) % 4
            written[page, slot] = True
            assert torch.equal(latent[page, slot], torch.cat([v[rows][j], k[rows][j]], -1))
        tokens = latent[table[i].long()].flatten(0, 1)[: length + count].double()
        of_q = slice(cu_q[i], cu_q[i + 1])
        exact = reference(
            Mask(causal=True),
            *(q[of_q].double(), tokens[..., 32:], tokens[..., :32], qv[of_q].double()),
        )
        torch.testing.assert_close(out[of_q].double(), exact[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[:, of_q].double(), exact[1], rtol=1e-5, atol=1e-6)
    kept, was = (x[~written].view(torch.int32) for x in (latent, before))
    assert torch.equal(kept, was)


@pytest.mark.parametrize("causal", [False, True])
def test_rotary_positions_of_their_own(causal):
    """rotary_seqlens equal to cache_seqlens changes nothing; others rotate by themselves."""
    lengths = (3, 17)
    k_cache, v_cache, seqlens = cache_of(lengths)
    q, k, v = torch.randn(2, 4, 4, 16), *torch.randn(2, 2, 4, 2, 16)
    angle = torch.rand(100, 8) * 6
    options = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "causal": causal}
    options |= {"cache_seqlens": seqlens, "k": k, "v": v}
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(3)]
    expected = v3.flash_attn_with_kvcache(q, *caches[0], **options)
    actual = v3.flash_attn_with_kvcache(q, *caches[1], rotary_seqlens=seqlens, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(caches[1][0], caches[0][0], rtol=1e-5, atol=1e-6)
    shift = seqlens + 30
    v3.flash_attn_with_kvcache(q, *caches[2], rotary_seqlens=shift, **options)
    for i, length in enumerate(lengths):
        position = length + 30 + torch.arange(4)
        rotated = cache_cases.rotate(k[i], angle.cos()[position], angle.sin()[position], True)
        torch.testing.assert_close(caches[2][0][i, length : length + 4], rotated)


def test_what_engines_call():
    """Packed queries over pages as serving engines call it: prefill and decode in one batch.

    With a scheduler's metadata, descales of 1, cu_seqlens_k_new without new tokens, tensors by
    keyword, and ``torch.ops.flash_attn_3.fwd`` as well.
    """
    lengths, queries, page_size = [40, 9, 1], [1, 4, 1], 16
    pages = torch.randn(2, 9, page_size, 2, 32).bfloat16()
    k_cache, v_cache = pages
    table = torch.tensor([[3, 0, 5], [7, 1, 1], [2, 8, 8]], dtype=torch.int32)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    cu_q = torch.tensor([0, *queries]).cumsum(0, dtype=torch.int32)
    q = torch.randn(6, 8, 32).bfloat16()
    metadata = v3.get_scheduler_metadata(
        batch_size=3,
        max_seqlen_q=4,
        max_seqlen_k=40,
        num_heads_q=8,
        num_heads_kv=2,
        headdim=32,
        cache_seqlens=seqlens,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=cu_q,
        page_size=page_size,
        causal=True,
        window_size=(-1, -1),
    )
    ones = torch.ones(1).expand(3, 2)
    out = v3.flash_attn_with_kvcache(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=table,
        cache_seqlens=seqlens,
        cu_seqlens_q=cu_q,
        cu_seqlens_k_new=torch.tensor([0, 40, 49, 50], dtype=torch.int32),
        max_seqlen_q=4,
        softmax_scale=0.2,
        causal=True,
        window_size=(-1, -1),
        softcap=0.0,
        q_descale=ones,
        k_descale=ones,
        v_descale=ones,
        scheduler_metadata=metadata,
        num_splits=0,
    )
    for i, length in enumerate(lengths):
        k, v = (x[table[i].long()].flatten(0, 1)[None, :length] for x in (k_cache, v_cache))
        rows = slice(cu_q[i], cu_q[i + 1])
        expected = v3.flash_attn_func(q[None, rows], k, v, softmax_scale=0.2, causal=True)
        torch.testing.assert_close(out[rows], expected[0], rtol=8e-3, atol=8e-3)
    by_operator = torch.ops.flash_attn_3.fwd(
        *(q, k_cache, v_cache),
        cu_seqlens_q=cu_q,
        seqused_k=seqlens,
        max_seqlen_q=4,
        page_table=table,
        softmax_scale=0.2,
        is_causal=True,
        out=torch.empty_like(q),
    )
    assert torch.equal(by_operator[0], out)


def test_what_transformers_calls():
    """Decoding of one token a sequence: page_table, max_seqlen_q and no cu_seqlens_q."""
    k_cache, v_cache = torch.randn(2, 6, 8, 2, 16)
    q, k, v = torch.randn(3, 1, 4, 16), *torch.randn(2, 3, 1, 2, 16)
    table = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
    seqlens = torch.tensor([0, 7, 12], dtype=torch.int32)
    out = v3.flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v),
        page_table=table,
        cache_seqlens=seqlens,
        max_seqlen_q=1,
        causal=True,
        softmax_scale=None,
    )
    for i, length in enumerate((1, 8, 13)):
        keys, values = (x[table[i].long()].flatten(0, 1)[:length] for x in (k_cache, v_cache))
        assert torch.equal(keys[-1], k[i, 0])
        exact = reference(Mask(), q[i].double(), keys.double(), values.double())[0]
        torch.testing.assert_close(out[i].double(), exact, rtol=1e-5, atol=1e-6)


def test_there_is_no_gradient():
    k_cache, v_cache, seqlens = cache_of((3, 17))
    q = torch.randn(2, 4, 4, 16, requires_grad=True)
    for options in ({}, {"attention_chunk": 8}):
        out = v3.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, **options)
        assert not out.requires_grad
