"""Attention composed of differentiable torch operations, for derivatives that have no kernel.

Forward-mode derivatives, derivatives of gradients and the gradient of alibi_slopes are derived from
it by torch, in fp32 and with memory for all scores. The kernels compute everything else.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from flash_attn._arguments import is_plain
from flash_attn._functions import FORWARD, VARLEN_FORWARD
from flash_attn._schema import Operator

# The forward operators' numbers: those that ``attention`` applies, and those that change nothing.
_APPLIED = {
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size_left",
    "window_size_right",
    "softcap",
}
_WITHOUT_EFFECT = {"return_softmax", "max_seqlen_q", "max_seqlen_k", "zero_tensors", "num_splits"}


class Settings:
    """What an attention call is besides its differentiable tensors.

    Attributes:
        cu_seqlens: () or (cu_seqlens_q, cu_seqlens_k).
        rng_state: int64 [2].
        dropout_p, softmax_scale and so on: the operator's numbers by their names.
    """

    def __init__(self, operator: Operator, numbers, cu_seqlens: tuple, rng_state: Optional[Tensor]):
        """Make the settings of a call of ``operator`` with ``numbers``, in its order.

        Raises RuntimeError for a number that is unknown here and not its default.
        """
        by_name = dict(zip((operator.names[place] for place in operator.numbers), numbers))
        for name in by_name.keys() - _APPLIED - _WITHOUT_EFFECT:
            if by_name[name] != operator.signature.parameters[name].default:
                raise RuntimeError(
                    f"{operator.name} has no derivative by torch operations with {name}: "
                    "flash_attn/_composition.py does not apply it"
                )
        vars(self).update(by_name, cu_seqlens=cu_seqlens, rng_state=rng_state)


def attention(settings: Settings, q, k, v, s_aux=None, attn_bias=None, alibi_slopes=None):
    """Return (out, softmax_lse) as the forward operators do.

    Args:
        settings: of the call.
        q, k, v: dense or packed, as the operators take them.
        s_aux: (nheads,) or None.
        attn_bias: broadcastable to (batch, nheads, seqlen_q, seqlen_k), or None.
        alibi_slopes: (nheads,) or (batch, nheads), or None.
    """
    keep = _kept(settings, q, k) if settings.dropout_p > 0.0 else None
    if not settings.cu_seqlens:
        return _attend(settings, q, k, v, s_aux, attn_bias, alibi_slopes, keep)
    return _attend_packed(settings, q, k, v, s_aux, attn_bias, alibi_slopes, keep)


def _attend_packed(settings, q, k, v, s_aux, attn_bias, alibi_slopes, keep):
    outs, lses = [], []
    starts_q, starts_k = (x.tolist() for x in settings.cu_seqlens)
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
        bias = _of_sequence(attn_bias, i, seqlen_q, seqlen_k)
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[i]
        kept = None if keep is None else keep[i : i + 1, :, :seqlen_q, :seqlen_k]
        out, lse = _attend(
            settings, q[None, rows], k[None, keys], v[None, keys], s_aux, bias, slopes, kept
        )
        outs.append(out[0])
        lses.append(lse[0])
    left = q.shape[0] - starts_q[-1]
    outs.append(q.new_zeros(left, q.shape[1], v.shape[-1]))
    lses.append(q.new_full((q.shape[1], left), -math.inf, dtype=torch.float32))
    return torch.cat(outs), torch.cat(lses, dim=1)


def _of_sequence(bias, i: int, seqlen_q: int, seqlen_k: int):
    """Return the part of a packed batch's bias that sequence i sees."""
    if bias is None:
        return None
    bias = bias if bias.shape[0] == 1 else bias[i : i + 1]
    bias = bias if bias.shape[2] == 1 else bias[:, :, :seqlen_q]
    return bias if bias.shape[3] == 1 else bias[..., :seqlen_k]


def _attend(settings, q, k, v, s_aux, attn_bias, alibi_slopes, keep):
    group = q.shape[2] // k.shape[2]
    q32, k32, v32 = (x.float().transpose(1, 2) for x in (q, k, v))
    k32, v32 = k32.repeat_interleave(group, 1), v32.repeat_interleave(group, 1)
    distance = _distance(q.shape[1], k.shape[1], q.device)
    hidden = ~_visible(settings, distance)
    apart = None if all(map(_is_finite, (q, k, v))) else hidden
    scores = _scores(q32 * settings.softmax_scale, k32, apart)
    if settings.softcap > 0.0:
        softcap = max(settings.softcap, 1e-30)  # its reciprocal is finite; exp() sees no difference
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * distance.abs()
    if attn_bias is not None:
        scores = scores + attn_bias.float()
    scores = scores.masked_fill(hidden, -math.inf)
    weights, total, lse = _softmax(scores, s_aux)
    if keep is not None:
        weights = weights * keep / (1.0 - settings.dropout_p)
    out = _weighted(weights / total, v32, apart)
    return out.transpose(1, 2).to(q.dtype), lse


def _is_finite(x: Tensor) -> bool:
    """Whether x is known to hold no NaN and no inf, or cannot be read."""
    x = unwrapped(x)
    if not is_plain(x) or x.is_meta or torch._C._len_torch_dispatch_stack():
        return True
    with torch.no_grad(), torch._C._DisableFuncTorch():
        return bool(x.isfinite().all())


def _scores(q, k, hidden):
    """Return q @ k.T; ``hidden``: the pairs to keep apart because 0 * NaN is not 0, or None."""
    if hidden is None:
        return q @ k.transpose(-1, -2)
    return (_pairs(q.unsqueeze(-2), hidden) * _pairs(k.unsqueeze(-3), hidden)).sum(-1)


def _weighted(weights, v, hidden):
    """Return weights @ v, as ``_scores`` does."""
    if hidden is None:
        return weights @ v
    weights = weights.masked_fill(hidden, 0.0)
    return (weights.unsqueeze(-1) * _pairs(v.unsqueeze(-3), hidden)).sum(-2)


def _pairs(x, hidden):
    """Return the vectors of all pairs of a row and a key, (..., rows, keys, headdim), or zeros."""
    return x.masked_fill(hidden.unsqueeze(-1), 0.0)


def _softmax(scores, s_aux):
    """Return unnormalised weights, their row sums (1 where there are none) and softmax_lse."""
    largest = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full(
        (*scores.shape[:-1], 1), -math.inf
    )  # fmt: skip
    if s_aux is not None:
        sink = s_aux.float()[:, None, None]
        largest = torch.maximum(largest, sink.detach())
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + torch.exp(sink - largest)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    lse = (largest + torch.log(total)).masked_fill(empty, math.inf)
    return weights, total, lse.squeeze(-1)


def _distance(seqlen_q: int, seqlen_k: int, device) -> Tensor:
    """Return how far each key lies before the query that both sequences end with, (sq, sk)."""
    rows = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    return rows - torch.arange(seqlen_k, device=device)


def _visible(settings: Settings, distance: Tensor) -> Tensor:
    left, right = settings.window_size_left, settings.window_size_right
    right = 0 if settings.causal else right
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance <= left)
    if right >= 0:
        seen = seen & (-distance <= right)
    return seen


def _kept(settings: Settings, q, k) -> Tensor:
    """Return what dropout keeps, bool (batch, nheads, rows, keys); S_dmask's signs tell."""
    nheads = q.shape[-2]
    with torch.no_grad(), torch._C._DisableFuncTorch():
        if settings.cu_seqlens:
            zeros = [torch.zeros(x.shape[0], nheads, 1) for x in (q, k)]
            return ~torch.signbit(_s_dmask_of(VARLEN_FORWARD, settings, *zeros))
        zeros = [torch.zeros(*x.shape[:2], nheads, 1) for x in (q, k)]
        s_dmask = _s_dmask_of(FORWARD, settings, *zeros)
        return ~torch.signbit(s_dmask[..., : q.shape[1], : k.shape[1]])


def _s_dmask_of(operator: Operator, settings: Settings, q, k) -> Tensor:
    given = {**vars(settings), "q": q, "k": k, "v": k, "return_softmax": True}
    given.update(zip(("cu_seqlens_q", "cu_seqlens_k"), settings.cu_seqlens))
    return operator.kernel(operator.named(given), rng_state=settings.rng_state)[2]


def unwrapped(x: Tensor) -> Tensor:
    """Return a tensor without torch.func's wrappers."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x
