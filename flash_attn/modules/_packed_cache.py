"""Packed tokens of sequences of different lengths on their way into a layer's cache."""

from __future__ import annotations

from torch import Tensor

from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.modules._kv_cache import block_table_of, packing_of, whole_cache
from flash_attn.utils._inference_params import Packing


def rotate_packed(
    rotary: RotaryEmbedding, q: Tensor, kv: Tensor, packing: Packing, capacity: int
) -> None:
    """Turn packed queries and keys in place, each token at its place in its sequence.

    Args:
        q: ``(total, nheads, headdim)``.
        kv: ``(total, 2, nheads_k, headdim)``.
        capacity: tokens that a row of the cache has room for: tables of xPos must always have one
            length.
    """
    if rotary.depends_on_length:
        for first, count, start in packing.parts():
            part = slice(first, first + count)
            rotary(q[None, part], kv[None, part], seqlen_offset=start)
        return
    rows = packing.max_seqlen_k if rotary.scale_base is None else capacity
    all_tables = rotary._update_cos_sin_cache(rows, q.device, q.dtype)
    tables = all_tables[:2]
    tables_k = all_tables[2:4] if rotary.scale_base else tables
    where = {"inplace": True, "interleaved": rotary.interleaved}
    where.update(cu_seqlens=packing.cu_seqlens_q, max_seqlen=packing.max_seqlen_q)
    where["seqlen_offsets"] = packing.starts
    apply_rotary_emb(q, *tables, **where)
    apply_rotary_emb(kv[:, 0], *tables_k, **where)


def append_packed(kv: Tensor, inference_params, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Write the keys and values of packed tokens into a layer's cache.

    No gradient flows through the cache.

    Args:
        kv: ``(total, 2, nheads_k, headdim)``, laid out as ``inference_params.packing`` says.

    Returns:
        The cache as pages ``(num_pages, page_size, 2, nheads_k, headdim)`` and the pages of each
        sequence, int32 ``(batch, max_pages)``: blocks, or rows, which are pages of ``max_seqlen``.

    Raises:
        ValueError: the tokens do not fit into the cache, or it does not fit ``kv``.
    """
    packing = packing_of(inference_params)
    cache = whole_cache(kv, inference_params, layer_idx)
    table = block_table_of(inference_params)
    if table is None:
        table = packing.rows(inference_params.batch_size_offset)
    room, rows = cache.shape[1] * table.shape[1], len(packing.starts)
    is_beyond = block_table_of(inference_params) is None and (
        inference_params.batch_size_offset + rows > len(cache)
    )
    if packing.max_seqlen_k > room or len(table) != rows or is_beyond:
        raise ValueError(
            f"{rows} sequences of up to {packing.max_seqlen_k} tokens do not fit into a cache "
            f"{tuple(cache.shape)} with room for {room} tokens a sequence"
        )
    cache.flatten(0, 1)[packing.slots(cache.shape[1], table)] = kv.detach()
    return cache, table
