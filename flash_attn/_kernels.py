"""What the operators do: allocate the results, call the library.

Tensors reach the library as they are, by DLPack; ``_arguments`` makes the few that cannot be read
so. What it writes is allocated here; what it is given is checked there. An argument named ``out``
is the caller's own buffer for the result.
"""

from __future__ import annotations

import torch

from flash_attn import _buffers as buffers
from flash_attn._arguments import ERRORS, are_plain, call_plain, check_tensors, explained
from flash_attn._buffers import maybe_contiguous
from flash_attn._emulator import in_use as emulator_in_use
from flash_attn._library import lib

_mha_fwd = lib.mha_fwd
_mha_varlen_fwd = lib.mha_varlen_fwd
_mha_bwd = lib.mha_bwd
_mha_varlen_bwd = lib.mha_varlen_bwd
_mha_fwd_kvcache = lib.mha_fwd_kvcache

_FORWARD_RESULT = "dout q k v out softmax_lse"
_SEQUENCES = " cu_seqlens_q cu_seqlens_k"
_GRADIENTS = "dq dk dv ds_aux dattn_bias"


def attend(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    s_aux=None,
    attn_bias=None,
    s_dmask=None,
    rng_state=None,
    out=None,
    needs_lse=True,
):
    """Attention of a dense batch: (out, softmax_lse or None); s_dmask is written too."""
    if not are_plain((q, k, v), alibi_slopes, s_aux, attn_bias, out):
        return call_plain(attend, locals(), "q k v", written="out")
    try:
        if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
            q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
        if out is None:
            out = buffers.dense_out(q, v)
        written = out
        if q.is_cuda or emulator_in_use():
            q, k, v, written = map(buffers.for_cuda, (q, k, v, out))
        softmax_lse = buffers.dense_lse(q) if needs_lse else None
        _mha_fwd(
            q,
            k,
            v,
            written,
            softmax_lse,
            s_dmask,
            rng_state,
            alibi_slopes,
            s_aux,
            attn_bias,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
        )
        if written is not out:
            out.copy_(written[..., : out.shape[-1]])
        return out, softmax_lse
    except ERRORS as error:
        raise explained(error, locals()) from None


def forward(
    q,
    k,
    v,
    *args,
    s_aux=None,
    attn_bias=None,
    out=None,
):
    """Attention of a dense batch: (out, softmax_lse, S_dmask, rng_state)."""
    *args, return_softmax = args
    s_dmask = None
    if return_softmax:
        check_tensors(q=q, k=k)
        s_dmask = buffers.dense_s_dmask(q, k)
    rng_state = buffers.new_rng_state(args[0])
    out, softmax_lse = attend(q, k, v, *args, s_aux, attn_bias, s_dmask, rng_state, out)
    return out, softmax_lse, q.new_empty(0) if s_dmask is None else s_dmask, rng_state


def varlen_attend(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
    num_splits=0,
    s_aux=None,
    attn_bias=None,
    s_dmask=None,
    rng_state=None,
    out=None,
    needs_lse=True,
):
    """Attention of a packed batch: (out, softmax_lse or None); s_dmask is written too."""
    if not are_plain(
        (q, k, v, cu_seqlens_q, cu_seqlens_k),
        seqused_k,
        leftpad_k,
        block_table,
        alibi_slopes,
        s_aux,
        attn_bias,
        out,
    ):
        return call_plain(varlen_attend, locals(), "q k v" + _SEQUENCES, written="out")
    try:
        if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
            q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
        if out is None:
            out = buffers.varlen_out(q, v)
        softmax_lse = buffers.varlen_lse(q) if needs_lse else None
        _mha_varlen_fwd(
            q,
            k,
            v,
            out,
            softmax_lse,
            s_dmask,
            rng_state,
            alibi_slopes,
            s_aux,
            attn_bias,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_k,
            leftpad_k,
            block_table,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            softmax_scale,
            zero_tensors,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            num_splits,
        )
        return out, softmax_lse
    except ERRORS as error:
        raise explained(error, locals()) from None


def varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
    num_splits=0,
    *,
    s_aux=None,
    attn_bias=None,
    out=None,
):
    """Attention of a packed batch: (out, softmax_lse, S_dmask, rng_state)."""
    s_dmask = None
    if return_softmax:
        check_tensors(q=q, cu_seqlens_q=cu_seqlens_q)
        s_dmask = buffers.varlen_s_dmask(q, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    rng_state = buffers.new_rng_state(dropout_p)
    out, softmax_lse = varlen_attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        block_table,
        leftpad_k,
        seqused_k,
        zero_tensors,
        num_splits,
        s_aux,
        attn_bias,
        s_dmask,
        rng_state,
        out,
    )
    return out, softmax_lse, q.new_empty(0) if s_dmask is None else s_dmask, rng_state


def backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    *,
    dlse=None,
    s_aux=None,
    ds_aux=None,
    attn_bias=None,
    dattn_bias=None,
):
    """Gradients of a dense batch: writes dq, dk, dv, ds_aux and dattn_bias, returns softmax_d."""
    if not are_plain(
        (dout, q, k, v, out, softmax_lse),
        dq,
        dk,
        dv,
        rng_state,
        dlse,
        alibi_slopes,
        s_aux,
        ds_aux,
        attn_bias,
        dattn_bias,
    ):
        return call_plain(backward, locals(), _FORWARD_RESULT, written=_GRADIENTS)
    try:
        softmax_d = buffers.dense_softmax_d(q)
        _mha_bwd(
            maybe_contiguous(dout),
            maybe_contiguous(q),
            maybe_contiguous(k),
            maybe_contiguous(v),
            maybe_contiguous(out),
            softmax_lse,
            buffers.new_gradient(q) if dq is None else dq,
            buffers.new_gradient(k) if dk is None else dk,
            buffers.new_gradient(v) if dv is None else dv,
            softmax_d,
            rng_state,
            alibi_slopes,
            s_aux,
            attn_bias,
            dlse,
            ds_aux,
            dattn_bias,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            deterministic,
        )
        return softmax_d
    except ERRORS as error:
        raise explained(error, locals()) from None


def varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
    *,
    dlse=None,
    s_aux=None,
    ds_aux=None,
    attn_bias=None,
    dattn_bias=None,
):
    """Gradients of a packed batch: writes dq, dk, dv, ds_aux and dattn_bias, returns softmax_d."""
    if not are_plain(
        (dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k),
        dq,
        dk,
        dv,
        rng_state,
        dlse,
        alibi_slopes,
        s_aux,
        ds_aux,
        attn_bias,
        dattn_bias,
    ):
        return call_plain(
            varlen_backward, locals(), _FORWARD_RESULT + _SEQUENCES, written=_GRADIENTS
        )
    try:
        softmax_d = buffers.varlen_softmax_d(q, cu_seqlens_q)
        _mha_varlen_bwd(
            maybe_contiguous(dout),
            maybe_contiguous(q),
            maybe_contiguous(k),
            maybe_contiguous(v),
            maybe_contiguous(out),
            softmax_lse,
            buffers.new_gradient(q) if dq is None else dq,
            buffers.new_gradient(k) if dk is None else dk,
            buffers.new_gradient(v) if dv is None else dv,
            softmax_d,
            rng_state,
            alibi_slopes,
            s_aux,
            attn_bias,
            dlse,
            ds_aux,
            dattn_bias,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            softmax_scale,
            zero_tensors,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            deterministic,
        )
        return softmax_d
    except ERRORS as error:
        raise explained(error, locals()) from None


def kvcache_attend(
    q,
    k_cache,
    v_cache,
    k,
    v,
    cache_seqlens,
    rotary_cos,
    rotary_sin,
    cache_batch_idx,
    cache_leftpad,
    block_table,
    alibi_slopes,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    rotary_interleaved,
    num_splits,
    s_aux=None,
    out=None,
    needs_lse=True,
):
    """Append k and v, where given, to the cache, and attend over it: (out, softmax_lse or None)."""
    if not are_plain(
        (q, k_cache, v_cache),
        k,
        v,
        cache_seqlens,
        rotary_cos,
        rotary_sin,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        alibi_slopes,
        s_aux,
        out,
    ):
        return call_plain(
            kvcache_attend,
            locals(),
            "q k_cache v_cache",
            written="out" if k is None else "out k_cache v_cache",
        )
    try:
        q = maybe_contiguous(q)
        if out is None:
            out = buffers.dense_out(q, v_cache)
        softmax_lse = buffers.dense_lse(q) if needs_lse else None
        written = () if k is None else (k_cache, v_cache)
        versioned = [cache for cache in written if not cache.is_inference()]
        _mha_fwd_kvcache(
            q,
            k_cache,
            v_cache,
            k if k is None else maybe_contiguous(k),
            v if v is None else maybe_contiguous(v),
            out,
            softmax_lse,
            cache_seqlens if cache_seqlens is None else maybe_contiguous(cache_seqlens),
            rotary_cos if rotary_cos is None else maybe_contiguous(rotary_cos),
            rotary_sin if rotary_sin is None else maybe_contiguous(rotary_sin),
            cache_batch_idx if cache_batch_idx is None else maybe_contiguous(cache_batch_idx),
            cache_leftpad if cache_leftpad is None else maybe_contiguous(cache_leftpad),
            block_table if block_table is None else maybe_contiguous(block_table),
            alibi_slopes,
            s_aux,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            rotary_interleaved,
            num_splits,
        )
        for cache in versioned:
            torch.autograd.graph.increment_version(cache)
        return out, softmax_lse
    except ERRORS as error:
        raise explained(error, locals()) from None


def kvcache_forward(q, k_cache, v_cache, *args, s_aux=None):
    """Attend over a cache that stays as it is: (out, softmax_lse)."""
    return kvcache_attend(q, k_cache, v_cache, None, None, *args, s_aux)


def kvcache_append_forward(q, k_cache, v_cache, k, v, *args, s_aux=None):
    """Append k and v to the cache and attend over it: (out, softmax_lse)."""
    return kvcache_attend(q, k_cache, v_cache, k, v, *args, s_aux)
