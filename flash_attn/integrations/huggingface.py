"""Attention of Hugging Face transformers' models by this package.

transformers asks twice: once a forward pass for a mask (``huggingface_masks.py``), once a layer for
attention. ``attention_forward`` chooses the function of this package that fits the mask's pattern.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, Optional

import torch
from torch import Tensor

from flash_attn.bert_padding import index_first_axis, pad_input
from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn.integrations.huggingface_masks import (
    MaskPattern,
    PackedTokens,
    PatternMask,
    attention_mask,
    bias_of_mask,
    traced_pattern,
)

__all__ = ["MaskPattern", "PatternMask", "attention_forward", "attention_mask", "register"]


# ------------------------------------------------------------------------------------------------
# Attention under a pattern


def _needs_grad(*tensors: Optional[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _packed_attention(q, k, v, packed: PackedTokens, dropout: float, **options) -> Tensor:
    """Attention of the tokens as separate sequences.

    Rows that are no tokens become 0, unless they are queries.
    """
    batch, seqlen, _, _ = q.shape
    q, k, v = (x.reshape(batch * seqlen, *x.shape[2:]) for x in (q, k, v))
    if packed.indices is not None:
        k, v = index_first_axis(k, packed.indices), index_first_axis(v, packed.indices)
    cu_seqlens_q, max_seqlen_q = packed.cu_seqlens_q, seqlen
    is_query = packed.indices if cu_seqlens_q is None else None
    if cu_seqlens_q is None:
        cu_seqlens_q, max_seqlen_q = packed.cu_seqlens, packed.max_seqlen
    if is_query is not None:
        q = index_first_axis(q, is_query)
    lengths = (cu_seqlens_q, packed.cu_seqlens, max_seqlen_q, packed.max_seqlen)
    out = flash_attn_varlen_func(q, k, v, *lengths, dropout, **options)
    if is_query is not None:
        return pad_input(out, is_query, batch, seqlen)
    return out.reshape(batch, seqlen, *out.shape[1:])


def _sum_of_biases(*biases: Optional[Tensor]) -> Optional[Tensor]:
    given = [bias for bias in biases if bias is not None]
    return sum(given[1:], given[0]) if given else None


def _key_bias(pattern: MaskPattern, dtype: torch.dtype) -> Optional[Tensor]:
    """Bias (batch, 1, 1, num_keys) that hides padding."""
    if pattern.key_mask is None:
        return None
    return bias_of_mask(pattern.key_mask[:, None, None], dtype)


def _segments_bias(pattern: MaskPattern, dtype: torch.dtype) -> Optional[Tensor]:
    """Bias (batch, 1, seqlen, seqlen) that hides other sequences' keys."""
    if pattern.segments is None:
        return None
    same = pattern.segments[:, :, None] == pattern.segments[:, None, :]
    return bias_of_mask(same[:, None], dtype)


def _batch_attention(q, k, v, pattern: MaskPattern, bias, dropout: float, sinks, **options):
    """Attention of a batch as it stands, the pattern's padding and segments as a bias."""
    bias = _sum_of_biases(bias, _key_bias(pattern, q.dtype), _segments_bias(pattern, q.dtype))
    if sinks is None:
        return flash_attn_func(q, k, v, dropout, attn_bias=bias, **options)
    out, softmax_lse, _ = flash_attn_func(
        q, k, v, dropout, attn_bias=bias, return_attn_probs=True, **options
    )
    share = torch.sigmoid(softmax_lse - sinks)  # what the sink leaves of each row's weights
    return out * share.transpose(1, 2).unsqueeze(-1).to(out.dtype)


def _pattern_attention(q, k, v, pattern: MaskPattern, bias, dropout: float, sinks, **options):
    """Attention under a pattern, by the function that does the least work."""
    options.update(causal=pattern.causal, window_size=pattern.window_size)
    k, v = k[:, : pattern.num_keys], v[:, : pattern.num_keys]
    if bias is not None or sinks is not None:
        bias = None if bias is None else bias[..., : pattern.num_keys]
        return _batch_attention(q, k, v, pattern, bias, dropout, sinks, **options)
    if pattern.packed is not None:
        return _packed_attention(q, k, v, pattern.packed, dropout, **options)
    has_keys_to_hide = pattern.key_mask is not None and pattern.leftpad is None
    is_inference = dropout == 0.0 and not _needs_grad(q, k, v, options["s_aux"])
    if is_inference and not has_keys_to_hide and q.shape[1] < k.shape[1]:
        return flash_attn_with_kvcache(
            q, k, v, cache_seqlens=pattern.num_keys, cache_leftpad=pattern.leftpad, **options
        )
    return _batch_attention(q, k, v, pattern, None, dropout, None, **options)


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


# ------------------------------------------------------------------------------------------------
# What a layer passes


def _in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype, or else in v's: norms and rotations leave q and k in fp32."""
    dtype = v.dtype
    if torch.is_autocast_enabled(v.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(v.device.type)
    if q.dtype == k.dtype == v.dtype == dtype:
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _is_transformers_own(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _is_causal_without_mask(module: torch.nn.Module, is_causal: Optional[bool]) -> bool:
    """Whether a layer that passes no mask is causal.

    A layer of transformers is not, whatever it calls itself: causal ones always get a mask. Another
    one may have been written for ``"sdpa"``, which asks the layer.
    """
    if is_causal is None:
        return bool(getattr(module, "is_causal", False)) and not _is_transformers_own(module)
    return bool(is_causal)


def _pattern_and_bias(
    module: torch.nn.Module, mask: Optional[Tensor], is_causal: bool, num_keys: int, dtype
) -> tuple[MaskPattern, Optional[Tensor]]:
    """What a layer's mask says: as far as possible as a pattern, the rest as a bias."""
    if mask is None:
        return MaskPattern(causal=is_causal, num_keys=num_keys), None
    pattern = None
    if isinstance(mask, PatternMask):
        pattern = mask.pattern
    elif torch.compiler.is_compiling() and _is_transformers_own(module):
        pattern = traced_pattern(mask)
    if pattern is not None:
        return pattern, None
    if isinstance(mask, PatternMask):
        mask = mask.dense()
    bias = bias_of_mask(mask, dtype) if mask.dtype == torch.bool else mask.to(dtype)
    return MaskPattern(causal=False, num_keys=num_keys), bias


def _bias_of_indices(indices: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """Bias (batch, 1, seqlen_q, num_keys) that hides all keys but those of (batch, seqlen_q, n)."""
    shape = (*indices.shape[:2], num_keys)
    bias = torch.full(shape, -torch.inf, dtype=dtype, device=indices.device)
    return bias.scatter(-1, indices.long(), 0.0).unsqueeze(1)


def _mask_of_block_indices(module, block_indices: Tensor, mask, query, key, position_ids) -> Tensor:
    """The mask that a block-sparse layer builds of its chosen blocks for eager attention."""
    build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise TypeError(
            f"{type(module).__name__} passes block_indices, and has no indexer.build_block_mask "
            "that turns them into a mask"
        )
    if position_ids is None:
        first = key.shape[2] - query.shape[2]
        position_ids = torch.arange(first, key.shape[2], device=query.device)[None]
    position_ids = position_ids.expand(query.shape[0], -1)
    return build(block_indices, mask, key.shape[2], query.dtype, query.device, position_ids)


def _split_sinks(sinks: Optional[Tensor], num_heads: int):
    """Attention sinks as (s_aux, None) where each head has one, else (None, (batch, nheads, q))."""
    if sinks is None:
        return None, None
    if sinks.numel() == num_heads and num_heads in sinks.shape:
        return sinks.flatten(), None
    if sinks.dim() != 4 or sinks.shape[1] != num_heads or sinks.shape[3] != 1:
        raise TypeError(
            f"sinks must be ({num_heads},) or (batch, {num_heads}, seqlen_q, 1), got "
            f"{tuple(sinks.shape)}"
        )
    return None, sinks.squeeze(-1).float()


# Keywords that change nothing here: reports, and what the mask or the rotation said already.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "sliding_window",
        "use_cache",
    }
)


@functools.cache
def _is_passed_by(layer: type, keyword: str) -> bool:
    """Whether a layer's own code may name a keyword for its attention.

    Others come from the model's caller, through all layers, and mean nothing to eager attention.
    """
    try:
        return keyword in inspect.getsource(inspect.unwrap(layer.forward))
    except (OSError, TypeError):
        return True


def _check_keywords(module: torch.nn.Module, keywords: dict[str, Any]) -> None:
    """Raise TypeError for a keyword of a layer that would change the attention."""
    for name, value in keywords.items():
        if value is not None and name not in _HARMLESS and _is_passed_by(type(module), name):
            raise TypeError(
                f"{type(module).__name__} passes {name!r} to its attention, which flash_attn does "
                'not know: load the model with attn_implementation="eager"'
            )
    if keywords.get("output_attentions"):
        warnings.warn(
            "flash_attn never forms attention weights: output_attentions=True needs "
            'attn_implementation="eager"'
        )


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
    sinks: Optional[Tensor] = None,
    indices: Optional[Tensor] = None,
    block_indices: Optional[Tensor] = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' ``AttentionInterface``.

    Arguments:
        module: the layer. Without mask and ``is_causal`` its own ``is_causal`` counts, unless it is
            one of transformers' own: those see all keys then, as under eager attention.
        query: (batch, nheads, seqlen_q, headdim), fp16, bf16 or fp32.
        key, value: (batch, nheads_k, seqlen_k, headdim); value's headdim may differ. Under autocast
            all three are computed in its dtype, else in value's.
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
        sinks: as ``s_aux``, or one for each query, (batch, nheads, seqlen_q, 1).
        indices: int (batch, seqlen_q, n), the only keys that each query may see.
        block_indices: blocks of keys that each query may see; ``module.indexer`` explains them.
        kwargs: what changes no attention.

    Returns:
        (out, None): out is (batch, seqlen_q, nheads, headdim of value). Attention weights are never
        formed.

    Raises:
        TypeError: the layer passes a keyword that is not known here.
    """
    if kwargs:
        _check_keywords(module, kwargs)
    query, key, value = _in_one_dtype(query, key, value)
    if block_indices is not None:
        attention_mask = _mask_of_block_indices(
            module, block_indices, attention_mask, query, key, kwargs.get("position_ids")
        )
    is_causal = _is_causal_without_mask(module, is_causal)
    pattern, bias = _pattern_and_bias(module, attention_mask, is_causal, key.shape[2], query.dtype)
    if indices is not None:
        indices = _bias_of_indices(indices, key.shape[2], query.dtype)
    bias = _sum_of_biases(bias, position_bias, indices)
    sinks_of_heads, sinks = _split_sinks(sinks, query.shape[1])
    s_aux = sinks_of_heads if s_aux is None else s_aux
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "s_aux": s_aux}

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    is_plain = bias is None and sinks is None and pattern.packed is None
    if is_plain and pattern.key_mask is None and all(x is not None for x in lengths):
        return _varlen_of_kwargs(q, k, v, pattern, lengths, dropout, **options), None
    return _pattern_attention(q, k, v, pattern, bias, dropout, sinks, **options), None


def register(
    name: str = "exact_attention", flash_attention_2: bool = False, flash_attention_3: bool = False
) -> str:
    """Register this package with transformers; see ``flash_attn.integrations.register``."""
    if "flash" in name:
        raise ValueError(
            f"transformers takes every attention implementation with 'flash' in its name for its "
            f"own; got {name!r}"
        )
    from transformers import AttentionInterface, masking_utils

    from flash_attn.integrations import huggingface_models

    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError("flash_attn.integrations.register() needs transformers >= 5")
    AttentionInterface.register(name, attention_forward)
    masking_utils.AttentionMaskInterface.register(name, attention_mask)
    huggingface_models.use_eager_layers(name)
    if flash_attention_2:
        huggingface_models.allow_flash_attention(2)
    if flash_attention_3:
        huggingface_models.allow_flash_attention(3)
    return name
