"""FlashAttention-2's extension module: five entry points, under the name that others import.

All arguments are positional, none has a default except ``num_splits`` of ``varlen_fwd``; ``None``
stands for an absent tensor. Shapes and meanings are those of ``flash_attn.flash_attn_interface``.
No entry point records a gradient. Despite the module's name the tensors may be on the CPU. Errors
are RuntimeError, TypeError where a tensor or number is not one.
"""

from __future__ import annotations

from torch import Tensor

from flash_attn import _autograd  # noqa: F401  (completes the operators)
from flash_attn._arguments import wrong_kind
from flash_attn._buffers import new_gradient, raise_versions
from flash_attn._functions import (
    BACKWARD,
    FORWARD,
    KVCACHE,
    KVCACHE_APPEND,
    VARLEN_BACKWARD,
    VARLEN_FORWARD,
)

# The operators' names of arguments that have another one here.
_OPERATOR_NAMES = {
    "p_dropout": "dropout_p",
    "is_causal": "causal",
    "is_rotary_interleaved": "rotary_interleaved",
}


def _arguments(operator, given: dict) -> tuple:
    """Return the operator's arguments of those that an entry point was given, by their names."""
    named = {_OPERATOR_NAMES.get(name, name): x for name, x in given.items()}
    return operator.converted(operator.named(named))


def _reject_generator(given: dict) -> None:
    if given.get("generator") is not None:
        raise RuntimeError(
            "flash-attn: the RNG `generator` argument is no longer supported and must be None; "
            "dropout draws from torch's default generator, which torch.manual_seed seeds."
        )


def _attend(operator, given: dict) -> list:
    _reject_generator(given)
    results = list(operator.kernel(_arguments(operator, given), out=given["out"]))
    raise_versions(given["out"])
    return results


def _differentiate(operator, given: dict) -> list:
    _reject_generator(given)
    gradients = [_gradient(name, given[name], given["d" + name]) for name in ("q", "k", "v")]
    named = {**given, **dict(zip(("dq", "dk", "dv"), gradients))}
    softmax_d = operator.kernel(_arguments(operator, named))
    raise_versions(given["dq"], given["dk"], given["dv"])
    return [*gradients, softmax_d]


def _gradient(name, x, grad):
    """Return ``grad``, allocated like ``x`` if it is None."""
    if grad is not None:
        return grad
    if not isinstance(x, Tensor):
        raise wrong_kind(name, x)
    return new_gradient(x)


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
    return _attend(FORWARD, locals())


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
    return _attend(VARLEN_FORWARD, locals())


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
    return _differentiate(BACKWARD, locals())


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
    return _differentiate(VARLEN_BACKWARD, locals())


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
    is_appending = k is not None or v is not None
    return _attend(KVCACHE_APPEND if is_appending else KVCACHE, locals())
