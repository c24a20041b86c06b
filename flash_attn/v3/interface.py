"""The functions of FlashAttention-3's Python interface.

Notation and shapes are those of ``flash_attn.flash_attn_interface``; masks are aligned to the
bottom right corner, too. Arguments shared by all functions:

- q, k, v: fp16, bf16, fp32 or float8_e4m3fn, all the same, or k and v alone in fp8, on a CPU or a
  CUDA device; head dims 1 to 576, that of v may differ. With fp8 there is no gradient, and out is
  bf16 if q has it.
- softmax_scale: default ``headdim ** -0.5``, with qv ``(headdim + headdim_v) ** -0.5``.
- causal: a query sees no later key.
- qv: shape of out; scores are ``q @ k.T + qv @ v.T``. k and v that lie side by side in memory are
  read there, else they are copied into one tensor.
- q_descale, k_descale, v_descale: fp32 factors of fp8 tensors, (batch, nheads_k) or (batch,
  nheads_k, ceil(seqlen / 128)) with one for each 128 rows of a sequence, of any strides; None: 1.
  Beside other tensors None or 1.0.
- window_size: (left, right), -1: no limit.
- attention_chunk: n > 0: a query sees keys of its own chunk of n positions alone, besides what
  causal and window_size say. The last query has the position of the last key.
- softcap: > 0 replaces a score x by ``softcap * tanh(x / softcap)``.
- num_splits, pack_gqa, sm_margin, scheduler_metadata, deterministic: how to compute, not what. They
  are checked; results are deterministic, and equal for all of them up to num_splits' rounding.
- s_aux: attention sinks, (nheads,), beyond FlashAttention-3's own arguments; differentiable.
- return_attn_probs: return (out, softmax_lse).

softmax_lse is fp32, the natural logarithm of the softmax denominator, differentiable. A query that
sees no key gives out 0 and softmax_lse -inf (+inf in a batch without any key; s_aux if given).

Invalid arguments raise RuntimeError, ValueError, TypeError or NotImplementedError with a sentence
that names the argument, before anything is written.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from flash_attn._arguments import as_int, check_tensors, flag, wrong_kind
from flash_attn._buffers import maybe_contiguous, round_multiple
from flash_attn._eager import refuse_derivatives
from flash_attn.flash_attn_interface import _has_unit_last_stride, _same_lengths, _unpack
from flash_attn.v3._arguments import check_int32, check_schedule
from flash_attn.v3._forward import forward
from flash_attn.v3._forward import scheduler_metadata as _new_metadata
from flash_attn.v3._ops import combine, flash_attn_backward, workspaces

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
    "round_multiple",
    "round_up_headdim",
]

USE_TRITON_ROCM = False

_HEAD_DIMS = (64, 96, 128, 192, 256)  # of FlashAttention-3's kernels


def round_up_headdim(head_size: int) -> int:
    """Return the head dim of the kernel that FlashAttention-3 takes, at most 256."""
    return next((d for d in _HEAD_DIMS if d >= head_size), _HEAD_DIMS[-1])


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    qv: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Optional[bool] = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
):
    """Attention of a dense batch.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k: (batch, seqlen_k, nheads_k, headdim).
        v: (batch, seqlen_k, nheads_k, headdim_v).

    The other arguments are described at the head of this module.

    Returns:
        out, (batch, seqlen_q, nheads, headdim_v), dtype of q; with ``return_attn_probs``
        (out, softmax_lse), softmax_lse fp32 (batch, nheads, seqlen_q).
    """
    flag("deterministic", deterministic)
    wants_lse = flag("return_attn_probs", return_attn_probs)
    out, lse = forward(
        *(q, k, v),
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        s_aux=s_aux,
        wants_lse=wants_lse,
    )
    return (out, lse) if wants_lse else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: Optional[int] = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
):
    """Attention of a dense batch whose q, k and v are one tensor, and so is their gradient.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim), or with ``num_heads_q`` (batch, seqlen,
            num_heads_q + 2 * nheads_k, headdim).

    Other arguments, results and errors are those of flash_attn_func.
    """
    if num_heads_q is None:
        q, k, v = _unpack("qkv", qkv, 3)
    else:
        q, k, v = _heads_of(qkv, as_int("num_heads_q", num_heads_q))
    return flash_attn_func(
        *(q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size),
        *(attention_chunk, softcap, 1, None, deterministic, sm_margin, return_attn_probs),
        s_aux=s_aux,
    )


def _heads_of(qkv: Tensor, num_heads_q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split (batch, seqlen, num_heads_q + 2 * nheads_k, headdim) into q, k and v."""
    if not isinstance(qkv, Tensor):
        raise wrong_kind("qkv", qkv)
    rest = qkv.shape[-2] - num_heads_q if qkv.dim() == 4 else 1
    if qkv.dim() != 4 or num_heads_q < 1 or rest < 2 or rest % 2:
        raise ValueError(
            "with num_heads_q, qkv must have shape (batch, seqlen, num_heads_q + 2 * nheads_k, "
            f"headdim), got {tuple(qkv.shape)} for num_heads_q = {num_heads_q}"
        )
    return qkv.split((num_heads_q, rest // 2, rest // 2), dim=-2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    max_seqlen_q: Union[int, Tensor, None],
    max_seqlen_k: Union[int, Tensor, None],
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    qv: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Optional[bool] = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
):
    """Attention of a packed batch: sequences of different lengths, one after the other.

    Args:
        q: (total_q, nheads, headdim), or (batch, seqlen_q, nheads, headdim) if cu_seqlens_q is
            None.
        k: (total_k, nheads_k, headdim), or (batch, seqlen_k, nheads_k, headdim) if cu_seqlens_k is
            None.
        v: as k, with headdim_v.
        cu_seqlens_q: int32 (batch + 1), ascending from 0: sequence s has queries
            ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]``, which may be none.
        cu_seqlens_k: int32 (batch + 1), the same for keys.
        max_seqlen_q: the longest sequence of queries or more, int or 0-dim tensor.
        max_seqlen_k: the same for keys.
        seqused_q: int32 (batch,), how many rows of each sequence count, from its first; out is 0 in
            the others.
        seqused_k: int32 (batch,), the same for keys.

    The other arguments are described at the head of this module.

    Returns:
        out, shape of q with headdim_v, dtype of q, 0 in rows of no sequence; with
        ``return_attn_probs`` (out, softmax_lse), softmax_lse fp32 (nheads, total_q).
    """
    flag("deterministic", deterministic)
    wants_lse = flag("return_attn_probs", return_attn_probs)
    out, lse = forward(
        *(q, k, v),
        qv=qv,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        s_aux=s_aux,
        wants_lse=wants_lse,
    )
    return (out, lse) if wants_lse else out


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
):
    """Merge attention over disjoint sets of keys; there is no backward.

    Args:
        out_partial: fp32 (num_splits, batch, seqlen, nheads, headdim_v).
        lse_partial: fp32 (num_splits, batch, seqlen, nheads); a part that is -inf (or +inf) is
            empty.
        out: (batch, seqlen, nheads, headdim_v) to write to, fp16, bf16 or fp32.
        out_dtype: of a new ``out``; default that of out_partial.

    Returns:
        (out, softmax_lse), softmax_lse fp32 (batch, seqlen, nheads), -inf where all parts are
        empty.
    """
    return combine(out_partial, lse_partial, out, out_dtype)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    page_table: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    rotary_seqlens: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Optional[Tensor] = None,
    num_splits: int = 0,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
):
    """Attention over a key-value cache, after appending new keys and values to it in place.

    There is no backward: the result never requires grad.

    Args:
        q: (batch, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with cu_seqlens_q.
        k_cache: (batch_cache, seqlen_cache, nheads_k, headdim) with unit stride in the last
            dimension; with page_table (num_pages, page_size, nheads_k, headdim), any page size.
        v_cache: as k_cache, with headdim_v.
        k: (batch, seqlen_new, nheads_k, headdim), or (total_new, nheads_k, headdim) with
            cu_seqlens_k_new; written to k_cache from ``cache_seqlens`` on.
        v: as k, with headdim_v, written to v_cache; needed with k.
        rotary_cos: (seqlen_rotary, rotary_dim / 2), dtype of q: rotates k at positions
            ``rotary_seqlens + i``, and q likewise if causal or windowed, else at
            ``rotary_seqlens``. Needs k.
        rotary_sin: as rotary_cos.
        cache_seqlens: tokens in the cache before k is appended, an int or int32 (batch,). None,
            only without k: the whole cache.
        cache_batch_idx: int32 (batch,), the cache row of each sequence; default its own index.
        cache_leftpad: int32 (batch,), first valid index in the cache; default 0.
        page_table: int32 (batch, max_pages_per_sequence), the pages of each sequence.
        cu_seqlens_q: int32 (batch + 1), ascending from 0, of packed queries.
        cu_seqlens_k_new: int32 (batch + 1), of packed new tokens; means nothing without k.
        max_seqlen_q: needed with cu_seqlens_q: the longest sequence of queries or more.
        rotary_seqlens: int32 (batch,), default cache_seqlens.
        rotary_interleaved: rotate pairs (0, 1), (2, 3), ... or, if False, the two halves.
        num_splits: 0: a heuristic that depends on a sequence's own length alone; 1: no split;
            n: the keys are attended in n parts and merged.
        return_softmax_lse: also return softmax_lse.

    The other arguments are described at the head of this module. Keys count with those appended.

    Returns:
        out, shape of q with headdim_v, dtype of q; with ``return_softmax_lse`` (out, softmax_lse,
        out_accum, lse_accum): softmax_lse fp32 (batch, nheads, seqlen_q) or (nheads, total_q), the
        last two empty.

    Raises:
        AssertionError: the last dimension of a cache has no unit stride.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    refuse_derivatives("flash_attn_with_kvcache", q, k_cache, v_cache, k, v, qv, s_aux)
    assert _has_unit_last_stride(k_cache), "k_cache must have contiguous last dimension"
    assert _has_unit_last_stride(v_cache), "v_cache must have contiguous last dimension"
    batch = q if cu_seqlens_q is None else check_int32("cu_seqlens_q", cu_seqlens_q)[1:]
    if cache_seqlens is None and k is not None:
        raise ValueError("cache_seqlens must be given with k and v, which are written there")
    if cache_seqlens is None:  # the whole cache
        pages = 1 if not isinstance(page_table, Tensor) else page_table.shape[-1]
        cache_seqlens = pages * k_cache.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = _same_lengths(batch, cache_seqlens, k_cache.device)
    wants_lse = flag("return_softmax_lse", return_softmax_lse)
    out, lse = forward(
        *(q, k_cache, v_cache, k, v, qv, None, cu_seqlens_q, None, cu_seqlens_k_new),
        *(None, cache_seqlens, max_seqlen_q, None, page_table, cache_batch_idx, cache_leftpad),
        *(rotary_cos, rotary_sin, rotary_seqlens, q_descale, k_descale, v_descale),
        *(softmax_scale, causal, window_size, attention_chunk, softcap, rotary_interleaved),
        *(scheduler_metadata, num_splits, pack_gqa, sm_margin),
        s_aux=s_aux,
        wants_lse=wants_lse,
        is_cache=True,
    )
    return (out, lse, *workspaces(out)) if wants_lse else out


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: Optional[int] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    page_size: Optional[int] = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
) -> Tensor:
    """Return what flash_attn_with_kvcache takes as scheduler_metadata.

    Args:
        cache_seqlens: int32 (batch_size,).

    Returns:
        int32 with one dimension, on the device of cache_seqlens. The kernels here plan by
        themselves: it holds zeros, and may be kept for other lengths.
    """
    batch_size = as_int("batch_size", batch_size)
    if check_int32("cache_seqlens", cache_seqlens, batch_size) is None:
        raise wrong_kind("cache_seqlens", cache_seqlens)
    heads_q, heads_k = as_int("num_heads_q", num_heads_q), as_int("num_heads_kv", num_heads_kv)
    if heads_k < 1 or heads_q % heads_k:
        raise ValueError(f"num_heads_kv must divide num_heads_q = {heads_q}, got {heads_k}")
    check_schedule(num_splits, pack_gqa, sm_margin)
    return _new_metadata(batch_size, cache_seqlens.device)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Optional[Tensor] = None,
    v_new: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    out_: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    page_table: Optional[Tensor] = None,
    kv_batch_idx: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    seqlens_rotary: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Optional[Tensor] = None,
    num_splits: int = 1,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Any forward: (out, softmax_lse, out_accum, lse_accum), the last two empty.

    ``k``, ``v``: dense or packed, or a cache with ``k_new``, ``page_table``, ``kv_batch_idx`` or
    ``leftpad_k``; ``seqused_k`` is its cache_seqlens, ``seqlens_rotary`` its rotary_seqlens.
    Differentiable in q, k, v and qv without a cache. ``out_`` is written where it is given.
    """
    window = (window_size_left, window_size_right)
    out, lse = forward(
        *(q, k, v, k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new),
        *(seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k),
        *(rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale),
        *(softmax_scale, causal, window, attention_chunk, softcap, rotary_interleaved),
        *(scheduler_metadata, num_splits, pack_gqa, sm_margin),
    )
    return (out, lse, *workspaces(out))


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    sequed_q: Optional[Tensor] = None,
    sequed_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    dq: Optional[Tensor] = None,
    dk: Optional[Tensor] = None,
    dv: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Write the gradients of a forward without a cache to dq, dk, dv where given.

    ``out`` and ``softmax_lse`` may be those of a merge with other keys. Returns softmax_d, fp32.
    """
    return flash_attn_backward(
        *(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k),
        *(max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, is_causal),
        *(window_size_left, window_size_right, softcap, deterministic, sm_margin),
    )


class FlashAttnQKVPackedFunc:
    """``apply(*arguments of flash_attn_qkvpacked_func)``, by position."""

    apply = staticmethod(flash_attn_qkvpacked_func)


class FlashAttnFunc:
    """``apply(*arguments of flash_attn_func)``, by position."""

    apply = staticmethod(flash_attn_func)


class FlashAttnVarlenFunc:
    """flash_attn_varlen_func by position, with the used rows before the longest sequences."""

    @staticmethod
    def apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, *rest
    ):
        """Call flash_attn_varlen_func."""
        used = (max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *used, *rest)
