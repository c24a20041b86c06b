"""The keys and values that a layer keeps while a model generates, in ``inference_params``.

``inference_params`` has ``max_seqlen`` and ``max_batch_size``; ``key_value_memory_dict``, a dict
from a layer's index to its cache ``(max_batch_size, max_seqlen, 2, nheads_k, headdim)``;
``batch_size_offset``, the cache's row of the first sequence; ``seqlen_offset``, how many tokens the
cache has of every sequence, or, for sequences of different lengths, ``lengths_per_sample``, int32
``(max_batch_size,)``, which goes before it where it is not None.

It may have ``block_table``, int32 ``(batch, max_blocks)``: a layer's cache is then blocks
``(num_blocks, block_size, 2, nheads_k, headdim)``, and each sequence has those of its row. It may
have ``packing``, a ``flash_attn.utils.generation.Packing``: the layer's input is then one row of
``(1, total)`` tokens, those of sequences of different lengths one after the other.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from flash_attn._arguments import as_int


def block_table_of(inference_params) -> Optional[Tensor]:
    """Return the blocks of each sequence; None: the cache has rows."""
    return getattr(inference_params, "block_table", None)


def packing_of(inference_params):
    """Return how tokens of different sequences lie in one row; None: a row has one sequence."""
    return getattr(inference_params, "packing", None)


def whole_cache(kv: Tensor, inference_params, layer_idx: int) -> Tensor:
    """Return a layer's cache; make it if there is none and it has rows.

    Args:
        kv: ``(..., 2, nheads_k, headdim)``.

    Returns:
        ``(max_batch_size, max_seqlen, 2, nheads_k, headdim)`` or ``(num_blocks, block_size, 2,
        nheads_k, headdim)``.

    Raises:
        ValueError: the cache has another shape, dtype or device, or there are no blocks.
    """
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        if block_table_of(inference_params) is not None:
            raise ValueError(
                "inference_params.block_table needs blocks in key_value_memory_dict, which has "
                f"none for layer {layer_idx}"
            )
        sizes = (inference_params.max_batch_size, inference_params.max_seqlen)
        caches[layer_idx] = kv.new_empty(*sizes, *kv.shape[-3:])
    cache = caches[layer_idx]
    if cache.shape[2:] != kv.shape[-3:] or cache.dtype != kv.dtype or cache.device != kv.device:
        raise ValueError(
            f"inference_params.key_value_memory_dict[{layer_idx}] is {tuple(cache.shape)}, "
            f"{cache.dtype} on {cache.device}, but the layer's keys and values are (..., "
            f"{', '.join(map(str, kv.shape[-3:]))}), {kv.dtype} on {kv.device}"
        )
    return cache


def cache_rows(kv: Tensor, inference_params, layer_idx: int) -> Tensor:
    """Return the part of a layer's cache that belongs to the sequences of ``kv``; make the cache if
    there is none.

    Args:
        kv: ``(batch, seqlen, 2, nheads_k, headdim)``.

    Returns:
        ``(batch, max_seqlen, 2, nheads_k, headdim)``, a view; with ``block_table`` all blocks.

    Raises:
        ValueError: the cache has no such rows, another shape, dtype or device.
    """
    cache = whole_cache(kv, inference_params, layer_idx)
    table, first = block_table_of(inference_params), inference_params.batch_size_offset
    if table is not None:
        if table.dim() != 2 or len(table) != kv.shape[0]:
            raise ValueError(
                f"inference_params.block_table must have a row for each of {kv.shape[0]} "
                f"sequences, got {tuple(table.shape)}"
            )
        return cache
    if first == 0 and cache.shape[0] == kv.shape[0]:
        return cache
    rows = cache[first : first + kv.shape[0]]
    if rows.shape[0] != kv.shape[0]:
        raise ValueError(
            f"inference_params.key_value_memory_dict[{layer_idx}] has {cache.shape[0]} rows: "
            f"{kv.shape[0]} sequences from batch_size_offset {first} on do not fit"
        )
    return rows


def cache_capacity(cache: Tensor, inference_params) -> int:
    """Return how many tokens of a sequence there is room for in what ``cache_rows`` returned."""
    table = block_table_of(inference_params)
    return cache.shape[1] if table is None else cache.shape[1] * table.shape[1]


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
    if first != 0 or lengths.shape[0] != batch:
        lengths = lengths[first : first + batch]
    return lengths.to(torch.int32)


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
    if kv.is_cpu and not torch.compiler.is_compiling() and (length < 0).any():
        at = int((length < 0).nonzero()[0])
        raise ValueError(
            f"inference_params.lengths_per_sample must not be negative, got {int(length[at])} for "
            f"sequence {at}"
        )
    places = length[:, None] + torch.arange(seqlen, device=kv.device)
    row = torch.arange(kv.shape[0], device=kv.device)[:, None]
    cache[row, places] = kv.detach()
    return cache[:, : int(places.max()) + 1]
