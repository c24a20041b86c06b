"""FlashAttention-2's extension module: five entry points, under the name that others import.

All arguments are positional, none has a default except ``num_splits`` of ``varlen_fwd``; ``None``
stands for an absent tensor. Shapes and meanings are those of ``flash_attn.flash_attn_interface``.
No entry point records a gradient. Despite the module's name the tensors may be on the CPU. Errors
are RuntimeError, TypeError where a tensor or number is not one.
"""

from __future__ import annotations

from torch import Tensor

from flash_attn import _buffers as buffers
from flash_attn import _kernels as kernels
from flash_attn._arguments import flag, wrong_kind
from flash_attn._functions import as_int, score_numbers


def _reject_generator(generator) -> None:
    if generator is not None:
        raise RuntimeError(
            "flash-attn: the RNG `generator` argument is no longer supported and must be None; "
            "dropout draws from torch's default generator, which torch.manual_seed seeds."
        )


def _gradient(name, x, grad):
    """Return ``grad``, allocated like ``x`` if it is None."""
    if grad is not None:
        return grad
    if not isinstance(x, Tensor):
        raise wrong_kind(name, x)
    return buffers.new_gradient(x)


def fwd(
    q,
    k,
    v,
    out,
    alibi_slopes,
    p_dropout,
    softmax_scale,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    return_softmax,
    generator,
    /,
):
    """Attention of a dense batch: [out, softmax_lse, S_dmask, rng_state].

    ``out`` is written when given; ``generator`` must be None.
    """
    _reject_generator(generator)
    p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap = (
        score_numbers(
            p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
        )
    )
    results = list(
        kernels.forward(
            q,
            k,
            v,
            p_dropout,
            softmax_scale,
            is_causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
            return_softmax,
            out=out,
        )
    )
    buffers.raise_versions(out)
    return results


def varlen_fwd(
    q,
    k,
    v,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    leftpad_k,
    block_table,
    alibi_slopes,
    max_seqlen_q,
    max_seqlen_k,
    p_dropout,
    softmax_scale,
    zero_tensors,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    return_softmax,
    generator,
    num_splits=0,
    /,
):
    """Attention of a packed batch: [out, softmax_lse, S_dmask, rng_state].

    ``out`` is written when given; ``generator`` must be None.
    """
    _reject_generator(generator)
    p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap = (
        score_numbers(
            p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
        )
    )
    results = list(
        kernels.varlen_forward(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            as_int("max_seqlen_q", max_seqlen_q),
            as_int("max_seqlen_k", max_seqlen_k),
            p_dropout,
            softmax_scale,
            is_causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
            return_softmax,
            block_table,
            leftpad_k,
            seqused_k,
            bool(zero_tensors),
            as_int("num_splits", num_splits),
            out=out,
        )
    )
    buffers.raise_versions(out)
    return results


def bwd(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    alibi_slopes,
    p_dropout,
    softmax_scale,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    deterministic,
    generator,
    rng_state,
    /,
):
    """Gradients of a dense batch: [dq, dk, dv, softmax_d].

    ``dq``, ``dk``, ``dv`` are written when given; ``generator`` must be None; ``rng_state`` is the
    forward's.
    """
    _reject_generator(generator)
    p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap = (
        score_numbers(
            p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
        )
    )
    given = dq, dk, dv
    dq, dk, dv = _gradient("q", q, dq), _gradient("k", k, dk), _gradient("v", v, dv)
    softmax_d = kernels.backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        bool(deterministic),
        rng_state,
    )
    buffers.raise_versions(*given)
    return [dq, dk, dv, softmax_d]


def varlen_bwd(
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
    alibi_slopes,
    max_seqlen_q,
    max_seqlen_k,
    p_dropout,
    softmax_scale,
    zero_tensors,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    deterministic,
    generator,
    rng_state,
    /,
):
    """Gradients of a packed batch: [dq, dk, dv, softmax_d].

    ``dq``, ``dk``, ``dv`` are written when given; ``generator`` must be None; ``rng_state`` is the
    forward's.
    """
    _reject_generator(generator)
    p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap = (
        score_numbers(
            p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
        )
    )
    given = dq, dk, dv
    dq, dk, dv = _gradient("q", q, dq), _gradient("k", k, dk), _gradient("v", v, dv)
    softmax_d = kernels.varlen_backward(
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
        as_int("max_seqlen_q", max_seqlen_q),
        as_int("max_seqlen_k", max_seqlen_k),
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        bool(deterministic),
        rng_state,
        bool(zero_tensors),
    )
    buffers.raise_versions(*given)
    return [dq, dk, dv, softmax_d]


def fwd_kvcache(
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
    out,
    softmax_scale,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    is_rotary_interleaved,
    num_splits,
    /,
):
    """Append k and v, where given, to the cache in place and attend over it: [out, softmax_lse].

    ``out`` is written when given.
    """
    _, softmax_scale, is_causal, window_size_left, window_size_right, softcap = score_numbers(
        0.0, softmax_scale, is_causal, window_size_left, window_size_right, softcap
    )
    results = list(
        kernels.kvcache_attend(
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
            is_causal,
            window_size_left,
            window_size_right,
            softcap,
            flag("is_rotary_interleaved", is_rotary_interleaved),
            as_int("num_splits", num_splits),
            out=out,
        )
    )
    buffers.raise_versions(out)
    return results
