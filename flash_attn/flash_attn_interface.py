"""Exact attention: the functions of FlashAttention-2's Python interface.

Notation: batch, seqlen_q and seqlen_k, nheads and nheads_k (nheads % nheads_k == 0: query head i
reads key-value head ``i // (nheads // nheads_k)``), headdim of q and k, headdim_v of v and out (it
may differ), total_q and total_k the number of tokens of all sequences of a packed ("varlen") batch.

What the softmax sees is ``x = softcap(softmax_scale * q @ k.T) - alibi + attn_bias`` over the
visible keys. Query i of a sequence sees key j iff ``i + d - left <= j <= i + d + right`` with ``d =
seqlen_k - seqlen_q`` and ``window_size = (left, right)``, -1 meaning no limit: masks are aligned to
the bottom right corner. A query that sees no key gives out 0 and softmax_lse +inf.

Arguments shared by all functions:

- q, k, v: fp16, bf16 or fp32, all the same, on one device; head dims 1 to 576. A tensor whose last
  dimension lacks unit stride is copied. ``torch.autocast`` does not change them, as it does not
  for FlashAttention-2: cast what differs, ``k.to(q.dtype)``; mixed dtypes raise RuntimeError.
- dropout_p: probability in [0, 1) to drop an attention weight; 0.0 in evaluation. The random
  numbers come from torch's default CPU generator (``torch.manual_seed``).
- softmax_scale: default ``headdim ** -0.5``.
- causal: a query sees no later key (right = 0).
- window_size: (left, right), ints or 0-dim tensors.
- softcap: > 0 replaces a score x by ``softcap * tanh(x / softcap)``.
- alibi_slopes: fp32 (nheads,) or (batch, nheads): ``slope * |i + seqlen_k - seqlen_q - j|`` is
  subtracted from the score.
- deterministic: accepted for compatibility; forward and backward are always deterministic.
- s_aux: "attention sinks", (nheads,) fp16, bf16 or fp32: a logit without value that joins each
  row's softmax denominator and softmax_lse. Differentiable.
- attn_bias: dtype of q or fp32, broadcastable to (batch, nheads, seqlen_q, seqlen_k) (varlen: the
  longest seqlens, indexed within each sequence); -inf gives a key the weight 0, so
  ``torch.where(mask, 0.0, -torch.inf)`` is the bias of a boolean mask (a weight of 0 times NaN or
  inf in v is NaN, as in plain PyTorch; masks hide keys altogether). Differentiable.
- return_attn_probs: also return softmax_lse and S_dmask.

Numbers may be Python's, numpy's or tensors of one element. A batch may hold no sequence.

softmax_lse is fp32, the natural logarithm of the softmax denominator, and differentiable. S_dmask,
of q's dtype and shape (batch, nheads, seqlen_q and seqlen_k rounded up to 128), is for tests only:
exp(score - running row maximum), negative where dropped; its shape is (0,) unless dropout_p > 0.

Invalid arguments raise RuntimeError before anything is written, among them a tensor to write to
that shares memory with another one (views that interleave do not). What is not a tensor or number
raises TypeError, memory that runs out raises MemoryError.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

import flash_attn_2_cuda as flash_attn_gpu
from flash_attn import _autograd  # noqa: F401  (registers the operators and their gradients)
from flash_attn._arguments import (
    as_int,
    check_tensors,
    explained,
    flag,
    four_dims,
    number,
    wrong_kind,
    wrong_pair,
)
from flash_attn._buffers import maybe_contiguous, round_multiple
from flash_attn._eager import refuse_derivatives, run
from flash_attn._functions import (  # noqa: F401  (other packages import some from here)
    FORWARD,
    KVCACHE,
    KVCACHE_APPEND,
    VARLEN_FORWARD,
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]

USE_TRITON_ROCM = False

_NO_PART_OF_KEYS = (None, None, False, 0)  # leftpad_k, seqused_k, zero_tensors, num_splits

_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward


def _get_block_size_n(device, head_dim, is_dropout, is_causal):
    """Return the number of keys in a block: S_dmask's running maximum changes at its multiples."""
    if head_dim <= 32:
        return 128
    if head_dim <= 64:
        return 64 if is_dropout else 128
    if head_dim <= 96 or head_dim > 128:
        return 64
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 6), (8, 9)):
        return 64 if is_causal and not is_dropout else 32
    return 32 if is_dropout else 64


def _default_scale(q: Tensor) -> float:
    try:
        shape = q.shape if isinstance(q, Tensor) else ()
    except RuntimeError as error:  # a nested tensor has no shape
        raise explained(error, {"q": q}) from None
    return shape[-1] ** -0.5 if shape and shape[-1] else 1.0


def _score(q, dropout_p, softmax_scale, causal, window_size, softcap) -> tuple:
    """Return the operators' arguments from dropout_p to softcap."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise wrong_pair("window_size", window_size) from None
    return (
        float(dropout_p) if dropout_p.__class__ is float else number("dropout_p", dropout_p),
        _default_scale(q) if softmax_scale is None else number("softmax_scale", softmax_scale),
        bool(causal) if causal.__class__ is bool else flag("causal", causal),
        left if left.__class__ is int else as_int("window_size[0]", left),
        right if right.__class__ is int else as_int("window_size[1]", right),
        float(softcap) if softcap.__class__ is float else number("softcap", softcap),
    )


def _same_lengths(q: Tensor, length: int, device) -> Tensor:
    """Return cache_seqlens, int32 (batch,), of sequences of one length."""
    length = as_int("cache_seqlens", length)
    try:
        return torch.full(q.shape[:1], length, dtype=torch.int32, device=device)
    except (OverflowError, RuntimeError) as error:
        if length >= 2**31 or length < -(2**31):
            raise ValueError(f"cache_seqlens must be an int32, got {length}") from None
        raise explained(error, {"q": q}) from None


def _has_unit_last_stride(cache: Tensor) -> bool:
    try:  # the stride first: is_contiguous() may ask for lengths that are not known yet
        return cache.stride(-1) == 1 or cache.is_contiguous()
    except (IndexError, RuntimeError):  # it has no such stride, which the call will say
        return True


def _unpack(name: str, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split (..., parts, nheads, headdim) into its parts; they share one gradient tensor."""
    if not isinstance(packed, Tensor):
        raise wrong_kind(name, packed)
    if packed.dim() < 3 or packed.shape[-3] != parts:
        raise RuntimeError(
            f"{name} must have shape (..., {parts}, nheads, headdim), got {tuple(packed.shape)}"
        )
    return packed.unbind(-3)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
):
    """Attention of a dense batch.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k: (batch, seqlen_k, nheads_k, headdim), dtype of q under ``torch.autocast``, too.
        v: (batch, seqlen_k, nheads_k, headdim_v), likewise.

    The other arguments are described at the head of this module.

    Returns:
        out, (batch, seqlen_q, nheads, headdim_v), dtype of q; with ``return_attn_probs``
        (out, softmax_lse, S_dmask), softmax_lse fp32 (batch, nheads, seqlen_q).

    Raises:
        RuntimeError: an argument is invalid; the message names it.
        MemoryError: memory ran out.
    """
    score = _score(q, dropout_p, softmax_scale, causal, window_size, softcap)
    return_s_dmask = flag("return_attn_probs", return_attn_probs) and score[0] > 0.0
    args = (q, k, v, *score, alibi_slopes, return_s_dmask, s_aux, four_dims(attn_bias))
    out, softmax_lse, s_dmask, _ = run(FORWARD, args, return_attn_probs)
    return (out, softmax_lse, s_dmask) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
):
    """Attention of a dense batch whose k and v are one tensor, and so is their gradient.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        kv: (batch, seqlen_k, 2, nheads_k, headdim).

    Other arguments, results and errors are those of flash_attn_func.
    """
    k, v = _unpack("kv", kv, 2)
    score = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    extensions = {"s_aux": s_aux, "attn_bias": attn_bias}
    return flash_attn_func(q, k, v, *score, return_attn_probs, **extensions)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
):
    """Attention of a dense batch whose q, k and v are one tensor, and so is their gradient.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim).

    Other arguments, results and errors are those of flash_attn_func.
    """
    q, k, v = _unpack("qkv", qkv, 3)
    score = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    extensions = {"s_aux": s_aux, "attn_bias": attn_bias}
    return flash_attn_func(q, k, v, *score, return_attn_probs, **extensions)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Union[int, Tensor],
    max_seqlen_k: Union[int, Tensor],
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Optional[Tensor] = None,
    *,
    s_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
):
    """Attention of a packed batch: sequences of different lengths, one after the other.

    Args:
        q: (total_q, nheads, headdim).
        k: (total_k, nheads_k, headdim); with block_table (num_pages, page_size, nheads_k, headdim).
        v: as k, with headdim_v.
        cu_seqlens_q: int32 (batch + 1), ascending from 0: sequence s has queries
            ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]``, which may be none.
        cu_seqlens_k: int32 (batch + 1), the same for keys.
        max_seqlen_q: the longest sequence of queries or more, int or 0-dim tensor.
        max_seqlen_k: the same for keys.
        block_table: int32 (batch, max_pages_per_sequence), the pages of each sequence; no backward.

    The other arguments are described at the head of this module.

    Returns:
        out, (total_q, nheads, headdim_v), dtype of q, 0 in rows of no sequence; with
        ``return_attn_probs`` (out, softmax_lse, S_dmask), softmax_lse fp32 (nheads, total_q).

    Raises:
        RuntimeError: an argument is invalid; the message names it.
        MemoryError: memory ran out.
    """
    max_seqlens = as_int("max_seqlen_q", max_seqlen_q), as_int("max_seqlen_k", max_seqlen_k)
    score = _score(q, dropout_p, softmax_scale, causal, window_size, softcap)
    return_s_dmask = flag("return_attn_probs", return_attn_probs) and score[0] > 0.0
    args = (
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, *max_seqlens),
        *score,
        alibi_slopes,
        return_s_dmask,
        block_table,
        *_NO_PART_OF_KEYS,
        s_aux,
        four_dims(attn_bias),
    )
    out, softmax_lse, s_dmask, _ = run(VARLEN_FORWARD, args, return_attn_probs)
    return (out, softmax_lse, s_dmask) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Union[int, Tensor],
    max_seqlen_k: Union[int, Tensor],
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
):
    """Attention of a packed batch whose k and v are one tensor, and so is their gradient.

    Args:
        q: (total_q, nheads, headdim).
        kv: (total_k, 2, nheads_k, headdim).

    Other arguments, results and errors are those of flash_attn_varlen_func.
    """
    k, v = _unpack("kv", kv, 2)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    score = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    extensions = {"s_aux": s_aux, "attn_bias": attn_bias}
    return flash_attn_varlen_func(q, k, v, *sequences, *score, return_attn_probs, **extensions)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: Union[int, Tensor],
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
):
    """Attention of a packed batch whose q, k and v are one tensor, and so is their gradient.

    Args:
        qkv: (total, 3, nheads, headdim).
        cu_seqlens: int32 (batch + 1), ascending from 0.
        max_seqlen: the longest sequence or more, int or 0-dim tensor.

    Other arguments, results and errors are those of flash_attn_varlen_func.
    """
    q, k, v = _unpack("qkv", qkv, 3)
    check_tensors(cu_seqlens=cu_seqlens)
    max_seqlen = as_int("max_seqlen", max_seqlen)
    sequences = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    score = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    extensions = {"s_aux": s_aux, "attn_bias": attn_bias}
    return flash_attn_varlen_func(q, k, v, *sequences, *score, return_attn_probs, **extensions)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Optional[Tensor] = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Optional[Tensor] = None,
):
    """Attention over a key-value cache, after appending new keys and values to it in place.

    There is no backward: the result never requires grad. Derivatives by torch.func and in forward
    mode raise RuntimeError.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k_cache: (batch_cache, seqlen_cache, nheads_k, headdim) with unit stride in the last
            dimension; with block_table (num_pages, page_size, nheads_k, headdim), any page size.
        v_cache: as k_cache, with headdim_v. May be a part of k_cache's rows (or the other way
            round); v is then the same part of k, and rotary embedding leaves it alone.
        k: (batch, seqlen_new, nheads_k, headdim), written to k_cache from ``cache_seqlens`` on.
        v: (batch, seqlen_new, nheads_k, headdim_v), written to v_cache; needed with k.
        rotary_cos: (seqlen_rotary, rotary_dim / 2), dtype of q, rotary_dim <= headdim: rotates k at
            positions ``cache_seqlens + i``, and q likewise if causal or windowed (by a window
            shorter than the cache), else at ``cache_seqlens``. Needs k; seqlen_rotary >=
            seqlen_cache, with block_table >= max_pages_per_sequence * page_size.
        rotary_sin: as rotary_cos.
        cache_seqlens: tokens in the cache before k is appended, an int or int32 (batch,). None,
            only without k: the whole cache.
        cache_batch_idx: int32 (batch,), the cache row of each sequence; default its own index.
        cache_leftpad: int32 (batch,), first valid index in the cache; default 0.
        block_table: int32 (batch, max_pages_per_sequence), the pages of each sequence.
        rotary_interleaved: rotate pairs (0, 1), (2, 3), ... or, if False, the two halves.
        num_splits: 0: a heuristic that depends on a sequence's own length alone; 1: no split;
            n: the keys are attended in n parts and merged.
        return_softmax_lse: also return softmax_lse.

    The other arguments are described at the head of this module. Keys count with those appended:
    seqlen_k is ``cache_seqlens + seqlen_new``. Arguments may be views of a cache as long as they
    share no memory with the rows that are appended; k and v may also be these rows.

    Returns:
        out, (batch, seqlen_q, nheads, headdim_v), dtype of q; with ``return_softmax_lse``
        (out, softmax_lse), softmax_lse fp32 (batch, nheads, seqlen_q).

    Raises:
        AssertionError: the last dimension of a cache has no unit stride.
        RuntimeError: an argument is invalid; the message names it, and the caches are as they were.
        MemoryError: memory ran out.
    """
    if not (isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor)):
        check_tensors(k_cache=k_cache, v_cache=v_cache)
    inputs = (q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, alibi_slopes, s_aux)
    refuse_derivatives("flash_attn_with_kvcache", *inputs)
    assert _has_unit_last_stride(k_cache), "k_cache must have contiguous last dimension"
    assert _has_unit_last_stride(v_cache), "v_cache must have contiguous last dimension"
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        check_tensors(q=q)
        cache_seqlens = _same_lengths(q, cache_seqlens, k_cache.device)
    _, *score = _score(q, 0.0, softmax_scale, causal, window_size, softcap)
    return_softmax_lse = flag("return_softmax_lse", return_softmax_lse)
    is_appending = k is not None or v is not None
    args = (
        *((q, k_cache, v_cache, k, v) if is_appending else (q, k_cache, v_cache)),
        *(cache_seqlens, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, block_table),
        alibi_slopes,
        *score,
        flag("rotary_interleaved", rotary_interleaved),
        as_int("num_splits", num_splits),
        s_aux,
    )
    out, softmax_lse = run(
        KVCACHE_APPEND if is_appending else KVCACHE, args, wants_all=return_softmax_lse
    )
    return (out, softmax_lse) if return_softmax_lse else out


class _Function:
    """A public function behind ``apply``: all arguments by position, then is_grad_enabled."""

    def __init_subclass__(cls, function):
        cls._function = staticmethod(function)

    @classmethod
    def apply(cls, *args):
        *args, is_grad_enabled = args
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_grad_enabled):
            return cls._function(*args)


class FlashAttnFunc(_Function, function=flash_attn_func):
    """``apply(*arguments of flash_attn_func, is_grad_enabled)``."""


class FlashAttnKVPackedFunc(_Function, function=flash_attn_kvpacked_func):
    """``apply(*arguments of flash_attn_kvpacked_func, is_grad_enabled)``."""


class FlashAttnQKVPackedFunc(_Function, function=flash_attn_qkvpacked_func):
    """``apply(*arguments of flash_attn_qkvpacked_func, is_grad_enabled)``."""


class FlashAttnVarlenFunc(_Function, function=flash_attn_varlen_func):
    """``apply(*arguments of flash_attn_varlen_func, is_grad_enabled)``."""


class FlashAttnVarlenKVPackedFunc(_Function, function=flash_attn_varlen_kvpacked_func):
    """``apply(*arguments of flash_attn_varlen_kvpacked_func, is_grad_enabled)``."""


class FlashAttnVarlenQKVPackedFunc(_Function, function=flash_attn_varlen_qkvpacked_func):
    """``apply(*arguments of flash_attn_varlen_qkvpacked_func, is_grad_enabled)``."""
