"""Masks for Hugging Face transformers' models.

Once a forward pass transformers asks for a mask, describing the wanted one by nested functions of
(batch, head, query, key). ``attention_mask`` recognises the usual ones and returns their
``MaskPattern``, a few numbers that all layers share, as a ``PatternMask``: to everything but
``attention_forward`` this is the floating mask that transformers' eager attention gets, so that a
model that adds its mask to the scores itself has the right numbers, too. Any other mask becomes
that floating mask at once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional

import torch
from torch import Tensor

__all__ = ["MaskPattern", "PackedTokens", "PatternMask", "attention_mask", "bias_of_mask"]

_TRACED_PATTERN = "_flash_attn_pattern"  # attribute of a mask made under torch.compile


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """Where a batch's tokens lie in the (batch * seqlen) rows of a dense tensor."""

    cu_seqlens: Tensor  # int32 (num_sequences + 1,)
    max_seqlen: int
    indices: Optional[Tensor] = None  # int64 (total,): rows that are tokens; None: all of them
    cu_seqlens_q: Optional[Tensor] = None  # where every row is a query; None: tokens alone are


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
    packed: Optional[PackedTokens] = None  # keys are these tokens, as separate sequences
    leftpad: Optional[Tensor] = None  # int32 (batch,): first key of each sequence
    key_mask: Optional[Tensor] = None  # bool (batch, num_keys): keys that are tokens


class _DenseMask:
    """A mask (batch, 1, seqlen_q, seqlen_k) that is made when somebody asks for it."""

    def __init__(self, make: Callable[[], Tensor]):
        self._make = make
        self._mask: Optional[Tensor] = None

    def get(self) -> Tensor:
        if self._mask is None:
            with torch.inference_mode(False), torch.no_grad():
                self._mask = self._make()
        return self._mask


def _of_dense(name: str) -> Callable:
    """A tensor's method that reads memory, on the dense mask."""
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        return method(self.dense(), *args, **kwargs)

    return call


class PatternMask(torch.Tensor):
    """A floating mask (batch, 1, seqlen_q, seqlen_k) without memory, known by its pattern.

    transformers hands it through as the tensor that it expects; whatever computes with it gets the
    dense mask: 0 where a key is visible, the dtype's lowest number elsewhere.
    """

    _pattern: MaskPattern
    _dense: _DenseMask

    __torch_function__ = torch._C._disabled_torch_function_impl
    __array__ = _of_dense("__array__")
    __deepcopy__ = _of_dense("__deepcopy__")
    __dlpack__ = _of_dense("__dlpack__")
    __reduce_ex__ = _of_dense("__reduce_ex__")
    data_ptr = _of_dense("data_ptr")
    numpy = _of_dense("numpy")
    tolist = _of_dense("tolist")

    @staticmethod
    def __new__(cls, pattern: MaskPattern, dense: _DenseMask, shape, dtype, device):
        with torch.inference_mode(False):  # inference tensors do not count the writes to them
            return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, pattern: MaskPattern, dense: _DenseMask, shape, dtype, device):
        self._pattern = pattern
        self._dense = dense

    def __repr__(self):
        return f"PatternMask({self._pattern})"

    @property
    def pattern(self) -> Optional[MaskPattern]:
        """What the mask says, or None after somebody has written into it or a view of it."""
        if not torch.compiler.is_compiling() and self._version > 0:
            return None
        return self._pattern

    def dense(self) -> Tensor:
        """The mask as an ordinary tensor."""
        return self._dense.get()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default and args[0].pattern is not None:
            (mask,) = args  # gradient checkpointing
            return cls(mask._pattern, mask._dense, mask.shape, mask.dtype, mask.device)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs or {}))
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
# Patterns of a batch


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


def _packed_padding(key_mask: Tensor, causal: bool) -> PackedTokens:
    """Sequences of a padded batch whose tokens are True in (batch, seqlen).

    Without a causal mask the rows of padding see the tokens, as under eager attention: models may
    read them.
    """
    lengths = key_mask.sum(dim=1)
    indices = key_mask.flatten().nonzero().flatten()
    rows = None if causal else _cumulative(torch.full_like(lengths, key_mask.shape[1]))
    return PackedTokens(_cumulative(lengths), int(lengths.max()), indices, rows)


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
    has_window = pattern.window_size != (-1, -1)
    keeps_distances = not has_window or (pattern.causal and not _has_holes(key_mask))
    is_self_attention = q_length == pattern.num_keys
    return replace(
        pattern,
        key_mask=key_mask,
        leftpad=leftpad.to(torch.int32) if is_left_padded else None,
        packed=_packed_padding(key_mask, pattern.causal)
        if is_self_attention and keeps_distances
        else None,
    )


def _drop_wide_window(pattern: MaskPattern) -> MaskPattern:
    """The pattern without window limits that reach beyond all keys."""
    left, right = (w if 0 <= w < pattern.num_keys else -1 for w in pattern.window_size)
    return replace(pattern, window_size=(left, right))


def _key_mask(padding: Tensor, kv_length: int, kv_offset: int, num_keys: int) -> Tensor:
    """The part of a padding mask (batch, number of tokens) that belongs to the keys in use."""
    from transformers.masking_utils import prepare_padding_mask

    padding = prepare_padding_mask(padding, kv_length, kv_offset)
    return padding[:, kv_offset : kv_offset + num_keys]


def _pattern_of_batch(
    mask_function: Callable,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    padding: Optional[Tensor],
) -> Optional[MaskPattern]:
    """The pattern of a mask as transformers describes it, or None if none says that."""
    pattern = _recognise(mask_function)
    if pattern is None:
        return None
    is_aligned = pattern.causal or pattern.window_size != (-1, -1)
    num_keys = q_offset + q_length - kv_offset if is_aligned else kv_length
    if num_keys > kv_length:
        return None
    pattern = _drop_wide_window(replace(pattern, num_keys=num_keys))
    if pattern.segments is not None:
        if padding is not None:
            return None
        return replace(pattern, packed=_packed_segments(pattern.segments))
    if padding is None:
        return pattern
    return _with_padding(pattern, _key_mask(padding, kv_length, kv_offset, num_keys), q_length)


def _reads_padding(config: Any = None, **kwargs: Any) -> bool:
    """Whether a causal model's tokens depend on rows of padding, which come out 0 here.

    BLT pools bytes to patches whether they are padding or not.
    """
    return str(getattr(config, "model_type", "")).startswith("blt")


def _shows_all(pattern: MaskPattern) -> bool:
    """Whether every query sees every key."""
    is_restricted = pattern.causal or pattern.window_size != (-1, -1)
    return not is_restricted and pattern.key_mask is None and pattern.segments is None


# ------------------------------------------------------------------------------------------------
# Masks


def bias_of_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive bias of 0 where mask is True and -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def traced_pattern(mask: Tensor) -> Optional[MaskPattern]:
    """The pattern of a dense mask that ``attention_mask`` made in the graph being compiled.

    Only for transformers' own layers, none of which writes into a mask.
    """
    return getattr(mask, _TRACED_PATTERN, None)


def _traced_mask(mask_function: Callable, padding: Optional[Tensor], **arguments: Any):
    """transformers' eager mask; under torch.compile with its pattern beside it, if that is plain.

    Layers that use the pattern leave the mask unused, and the compiler removes it.
    """
    from transformers import masking_utils

    mask = masking_utils.eager_mask(
        mask_function=mask_function, attention_mask=padding, **arguments
    )
    is_causal = mask_function is masking_utils.causal_mask_function
    is_plain = is_causal or mask_function is masking_utils.bidirectional_mask_function
    q_offset, kv_length = arguments["q_offset"], arguments["kv_length"]
    if mask is None or not is_plain or not isinstance(q_offset, int) or _reads_padding(**arguments):
        return mask
    num_keys = q_offset + arguments["q_length"] - arguments["kv_offset"]
    if torch.compiler.is_dynamo_compiling() and num_keys == kv_length:
        key_mask = None
        if padding is not None:
            key_mask = _key_mask(padding, kv_length, arguments["kv_offset"], num_keys)
        pattern = MaskPattern(causal=is_causal, num_keys=num_keys, key_mask=key_mask)
        setattr(mask, _TRACED_PATTERN, pattern)
    return mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Optional[Callable] = None,
    attention_mask: Optional[Tensor] = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Optional[Tensor]:
    """Mask function for transformers' ``AttentionMaskInterface``.

    Arguments:
        batch_size, q_length, kv_length: extents of the attention to come; kv_length counts all keys
            of a static cache.
        q_offset, kv_offset: positions of the first query and key.
        mask_function: transformers' description of the mask; None: causal.
        attention_mask: bool (batch, number of tokens), False for padding; None: no padding.
        dtype: of the mask.
        allow_is_bidirectional_skip: whether the result may be None where every query sees every
            key.
        kwargs: ``config``, ``use_vmap`` and others of transformers' ``eager_mask``.

    Returns:
        (batch, 1, q_length, kv_length): what ``eager_mask`` returns, or a ``PatternMask`` that
        stands for it; None as it does, for no mask at all.
    """
    from transformers import masking_utils
    from transformers.utils.import_utils import is_tracing

    mask_function = mask_function or masking_utils.causal_mask_function
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "dtype": dtype,
        "device": device,
        **kwargs,
    }
    skip = {"allow_is_bidirectional_skip": allow_is_bidirectional_skip}
    if is_tracing(attention_mask) or is_tracing(q_offset):
        return _traced_mask(mask_function, attention_mask, **arguments, **skip)
    q_offset = arguments["q_offset"] = int(q_offset)  # a static cache's counter, which moves on
    make = functools.partial(
        masking_utils.eager_mask,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **arguments,
    )
    pattern = _pattern_of_batch(
        mask_function, q_length, kv_length, q_offset, kv_offset, attention_mask
    )
    if pattern is not None and pattern.key_mask is not None and _reads_padding(**kwargs):
        pattern = None
    if pattern is None:
        return make(**skip)
    if allow_is_bidirectional_skip and _shows_all(pattern):
        return None
    shape = (batch_size, 1, q_length, kv_length)
    return PatternMask(pattern, _DenseMask(make), shape, dtype, device)
