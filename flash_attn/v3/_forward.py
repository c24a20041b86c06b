"""FlashAttention-3's forward and backward with all their arguments, as its operators take them."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn._arguments import FP8, check_tensors, flag, wrong_kind
from flash_attn._library import bind
from flash_attn.v3._arguments import (
    check_blocks,
    check_factors_of_values,
    check_schedule,
    make_quantization,
    make_score,
    refuse_fp8,
)
from flash_attn.v3._attention import attend, differentiate, with_query_of_values
from flash_attn.v3._cache import Cache, NewTokens, Queries, Rotary, attend_cache

_combine = bind("combine", "out_partial lse_partial out lse")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Optional[Tensor] = None,
    v_new: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    out: Optional[Tensor] = None,
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
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Optional[Tensor] = None,
    num_splits: int = 0,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
    *,
    s_aux: Optional[Tensor] = None,
    wants_lse: bool = True,
    is_cache: bool = False,
) -> tuple[Tensor, Optional[Tensor]]:
    """Return (out, softmax_lse) of any call of FlashAttention-3's forward.

    New tokens, pages, rows of a cache and left padding make a call one over a cache, which has no
    derivative; every other call has. ``is_cache`` says that k and v are one in any case.
    """
    if out is not None:
        _check_out(out, q, v)
    quantization = make_quantization(
        (q, k, v, k_new, v_new, qv), (q_descale, k_descale, v_descale), out
    )
    num_splits = check_schedule(num_splits, pack_gqa, sm_margin, scheduler_metadata)
    score = make_score(q, qv, softmax_scale, causal, window_size, softcap, attention_chunk, s_aux)
    if quantization is not None:
        score = score._replace(quantization=quantization)
        if score.attention_chunk:
            check_blocks(quantization)
        if qv is not None:
            check_factors_of_values(quantization)
    of_cache = (k_new, v_new, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin)
    if not is_cache and all(x is None for x in of_cache):
        q, k = with_query_of_values(q, k, v, qv)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
        result, lse = attend(q, k, v, score, *lengths, num_splits=num_splits, wants_lse=wants_lse)
    else:
        if cu_seqlens_k is not None:
            raise ValueError(
                "cu_seqlens_k must be None with a cache (k_new, page_table, kv_batch_idx or "
                "leftpad_k): seqused_k says how many keys a sequence has"
            )
        result, lse = attend_cache(
            Queries(q, qv, cu_seqlens_q, max_seqlen_q, seqused_q),
            Cache(k, v, seqused_k, kv_batch_idx, leftpad_k, page_table),
            NewTokens(k_new, v_new, cu_seqlens_k_new),
            Rotary(
                *(rotary_cos, rotary_sin, seqlens_rotary),
                flag("rotary_interleaved", rotary_interleaved),
            ),
            score,
            num_splits,
            wants_lse,
        )
    return (result if out is None else out.copy_(result)), lse


def _check_out(out: Tensor, q: Tensor, v: Tensor) -> None:
    """Raise for an ``out`` that cannot hold the result."""
    check_tensors(out=out, q=q, v=v)
    shape = (*q.shape[:-1], v.shape[-1])
    dtypes = _DTYPES if q.dtype is FP8 else (q.dtype,)
    if out.shape != shape or out.dtype not in dtypes or out.device != q.device:
        raise ValueError(
            f"out must be {' or '.join(map(str, dtypes))} of shape {shape} on {q.device}, got "
            f"{out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor] = None,
    dk: Optional[Tensor] = None,
    dv: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    softmax_scale: Optional[float] = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Write the gradients of a call without a cache where they are given; return softmax_d."""
    refuse_fp8("q k v dout", (q, k, v, dout))
    check_schedule(0, None, sm_margin)
    score = make_score(q, None, softmax_scale, is_causal, window_size, softcap, 0, None)
    return differentiate(
        dout,
        (q, k, v, out, softmax_lse),
        (dq, dk, dv),
        score,
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k),
        flag("deterministic", deterministic),
    )


def combine_into(out_partial: Tensor, lse_partial: Tensor, out: Tensor) -> Tensor:
    """Write the merge of partial results to ``out`` and return its softmax_lse."""
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    _combine(out_partial, lse_partial, out, lse)
    return lse


def check_partial(out_partial, lse_partial, out, out_dtype) -> torch.dtype:
    """Raise for partial results that cannot be merged; return the dtype of the merge."""
    check_tensors(out_partial=out_partial, lse_partial=lse_partial)
    if out_partial.dim() != 5:
        raise ValueError(
            "out_partial must have shape (num_splits, batch, seqlen, nheads, headdim_v), got "
            f"{tuple(out_partial.shape)}"
        )
    if lse_partial.shape != out_partial.shape[:4]:
        raise ValueError(
            f"lse_partial must have shape {tuple(out_partial.shape[:4])}, got "
            f"{tuple(lse_partial.shape)}"
        )
    for name, x in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if x.dtype != torch.float32:
            raise ValueError(f"{name} must be fp32, got {x.dtype}")
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise wrong_kind("out_dtype", out_dtype, "a torch.dtype")
    if out is None:
        dtype = out_partial.dtype if out_dtype is None else out_dtype
        if dtype not in _DTYPES:
            raise ValueError(f"out_dtype must be fp16, bf16 or fp32, got {dtype}")
        return dtype
    check_tensors(out=out)
    if out.shape != out_partial.shape[1:] or out.dtype not in _DTYPES:
        raise ValueError(
            f"out must be fp16, bf16 or fp32 of shape {tuple(out_partial.shape[1:])}, got "
            f"{out.dtype} of shape {tuple(out.shape)}"
        )
    if out_dtype is not None and out.dtype != out_dtype:
        raise ValueError(f"out must have out_dtype, {out_dtype}, got {out.dtype}")
    return out.dtype


def scheduler_metadata(batch_size: int, device) -> Tensor:
    """Return int32 of a length that FlashAttention-3's has; here it says nothing."""
    return torch.zeros((batch_size + 3) // 4 * 4 * 2 + 1, dtype=torch.int32, device=device)
