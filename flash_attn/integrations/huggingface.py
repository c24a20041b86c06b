"""Attention of Hugging Face transformers' models by this package.

transformers asks twice. Once a forward pass it asks for a mask, describing the wanted one by nested
functions of (batch, head, query, key): ``attention_mask`` recognises the usual ones and returns
their ``MaskPattern``, a few numbers that all layers share, as a ``PatternMask``; any other becomes
an additive bias (batch, 1, seqlen_q, seqlen_k). Once a layer it asks for attention:
``attention_forward`` chooses the function of this package that fits the pattern.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from flash_attn.bert_padding import index_first_axis, pad_input
from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

__all__ = ["MaskPattern", "PatternMask", "attention_forward", "attention_mask", "register"]


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """Where a batch's tokens lie in the (batch * seqlen) rows of a dense tensor."""

    cu_seqlens: Tensor  # int32 (num_sequences + 1,)
    max_seqlen: int
    indices: Optional[Tensor] = None  # int64 (total,): rows that are tokens; None: all of them


@dataclass(frozen=True, eq=False)
class MaskPattern:
    """Which keys a query sees.

    Masks are aligned to the bottom right corner: the last query and key ``num_keys - 1`` have the
    same position.
    """

    causal: bool
    window_size: tuple[int, int] = (-1, -1)
    segments: Optional[Tensor] = (
        None  # int (batch, seqlen): tokens see only tokens with the same number
    )
    num_keys: int = 0  # keys used; a static cache holds more
    packed: Optional[PackedTokens] = (
        None  # queries and keys are these tokens, as separate sequences
    )
    leftpad: Optional[Tensor] = None  # int32 (batch,): first key of each sequence
    key_mask: Optional[Tensor] = None  # bool (batch, num_keys): keys that are tokens


class PatternMask(torch.Tensor):
    """A bool mask (batch, 1, seqlen_q, seqlen_k) without memory, known by its ``pattern``.

    transformers hands it through as the tensor that it expects; whatever computes with it gets the
    dense mask.
    """

    pattern: MaskPattern
    make_dense: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, pattern: MaskPattern, shape, device, make_dense: Callable[[], Tensor]):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(self, pattern: MaskPattern, shape, device, make_dense: Callable[[], Tensor]):
        self.pattern = pattern
        self.make_dense = make_dense

    def __repr__(self):
        return f"PatternMask({self.pattern})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda mask: mask.make_dense(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


# ------------------------------------------------------------------------------------------------
# Recognising transformers' mask functions


def _captured(function: Callable) -> dict[str, Any]:
    """The variables that a function captured."""
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells)}


def _intersect_windows(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    left, right = (max(x, y) if min(x, y) < 0 else min(x, y) for x, y in zip(a, b))
    return left, right


def _intersect(a: MaskPattern, b: MaskPattern) -> Optional[MaskPattern]:
    """The keys that both patterns allow, or None if no pattern says that."""
    if a.segments is not None and b.segments is not None:
        return None
    return MaskPattern(
        causal=a.causal or b.causal,
        window_size=_intersect_windows(a.window_size, b.window_size),
        segments=b.segments if a.segments is None else a.segments,
    )


def _recognise(mask_function: Callable) -> Optional[MaskPattern]:
    """The pattern that a mask function of transformers stands for, or None if it is not known."""
    if getattr(mask_function, "__module__", None) != "transformers.masking_utils":
        return None
    captured = _captured(mask_function)
    maker = mask_function.__qualname__.split(".")[0]
    if maker == "causal_mask_function":
        return MaskPattern(causal=True)
    if maker == "bidirectional_mask_function":
        return MaskPattern(causal=False)
    if maker == "sliding_window_overlay":
        return MaskPattern(causal=False, window_size=(captured["sliding_window"] - 1, -1))
    if maker == "sliding_window_bidirectional_overlay":
        return MaskPattern(causal=False, window_size=(captured["sliding_window"],) * 2)
    if maker == "packed_sequence_mask_function":
        return MaskPattern(causal=False, segments=captured["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence":
        # Positions count from each sequence's own start, which changes no relative mask within it.
        return _recognise(captured["mask_function"])
    if maker == "and_masks":
        pattern: Optional[MaskPattern] = MaskPattern(causal=False)
        for part in captured["mask_functions"]:
            other = _recognise(part)
            pattern = None if pattern is None or other is None else _intersect(pattern, other)
        return pattern
    return None


# ------------------------------------------------------------------------------------------------
# Masks


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _packed_segments(segments: Tensor) -> PackedTokens:
    """Sequences of a batch whose tokens carry the number of their sequence, (batch, seqlen)."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = starts.flatten().nonzero().flatten()
    end = first.new_tensor([segments.numel()])
    cu_seqlens = torch.cat([first, end])
    return PackedTokens(cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max()))


def _packed_padding(key_mask: Tensor) -> PackedTokens:
    """Sequences of a padded batch whose tokens are True in (batch, seqlen)."""
    lengths = key_mask.sum(dim=1)
    indices = key_mask.flatten().nonzero().flatten()
    return PackedTokens(_cumulative(lengths), int(lengths.max()), indices)


def _has_holes(key_mask: Tensor) -> bool:
    """Whether some sequence's tokens are not contiguous."""
    starts = key_mask[:, :1].int().sum(1) + (key_mask[:, 1:] & ~key_mask[:, :-1]).sum(1)
    return bool((starts > 1).any())


def _with_padding(pattern: MaskPattern, key_mask: Tensor, q_length: int) -> MaskPattern:
    """The pattern, restricted to the keys that are True in key_mask (batch, num_keys)."""
    if bool(key_mask.all()):
        return pattern
    positions = torch.arange(key_mask.shape[1], device=key_mask.device)
    leftpad = (~key_mask).sum(dim=1)
    is_left_padded = bool((key_mask == (positions >= leftpad[:, None])).all())
    keeps_distances = pattern.window_size == (-1, -1) or not _has_holes(key_mask)
    return replace(
        pattern,
        key_mask=key_mask,
        leftpad=leftpad.to(torch.int32) if is_left_padded else None,
        packed=_packed_padding(key_mask)
        if q_length == pattern.num_keys and keeps_distances
        else None,
    )


def _drop_wide_window(pattern: MaskPattern) -> MaskPattern:
    """The pattern without window limits that reach beyond all keys."""
    left, right = (w if 0 <= w < pattern.num_keys else -1 for w in pattern.window_size)
    return replace(pattern, window_size=(left, right))


def _dense_mask(**mask_arguments: Any) -> Tensor:
    """Bool mask (batch, 1, seqlen_q, seqlen_k) for any mask function."""
    from transformers.masking_utils import sdpa_mask

    mask_arguments.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(**mask_arguments)


def _bias_of_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive bias of 0 where mask is True and -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


@torch.compiler.disable  # it reads lengths off the mask
def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Optional[Callable] = None,
    attention_mask: Optional[Tensor] = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Optional[Tensor]:
    """Mask function for transformers' ``AttentionMaskInterface``.

    Arguments:
        batch_size, q_length, kv_length: extents of the attention to come; kv_length counts all keys
            of a static cache.
        q_offset, kv_offset: positions of the first query and key.
        mask_function: transformers' description of the mask; None: causal.
        attention_mask: bool (batch, number of tokens), False for padding; None: no padding.
        dtype: of the bias, where one is needed.

    Returns:
        None for a mask that ``causal`` alone describes, a ``PatternMask``, or a bias
        (batch, 1, q_length, kv_length).
    """
    from transformers import masking_utils

    mask_function = mask_function or masking_utils.causal_mask_function
    q_offset = int(q_offset)  # a static cache gives its counter, which moves on
    make_dense = functools.partial(
        _dense_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    pattern = _recognise(mask_function)
    aligned = pattern is not None and (pattern.causal or pattern.window_size != (-1, -1))
    num_keys = q_offset + q_length - kv_offset if aligned else kv_length
    if pattern is None or num_keys > kv_length:
        return _bias_of_mask(make_dense(), dtype)
    pattern = _drop_wide_window(replace(pattern, num_keys=num_keys))
    if pattern.segments is not None:
        pattern = replace(pattern, packed=_packed_segments(pattern.segments))
    elif attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        key_mask = padding[:, kv_offset : kv_offset + num_keys]
        pattern = _with_padding(pattern, key_mask, q_length)
    is_plain = pattern.key_mask is None and pattern.segments is None
    if is_plain and pattern.window_size == (-1, -1) and num_keys == kv_length:
        return None
    shape = (batch_size, 1, q_length, kv_length)
    return PatternMask(pattern, shape, kwargs.get("device", "cpu"), make_dense)


# ------------------------------------------------------------------------------------------------
# Attention


def _needs_grad(*tensors: Optional[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _packed_attention(q, k, v, packed: PackedTokens, dropout: float, **options) -> Tensor:
    """Attention of the tokens as separate sequences; rows that are no tokens become 0."""
    batch, seqlen, _, _ = q.shape
    q, k, v = (x.reshape(batch * seqlen, *x.shape[2:]) for x in (q, k, v))
    if packed.indices is not None:
        q, k, v = (index_first_axis(x, packed.indices) for x in (q, k, v))
    cu_seqlens, max_seqlen = packed.cu_seqlens, packed.max_seqlen
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, **options
    )
    if packed.indices is not None:
        return pad_input(out, packed.indices, batch, seqlen)
    return out.reshape(batch, seqlen, *out.shape[1:])


def _pattern_attention(q, k, v, pattern: MaskPattern, bias, dropout: float, **options) -> Tensor:
    """Attention under a pattern, by the function that does the least work."""
    options.update(causal=pattern.causal, window_size=pattern.window_size)
    k, v = k[:, : pattern.num_keys], v[:, : pattern.num_keys]
    if pattern.packed is not None and bias is None:
        return _packed_attention(q, k, v, pattern.packed, dropout, **options)
    has_keys_to_hide = pattern.key_mask is not None and pattern.leftpad is None
    is_inference = dropout == 0.0 and not _needs_grad(q, k, v, options["s_aux"])
    if is_inference and bias is None and not has_keys_to_hide and q.shape[1] < k.shape[1]:
        return flash_attn_with_kvcache(
            q, k, v, cache_seqlens=pattern.num_keys, cache_leftpad=pattern.leftpad, **options
        )
    if pattern.key_mask is not None:
        key_bias = _bias_of_mask(pattern.key_mask[:, None, None], q.dtype)
        bias = key_bias if bias is None else bias + key_bias
    return flash_attn_func(q, k, v, dropout, attn_bias=bias, **options)


def _segments_bias(pattern: MaskPattern, dtype: torch.dtype) -> Tensor:
    """Bias (batch, 1, seqlen, seqlen) that hides other sequences' keys."""
    same = pattern.segments[:, :, None] == pattern.segments[:, None, :]
    return _bias_of_mask(same[:, None], dtype)


def _varlen_of_kwargs(q, k, v, pattern: MaskPattern, lengths, dropout: float, **options) -> Tensor:
    """Attention of sequences that the caller packed along dimension 1 of a batch of one."""
    cu_seqlens_q, cu_seqlens_k, max_length_q, max_length_k = lengths
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        int(max_length_q),
        int(max_length_k),
        dropout,
        causal=pattern.causal,
        window_size=pattern.window_size,
        **options,
    )
    return out.reshape(*q.shape[:3], v.shape[-1])


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    softcap: Optional[float] = None,
    is_causal: Optional[bool] = None,
    s_aux: Optional[Tensor] = None,
    position_bias: Optional[Tensor] = None,
    cu_seq_lens_q: Optional[Tensor] = None,
    cu_seq_lens_k: Optional[Tensor] = None,
    max_length_q: Optional[int] = None,
    max_length_k: Optional[int] = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' ``AttentionInterface``.

    Arguments:
        module: the layer; its ``is_causal`` counts where the arguments say nothing.
        query: (batch, nheads, seqlen_q, headdim), fp16, bf16 or fp32.
        key, value: (batch, nheads_k, seqlen_k, headdim); value's headdim may differ.
        attention_mask: what ``attention_mask()`` returned, or a bool (True: visible) or additive
            mask broadcastable to (batch, nheads, seqlen_q, seqlen_k).
        dropout: probability of dropping an attention weight.
        scaling: factor of query . key; None: headdim ** -0.5.
        softcap: limit of the scores by tanh; None: none.
        is_causal: whether a query sees no later keys, where ``attention_mask`` is None.
        s_aux: (nheads,) attention sinks.
        position_bias: added to the scores, broadcastable to (batch, nheads, seqlen_q, seqlen_k).
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: a packed batch of one: int
            (num_sequences + 1,) cumulative lengths, and the longest.

    Returns:
        (out, None): out is (batch, seqlen_q, nheads, headdim of value). Attention weights are never
        formed.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "s_aux": s_aux}
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    bias = position_bias
    pattern = MaskPattern(causal=bool(is_causal), num_keys=k.shape[1])
    if isinstance(attention_mask, PatternMask):
        pattern = attention_mask.pattern
    elif attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = _bias_of_mask(attention_mask, q.dtype)
        bias = attention_mask if bias is None else bias + attention_mask
        pattern = MaskPattern(causal=False, num_keys=k.shape[1])

    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if bias is None and pattern.packed is None and all(x is not None for x in lengths):
        return _varlen_of_kwargs(q, k, v, pattern, lengths, dropout, **options), None
    if bias is not None:
        bias = bias[..., : pattern.num_keys]
        if pattern.segments is not None:
            bias = bias + _segments_bias(pattern, q.dtype)
    return _pattern_attention(q, k, v, pattern, bias, dropout, **options), None


def register(name: str = "exact_attention") -> str:
    """Register this package with transformers; see ``flash_attn.integrations.register``."""
    if "flash" in name:
        raise ValueError(
            f"transformers takes every attention implementation with 'flash' in its name for its "
            f"own; got {name!r}"
        )
    from transformers import AttentionInterface, masking_utils

    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError("flash_attn.integrations.register() needs transformers >= 5")
    AttentionInterface.register(name, attention_forward)
    masking_utils.AttentionMaskInterface.register(name, attention_mask)
    return name
