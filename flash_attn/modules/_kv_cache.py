"""The keys and values that a layer keeps while a model generates, in ``inference_params``.

``inference_params`` has ``max_seqlen`` and ``max_batch_size``; ``key_value_memory_dict``, a dict
from a layer's index to its cache ``(max_batch_size, max_seqlen, 2, nheads_k, headdim)``;
``batch_size_offset``, the cache's row of the first sequence; ``seqlen_offset``, how many tokens the
cache has of every sequence, or, for sequences of different lengths, ``lengths_per_sample``, int32
``(max_batch_size,)``, which goes before it where it is not None.
"""

from __future__ import annotations

from typing import Union

import torch
from torch import Tensor

from flash_attn._arguments import as_int


def cache_rows(kv: Tensor, inference_params, layer_idx: int) -> Tensor:
    """Return the rows of a layer's cache that belong to the sequences of ``kv``; make the cache if
    there is none.

    Args:
        kv: ``(batch, seqlen, 2, nheads_k, headdim)``.

    Returns:
        ``(batch, max_seqlen, 2, nheads_k, headdim)``, a view.

    Raises:
        ValueError: the cache has no such rows, another shape, dtype or device.
    """
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        sizes = (inference_params.max_batch_size, inference_params.max_seqlen)
        caches[layer_idx] = kv.new_empty(*sizes, *kv.shape[2:])
    cache, first = caches[layer_idx], inference_params.batch_size_offset
    name = f"inference_params.key_value_memory_dict[{layer_idx}]"
    if cache.shape[2:] != kv.shape[2:] or cache.dtype != kv.dtype or cache.device != kv.device:
        raise ValueError(
            f"{name} is {tuple(cache.shape)}, {cache.dtype} on {cache.device}, but the layer's "
            f"keys and values are (..., {', '.join(map(str, kv.shape[2:]))}), {kv.dtype} on "
            f"{kv.device}"
        )
    rows = cache[first : first + kv.shape[0]]
    if rows.shape[0] != kv.shape[0]:
        raise ValueError(
            f"{name} has {cache.shape[0]} rows: {kv.shape[0]} sequences from batch_size_offset "
            f"{first} on do not fit"
        )
    return rows


def cached_lengths(batch: int, inference_params) -> Union[int, Tensor]:
    """Return how many tokens the cache has of ``batch`` sequences: an int, or int32 ``(batch,)``.

    Raises:
        ValueError: ``lengths_per_sample`` has too few entries.
    """
    lengths = inference_params.lengths_per_sample
    if lengths is None:
        return as_int("inference_params.seqlen_offset", inference_params.seqlen_offset)
    first = inference_params.batch_size_offset
    if lengths.dim() != 1 or lengths.shape[0] < first + batch:
        raise ValueError(
            f"inference_params.lengths_per_sample must have an entry for each of {first + batch} "
            f"sequences, got {tuple(lengths.shape)}"
        )
    return lengths[first : first + batch].to(torch.int32)


def check_room(length: Union[int, Tensor], seqlen: int, cache: Tensor) -> None:
    """Raise ValueError if ``seqlen`` tokens after ``length``, where it is an int, do not fit."""
    if isinstance(length, int) and not 0 <= length <= cache.shape[1] - seqlen:
        raise ValueError(
            f"{seqlen} tokens from inference_params.seqlen_offset {length} on do not fit into a "
            f"cache of max_seqlen {cache.shape[1]}"
        )


def update_kv_cache(kv: Tensor, inference_params, layer_idx: int) -> Tensor:
    """Write new keys and values into a layer's cache, behind those that it has.

    No gradient flows through the cache.

    Args:
        kv: ``(batch, seqlen, 2, nheads_k, headdim)``.
        inference_params: as described at the head of this module.
        layer_idx: the layer's key of ``key_value_memory_dict``.

    Returns:
        ``(batch, seqlen_k, 2, nheads_k, headdim)``, a view of the cache up to the end of the
        longest sequence.

    Raises:
        ValueError: the tokens do not fit into the cache, or it does not fit ``kv``.
        IndexError: a sequence of ``lengths_per_sample`` has no room.
    """
    cache = cache_rows(kv, inference_params, layer_idx)
    length, seqlen = cached_lengths(kv.shape[0], inference_params), kv.shape[1]
    check_room(length, seqlen, cache)
    if not isinstance(length, Tensor):
        cache[:, length : length + seqlen] = kv.detach()
        return cache[:, : length + seqlen]
    places = length[:, None] + torch.arange(seqlen, device=kv.device)
    row = torch.arange(kv.shape[0], device=kv.device)[:, None]
    cache[row, places] = kv.detach()
    return cache[:, : int(places.max()) + 1]
