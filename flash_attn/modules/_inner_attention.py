"""Attention as modules without weights: through the kernels, and composed of torch operations.

Both kinds have the same arguments and semantics, those of ``flash_attn.flash_attn_interface``:
masks are aligned to the bottom right corner, query head i reads key-value head ``i // (nheads //
nheads_k)``, and a query that sees no key gives 0. The composed kind takes any floating dtype and a
mask of padding, and holds all scores in memory; the other one takes packed sequences.
"""

from __future__ import annotations

from functools import reduce
from typing import Optional

import torch
from torch import Tensor, nn

from flash_attn._arguments import as_int, check_optional, check_tensors, wrong_pair
from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "SelfAttention",
    "get_alibi_slopes",
]


def get_alibi_slopes(nheads: int) -> list[float]:
    """Return each head's ALiBi slope (https://arxiv.org/abs/2108.12409).

    For a power of two, head i of n has 2 ** (-8 (i + 1) / n). Otherwise these are the slopes of the
    next lower power, followed by every second one of twice as many heads.

    Raises:
        ValueError: ``nheads`` is not positive.
    """
    nheads = as_int("nheads", nheads)
    if nheads < 1:
        raise ValueError(f"nheads must be positive, got {nheads}")
    power = 1 << (nheads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return slopes + between[: nheads - power]


class _Attention(nn.Module):
    """What the four modules have in common: how scores become weights."""

    def __init__(
        self, causal, softmax_scale, attention_dropout, window_size, alibi_slopes, softcap
    ):
        super().__init__()
        check_optional(alibi_slopes=alibi_slopes)
        self.softcap = softcap
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.window_size = window_size
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def _apply(self, fn, *args, **kwargs):
        """Move the slopes, but do not round them, where ``half()`` and the like cast a model."""
        slopes = self.alibi_slopes
        super()._apply(fn, *args, **kwargs)
        if slopes is not None and not slopes.is_meta and not self.alibi_slopes.is_meta:
            self.alibi_slopes = slopes.to(self.alibi_slopes.device)
        return self

    def _is_causal(self, causal: Optional[bool]) -> bool:
        return self.causal if causal is None else causal


class _FlashAttention(_Attention):
    def __init__(self, *score, deterministic):
        super().__init__(*score)
        self.deterministic = deterministic

    def _score(self, causal: Optional[bool], s_aux: Optional[Tensor]) -> dict:
        """Arguments of the functions from dropout_p to deterministic, and s_aux."""
        check_optional(s_aux=s_aux)
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self._is_causal(causal),
            "window_size": self.window_size,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
            "s_aux": s_aux,
        }


def _check_given(needed_by: str, **arguments) -> None:
    """Raise ValueError for an argument that another one needs and that is not there."""
    for name, x in arguments.items():
        if x is None:
            raise ValueError(f"{needed_by} needs {name}")


class FlashSelfAttention(_FlashAttention):
    """Attention of packed qkv through the kernels."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: Optional[float] = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Optional[Tensor] = None,
        deterministic: bool = False,
        *,
        softcap: float = 0.0,
    ):
        """Make the module.

        Args:
            causal: whether a query sees no later key.
            softmax_scale: default ``headdim ** -0.5``.
            attention_dropout: probability to drop a weight in training.
            window_size: (left, right), -1: no limit.
            alibi_slopes: fp32 ``(nheads,)`` or ``(batch, nheads)``.
            deterministic: accepted for compatibility; the backward is always deterministic.
            softcap: > 0 replaces a score x by ``softcap * tanh(x / softcap)``.
        """
        score = (causal, softmax_scale, attention_dropout, window_size, alibi_slopes, softcap)
        super().__init__(*score, deterministic=deterministic)

    def forward(
        self,
        qkv: Tensor,
        causal: Optional[bool] = None,
        cu_seqlens: Optional[Tensor] = None,
        max_seqlen: Optional[int] = None,
        *,
        s_aux: Optional[Tensor] = None,
    ) -> Tensor:
        """Attend.

        Args:
            qkv: fp16, bf16 or fp32 ``(batch, seqlen, 3, nheads, headdim)``, or with ``cu_seqlens``
                ``(total, 3, nheads, headdim)``.
            causal: in place of the module's; None: the module's.
            cu_seqlens: int32 ``(batch + 1,)``, where packed sequences start and end.
            max_seqlen: the longest sequence or more; needed with ``cu_seqlens``.
            s_aux: ``(nheads,)``, logits without value that join each row's softmax (sinks).

        Returns:
            ``(batch, seqlen, nheads, headdim)`` or ``(total, nheads, headdim)``, dtype of qkv.

        Raises:
            ValueError: ``cu_seqlens`` without ``max_seqlen``.
            RuntimeError: another argument is invalid; the message names it.
        """
        check_tensors(qkv=qkv)
        check_optional(cu_seqlens=cu_seqlens)
        score = self._score(causal, s_aux)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **score)
        _check_given("cu_seqlens", max_seqlen=max_seqlen)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **score)


class FlashCrossAttention(_FlashAttention):
    """Attention of queries over packed kv through the kernels."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: Optional[float] = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Optional[Tensor] = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
        *,
        softcap: float = 0.0,
    ):
        """Make the module; the arguments are those of ``FlashSelfAttention``, in another order."""
        score = (causal, softmax_scale, attention_dropout, window_size, alibi_slopes, softcap)
        super().__init__(*score, deterministic=deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: Optional[bool] = None,
        cu_seqlens: Optional[Tensor] = None,
        max_seqlen: Optional[int] = None,
        cu_seqlens_k: Optional[Tensor] = None,
        max_seqlen_k: Optional[int] = None,
        *,
        s_aux: Optional[Tensor] = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: fp16, bf16 or fp32 ``(batch, seqlen_q, nheads, headdim)``, or with ``cu_seqlens``
                ``(total_q, nheads, headdim)``.
            kv: ``(batch, seqlen_k, 2, nheads_k, headdim)`` or ``(total_k, 2, nheads_k, headdim)``,
                dtype of q.
            causal: in place of the module's; None: the module's.
            cu_seqlens: int32 ``(batch + 1,)``, where packed sequences of queries start and end.
            max_seqlen: the longest of them or more.
            cu_seqlens_k, max_seqlen_k: the same for keys.
            s_aux: as for ``FlashSelfAttention``.

        Returns:
            Of q's shape and dtype.

        Raises:
            ValueError: of the last four arguments some are given, and one that they need is not.
            RuntimeError: another argument is invalid; the message names it.
        """
        check_tensors(q=q, kv=kv)
        check_optional(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
        score = self._score(causal, s_aux)
        if cu_seqlens is None:
            if cu_seqlens_k is not None:
                raise ValueError("cu_seqlens_k needs cu_seqlens")
            return flash_attn_kvpacked_func(q, kv, **score)
        needed = {"max_seqlen": max_seqlen, "cu_seqlens_k": cu_seqlens_k}
        _check_given("cu_seqlens", **needed, max_seqlen_k=max_seqlen_k)
        sequences = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, *sequences, **score)


def _distance(seqlen_q: int, seqlen_k, num_keys: int, device) -> Tensor:
    """Return how far each key lies before each query, ``(..., seqlen_q, num_keys)``.

    ``seqlen_k``, an int or ``(batch, 1, 1, 1)``, is where keys end, with the queries.
    """
    row = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    return row - torch.arange(num_keys, device=device)


def _softmax(scores: Tensor, s_aux: Optional[Tensor]) -> Tensor:
    """Return the weights of scores ``(batch, nheads, seqlen_q, seqlen_k)``."""
    if s_aux is None:
        return scores.softmax(-1)
    sinks = s_aux.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]


class _ComposedAttention(_Attention):
    def _hidden(self, distance: Tensor, causal, key_padding_mask) -> Optional[Tensor]:
        """Return where a query does not see a key, to broadcast to the scores; None: nowhere."""
        try:
            left, right = self.window_size
        except (TypeError, ValueError):
            raise wrong_pair("window_size", self.window_size) from None
        right = 0 if self._is_causal(causal) else right
        parts = []
        if left >= 0:
            parts.append(distance > left)
        if right >= 0:
            parts.append(distance < -right)
        if key_padding_mask is not None:
            parts.append(~key_padding_mask[:, None, None])
        return reduce(torch.logical_or, parts) if parts else None

    def _scores(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor:
        """Return the scores ``(batch, nheads, seqlen_q, seqlen_k)``, fp32 or more precise."""
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32))
        if self.softcap > 0.0:
            scores = self.softcap * (scores / self.softcap).tanh()
        if self.alibi_slopes is None:
            return scores
        slopes = self.alibi_slopes.to(scores.dtype)
        return scores - slopes[..., None, None] * distance.abs()

    def _attend(self, q, k, v, distance, hidden, s_aux) -> Tensor:
        check_optional(s_aux=s_aux)
        scores = self._scores(q, k, distance)
        if hidden is not None:
            # Finite, and then 0: a row that sees nothing has no NaN, not in the gradient either.
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = _softmax(scores, s_aux)
        if hidden is not None:
            weights = weights.masked_fill(hidden, 0.0)
        return torch.einsum("bhqk,bkhd->bqhd", self.drop(weights.to(v.dtype)), v)


def _check_packed(name: str, x: Tensor, parts: int) -> None:
    check_tensors(**{name: x})
    if x.dim() != 5 or x.shape[2] != parts:
        raise ValueError(
            f"{name} must be (batch, seqlen, {parts}, nheads, headdim), got {tuple(x.shape)}"
        )


def _checked_padding(key_padding_mask: Optional[Tensor], batch: int, seqlen: int):
    """Return the mask as bool."""
    check_optional(key_padding_mask=key_padding_mask)
    if key_padding_mask is None:
        return None
    if key_padding_mask.shape != (batch, seqlen):
        raise ValueError(
            f"key_padding_mask must be (batch, seqlen) = {(batch, seqlen)}, got "
            f"{tuple(key_padding_mask.shape)}"
        )
    return key_padding_mask.bool()


def _without_padding(packed: Tensor, key_padding_mask: Optional[Tensor]) -> Tensor:
    """Return zeros in place of padding, whose weight 0 times NaN would be NaN."""
    if key_padding_mask is None:
        return packed
    return packed.masked_fill(~key_padding_mask[:, :, None, None, None], 0.0)


class SelfAttention(_ComposedAttention):
    """Attention of packed qkv by torch operations."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: Optional[float] = None,
        attention_dropout: float = 0.0,
        *,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Optional[Tensor] = None,
        softcap: float = 0.0,
    ):
        """Make the module; the arguments are those of ``FlashSelfAttention``."""
        score = (causal, softmax_scale, attention_dropout, window_size, alibi_slopes, softcap)
        super().__init__(*score)

    def forward(
        self,
        qkv: Tensor,
        causal: Optional[bool] = None,
        key_padding_mask: Optional[Tensor] = None,
        *,
        s_aux: Optional[Tensor] = None,
    ) -> Tensor:
        """Attend.

        Args:
            qkv: floating point ``(batch, seqlen, 3, nheads, headdim)``.
            causal: in place of the module's; None: the module's.
            key_padding_mask: ``(batch, seqlen)``, True: the key is a token, False: no query sees
                it. It hides keys and moves none: token i of a sequence is at position i.
            s_aux: as for ``FlashSelfAttention``.

        Returns:
            ``(batch, seqlen, nheads, headdim)``, dtype of qkv.

        Raises:
            ValueError: a shape is wrong.
        """
        _check_packed("qkv", qkv, 3)
        batch, seqlen = qkv.shape[:2]
        padding = _checked_padding(key_padding_mask, batch, seqlen)
        distance = _distance(seqlen, seqlen, seqlen, qkv.device)
        q = qkv[:, :, 0]
        k, v = _without_padding(qkv[:, :, 1:], padding).unbind(2)
        return self._attend(q, k, v, distance, self._hidden(distance, causal, padding), s_aux)


class CrossAttention(_ComposedAttention):
    """Attention of queries over packed kv by torch operations."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: Optional[float] = None,
        attention_dropout: float = 0.0,
        *,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Optional[Tensor] = None,
        softcap: float = 0.0,
    ):
        """Make the module; the arguments are those of ``FlashSelfAttention``."""
        score = (causal, softmax_scale, attention_dropout, window_size, alibi_slopes, softcap)
        super().__init__(*score)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: Optional[bool] = None,
        key_padding_mask: Optional[Tensor] = None,
        *,
        s_aux: Optional[Tensor] = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: floating point ``(batch, seqlen_q, nheads, headdim)``.
            kv: ``(batch, seqlen_k, 2, nheads_k, headdim)``, dtype of q; nheads_k divides nheads.
            causal: in place of the module's; None: the module's.
            key_padding_mask: ``(batch, seqlen_k)``, True: the key is a token, False: padding, which
                no query sees. A sequence's queries end with its tokens, which come first.
            s_aux: as for ``FlashSelfAttention``.

        Returns:
            Of q's shape and dtype.

        Raises:
            ValueError: a shape is wrong.
        """
        _check_packed("kv", kv, 2)
        check_tensors(q=q)
        batch, seqlen_k, _, nheads_k, headdim = kv.shape
        if q.dim() != 4 or q.shape[0] != batch or q.shape[-1] != headdim or q.shape[2] % nheads_k:
            raise ValueError(
                f"q must be (batch, seqlen_q, nheads, headdim) with kv's batch {batch} and headdim "
                f"{headdim}, and nheads a multiple of its {nheads_k}; got {tuple(q.shape)}"
            )
        padding = _checked_padding(key_padding_mask, batch, seqlen_k)
        end = seqlen_k if padding is None else padding.sum(1)[:, None, None, None]
        distance = _distance(q.shape[1], end, seqlen_k, q.device)
        kv = _without_padding(kv, padding).repeat_interleave(q.shape[2] // nheads_k, -2)
        hidden = self._hidden(distance, causal, padding)
        return self._attend(q, *kv.unbind(2), distance, hidden, s_aux)
