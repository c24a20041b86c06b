"""Attention of FlashAttention-3's batches by this package's operators, with their derivatives."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn._arguments import as_int, check_tensors, is_plain, wrong_kind
from flash_attn._eager import run
from flash_attn._functions import (
    BACKWARD,
    FORWARD,
    FP8_FORWARD,
    FP8_VARLEN_FORWARD,
    VARLEN_BACKWARD,
    VARLEN_FORWARD,
)
from flash_attn.v3 import _sequences as sequences_of
from flash_attn.v3._arguments import (
    Quantization,
    Score,
    check_cumulative,
    check_int32,
    check_used,
)
from flash_attn.v3._sequences import Lengths, Sequences, used_lengths

_NO_DMASK_NOR_PAGES = (False, None, None, None, False)  # to zero_tensors


def check_query_of_values(q: Tensor, k: Tensor, v: Tensor, qv: Tensor) -> None:
    """Raise for a ``qv`` that does not belong to q and v."""
    check_tensors(q=q, k=k, v=v, qv=qv)
    if qv.shape != (*q.shape[:-1], v.shape[-1]):
        raise ValueError(
            f"qv must have shape {(*q.shape[:-1], v.shape[-1])}, as q with the head dimension of "
            f"v, got {tuple(qv.shape)}"
        )
    if qv.dtype != q.dtype or qv.device != q.device:
        raise ValueError(
            f"qv must have the dtype and device of q, {q.dtype} on {q.device}, got {qv.dtype} on "
            f"{qv.device}"
        )
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"with qv, v must have the rows and heads of k, {tuple(k.shape[:-1])}, got "
            f"{tuple(v.shape[:-1])}"
        )


def with_query_of_values(q: Tensor, k: Tensor, v: Tensor, qv: Optional[Tensor]):
    """Return q and k of scores ``q @ k.T + qv @ v.T``.

    k and v that lie side by side in memory, as in a cache of latent attention, become one view; a
    gradient, torch.compile, or another place in memory, takes a copy of them.
    """
    if qv is None:
        return q, k
    check_query_of_values(q, k, v, qv)
    if _share_memory(k, v):
        shape = (*k.shape[:-1], k.shape[-1] + v.shape[-1])
        if v.storage_offset() + v.shape[-1] == k.storage_offset():
            return torch.cat([qv, q], -1), v.as_strided(shape, v.stride())
        if k.storage_offset() + k.shape[-1] == v.storage_offset():
            return torch.cat([q, qv], -1), k.as_strided(shape, k.stride())
    return torch.cat([q, qv], -1), torch.cat([k, v], -1)


def _share_memory(k: Tensor, v: Tensor) -> bool:
    """Whether k and v may be read as one tensor: compiled graphs and gradients know them apart."""
    if torch.compiler.is_compiling() or not (is_plain(k) and is_plain(v)):
        return False
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        return False
    if k.dtype != v.dtype or not torch._C._is_alias_of(k, v):
        return False
    # A dimension of one element has any stride: that of unsqueeze() is the length of the next.
    sizes, steps = k.shape[:-1], zip(k.stride(), v.stride())
    return k.stride(-1) == 1 and all(n == 1 or a == b for n, (a, b) in zip((*sizes, 2), steps))


# ------------------------------------------------------------------------------------------------
# Sequences as callers give them


def _rows_of(name: str, x: Tensor, cu_seqlens: Optional[Tensor], max_seqlen):
    """Return (rows, cu_seqlens, max_seqlen) of a packed or a dense batch.

    Args:
        x: (total, nheads, headdim) with cu_seqlens, else (batch, seqlen, nheads, headdim).
    """
    if cu_seqlens is not None:
        check_int32(f"cu_seqlens_{name}", cu_seqlens)
        if max_seqlen is None:
            raise ValueError(f"max_seqlen_{name} must be provided if cu_seqlens_{name} is provided")
        return x, cu_seqlens, as_int(f"max_seqlen_{name}", max_seqlen)
    if x.dim() != 4:
        raise ValueError(
            f"{name} must have shape (batch, seqlen, nheads, headdim) without cu_seqlens_{name}, "
            f"got {tuple(x.shape)}"
        )
    batch, seqlen = x.shape[:2]
    return x.flatten(0, 1), sequences_of.constant(batch, seqlen, x.device), seqlen


def _check_batch(sequences: Sequences) -> int:
    batch, batch_k = (x.shape[0] - 1 for x in sequences[:2])
    if batch != batch_k or batch < 0:
        raise ValueError(
            f"q and k must have the same number of sequences, got {batch} and {batch_k}"
        )
    return batch


def _lengths(sequences: Sequences, seqused_q, seqused_k) -> Lengths:
    """Return the used lengths, which are checked."""
    batch = _check_batch(sequences)
    for name, used, cu_seqlens in zip(("q", "k"), (seqused_q, seqused_k), sequences[:2]):
        if used is not None:
            check_int32(f"seqused_{name}", used, batch)
            check_used(f"seqused_{name}", used, cu_seqlens.diff())
    return used_lengths(sequences, seqused_q, seqused_k)


def _cut(sequences: Sequences, rows: tuple, lengths, all_used: bool, chunk: int) -> Sequences:
    """Return ``sequences_of.cut`` of sequences in tensors with ``rows``, q and k.

    The operators check what they get: where that is cut, what it is cut from is checked here.
    """
    cut = sequences_of.cut(sequences, lengths, all_used, chunk)
    if cut is not sequences:
        for name, x, cu_seqlens, longest in zip("qk", rows, sequences[:2], sequences[2:]):
            check_cumulative(name, cu_seqlens, longest, x.shape[0])
    return cut


# ------------------------------------------------------------------------------------------------
# Forward


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    *,
    num_splits: int = 0,
    wants_lse: bool = True,
) -> tuple[Tensor, Optional[Tensor]]:
    """Return (out, softmax_lse) of a batch whose queries and keys are dense or packed, each.

    softmax_lse is fp32 (batch, nheads, seqlen_q), or (nheads, total_q) of packed queries, with -inf
    in rows that see no key, and +inf if there is no key at all; None if it is not wanted. Rows past
    ``seqused_q`` are 0 and -inf.
    """
    check_tensors(q=q, k=k, v=v)
    is_dense = cu_seqlens_q is None and cu_seqlens_k is None
    if is_dense and seqused_q is None and seqused_k is None and not score.attention_chunk:
        if score.quantization is None:
            args = (q, k, v, *score.operators, None, False, score.s_aux, None)
            out, lse, *_ = run(FORWARD, args, wants_lse)
        else:
            args = (q, k, v, *score.operators[1:], score.s_aux, *score.quantization)
            out, lse = run(FP8_FORWARD, args, wants_lse)
        if wants_lse and lse.dim() == 3:
            lse = sequences_of.mark_dense(lse, score, k.shape[1])
        return out, lse if wants_lse else None
    rows, cu_seqlens_q, max_seqlen_q = _rows_of("q", q, cu_seqlens_q, max_seqlen_q)
    keys, starts_k, max_seqlen_k = _rows_of("k", k, cu_seqlens_k, max_seqlen_k)
    values = v if cu_seqlens_k is not None else _rows_of("v", v, None, None)[0]
    sequences = Sequences(cu_seqlens_q, starts_k, max_seqlen_q, max_seqlen_k)
    out, lse = _attend_packed(
        rows, keys, values, score, sequences, seqused_q, seqused_k, num_splits, wants_lse
    )
    if q.dim() == 4:
        out = out.reshape(*q.shape[:3], out.shape[-1])
        if lse is not None:
            lse = lse.reshape(q.shape[2], *q.shape[:2]).transpose(0, 1).contiguous()
    return out, lse


def _attend_packed(
    q, k, v, score, sequences: Sequences, seqused_q, seqused_k, num_splits, wants_lse
):
    all_used = seqused_q is None and seqused_k is None
    lengths = None
    if not all_used or score.attention_chunk or wants_lse:
        lengths = _lengths(sequences, seqused_q, seqused_k)
    cut = _cut(sequences, (q, k), lengths, all_used, score.attention_chunk)
    if score.quantization is None:
        args = (
            *(q, k, v, *cut, *score.operators, None, *_NO_DMASK_NOR_PAGES, num_splits),
            *(score.s_aux, None),
        )
        out, lse, *_ = run(VARLEN_FORWARD, args, wants_lse)
    else:
        factors = factors_of_pieces(score, sequences.cu_seqlens_q, cut.cu_seqlens_q)
        args = (
            *(q, k, v, *cut, *score.operators[1:], None, None, None, num_splits),
            *(score.s_aux, *factors),
        )
        out, lse = run(FP8_VARLEN_FORWARD, args, wants_lse)
    if not wants_lse:
        return out, None
    if sequences.max_seqlen_k:  # else no key at all: +inf
        lse = sequences_of.mark_packed(lse, score, sequences.cu_seqlens_q, lengths)
    return out, lse


def factors_of_pieces(score: Score, cu_seqlens: Tensor, cut: Tensor) -> Quantization:
    """Return the factors of sequences that were cut into pieces, as many of each."""
    batch, pieces = cu_seqlens.shape[0] - 1, cut.shape[0] - 1
    return score.quantization if pieces == batch else score.quantization.repeated(pieces // batch)


# ------------------------------------------------------------------------------------------------
# Backward


def _buffer(name: str, given: Optional[Tensor], x: Tensor) -> tuple[Tensor, bool]:
    """Return a tensor like the rows of ``x`` to write its gradient to, and if it is the caller's.

    The caller's is (batch, seqlen, nheads, headdim) or packed, and may have any strides.
    """
    if given is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format), False
    if not isinstance(given, Tensor):
        raise wrong_kind(name, given)
    if given.dim() == x.dim():
        return given, True
    if given.dim() == 4 and given.flatten(0, 1).shape == x.shape:
        try:
            return given.view(x.shape), True
        except RuntimeError:  # its strides do not allow it
            return torch.empty_like(x, memory_format=torch.contiguous_format), False
    raise ValueError(f"{name} must have {x.dim()} dimensions, got shape {tuple(given.shape)}")


def differentiate(
    dout: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]],
    score: Score,
    sequences: tuple,
    deterministic: bool = False,
) -> Tensor:
    """Write the gradients of ``attend``, where given, and return softmax_d.

    Args:
        dout: gradient of out.
        tensors: q, k, v, out, softmax_lse; the last with -inf or +inf in rows without keys.
        gradients: dq, dk, dv, contiguous in their last dimension.
        sequences: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k;
            any of them None.

    softmax_d, fp32, is rowsum(dout * out): (batch, nheads, seqlen_q rounded up to 128), or of
    packed queries (nheads, total_q + 128 * sequences).
    """
    q, k, v, out, lse = tensors
    check_tensors(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # what the operators' forward has
    numbers = (*score.operators, None, bool(deterministic), None)
    with torch.no_grad():
        if all(x is None for x in sequences[:2] + sequences[4:]):
            args = (dout, q, k, v, out, lse, *gradients, *numbers, None, None, None, None, None)
            return run(BACKWARD, args)
        return _differentiate_packed(dout, (q, k, v, out, lse), gradients, numbers, sequences)


def _differentiate_packed(dout, tensors, gradients, numbers, sequences) -> Tensor:
    q, k, v, out, lse = tensors
    cu_q, cu_k, max_q, max_k, seqused_q, seqused_k = sequences
    rows, starts_q, max_q = _rows_of("q", q, cu_q, max_q)
    keys, starts_k, max_k = _rows_of("k", k, cu_k, max_k)
    values = v if cu_k is not None else _rows_of("v", v, None, None)[0]
    if cu_q is None:
        dout, out = dout.flatten(0, 1), out.flatten(0, 1)
        lse = lse.transpose(0, 1).flatten(1)
    given = Sequences(starts_q, starts_k, max_q, max_k)
    all_used = seqused_q is None and seqused_k is None
    lengths = None if all_used else _lengths(given, seqused_q, seqused_k)
    cut = _cut(given, (rows, keys), lengths, all_used, 0)
    buffers = [
        _buffer(f"d{name}", grad, x)
        for name, grad, x in zip("qkv", gradients, (rows, keys, values))
    ]
    args = (
        *(dout, rows, keys, values, out, lse, *(buffer for buffer, _ in buffers), *cut),
        *(*numbers, False, None, None, None, None, None),
    )
    softmax_d = run(VARLEN_BACKWARD, args)
    for grad, (buffer, is_own) in zip(gradients, buffers):
        if grad is not None and not is_own:
            grad.copy_(buffer.view(grad.shape))
    return softmax_d
