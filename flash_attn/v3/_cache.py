"""FlashAttention-3's attention over a key-value cache, by this package's operators.

What the cache operators have goes to them. The rest is a packed batch over pages: queries packed by
``cu_seqlens_q``, chunks, ``qv``, and new tokens of different numbers or with rotary positions of
their own, which are then rotated and written here. A cache that is not paged has pages as well: its
rows, one to a sequence.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from flash_attn._arguments import FP8, as_int, check_optional, check_tensors
from flash_attn._eager import run
from flash_attn._functions import (
    FP8_KVCACHE,
    FP8_KVCACHE_APPEND,
    FP8_VARLEN_FORWARD,
    KVCACHE,
    KVCACHE_APPEND,
    VARLEN_FORWARD,
)
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.v3 import _sequences as sequences_of
from flash_attn.v3._arguments import (
    Score,
    check_cumulative,
    check_int32,
    check_used,
    is_readable,
)
from flash_attn.v3._attention import (
    check_query_of_values,
    factors_of_pieces,
    with_query_of_values,
)
from flash_attn.v3._sequences import Lengths


class NewTokens(NamedTuple):
    """Keys and values to append: (batch, seqlen_new, nheads_k, headdim), or packed."""

    k: Optional[Tensor] = None
    v: Optional[Tensor] = None
    cu_seqlens: Optional[Tensor] = None


class Rotary(NamedTuple):
    """A rotary embedding of queries and new keys; ``seqlens``: positions, None: the cache's."""

    cos: Optional[Tensor] = None
    sin: Optional[Tensor] = None
    seqlens: Optional[Tensor] = None
    interleaved: bool = True


class Cache(NamedTuple):
    """A cache, and which of it belongs to each sequence."""

    k: Tensor
    v: Tensor
    seqlens: Optional[Tensor] = None
    batch_idx: Optional[Tensor] = None
    leftpad: Optional[Tensor] = None
    page_table: Optional[Tensor] = None


class Queries(NamedTuple):
    """(batch, seqlen_q, nheads, headdim), or packed by ``cu_seqlens``."""

    q: Tensor
    qv: Optional[Tensor] = None
    cu_seqlens: Optional[Tensor] = None
    max_seqlen: Optional[int] = None
    seqused: Optional[Tensor] = None


def attend_cache(
    queries: Queries,
    cache: Cache,
    new: NewTokens,
    rotary: Rotary,
    score: Score,
    num_splits: int = 0,
    wants_lse: bool = True,
) -> tuple[Tensor, Optional[Tensor]]:
    """Append new tokens to the cache in place and attend over it: (out, softmax_lse).

    softmax_lse is fp32 (batch, nheads, seqlen_q), or (nheads, total_q) of packed queries, with -inf
    in rows that see no key; None if it is not wanted. There is no derivative.
    """
    is_appending = new.k is not None or new.v is not None
    needs_pages = (
        *(queries.qv, queries.cu_seqlens, queries.seqused, rotary.seqlens),
        new.cu_seqlens if is_appending else None,
    )
    if not score.attention_chunk and all(x is None for x in needs_pages):
        return _by_cache_operators(queries.q, cache, new, rotary, score, num_splits, wants_lse)
    with torch.no_grad():
        return _by_pages(queries, cache, new, rotary, score, num_splits, wants_lse)


def _run(operator, args, wants_all: bool):
    """Run an operator, which knows the page table by another name."""
    try:
        return run(operator, args, wants_all)
    except RuntimeError as error:
        if "block_table" not in str(error):
            raise
        raise type(error)(str(error).replace("block_table", "page_table")) from None


def _by_cache_operators(q, cache: Cache, new, rotary, score: Score, num_splits, wants_lse):
    is_appending = new.k is not None or new.v is not None
    _, *numbers = score.operators
    tensors = (q, cache.k, cache.v, new.k, new.v) if is_appending else (q, cache.k, cache.v)
    if score.quantization is None:
        args = (
            *(*tensors, cache.seqlens, rotary.cos, rotary.sin, cache.batch_idx, cache.leftpad),
            *(cache.page_table, None, *numbers, rotary.interleaved, num_splits, score.s_aux),
        )
        operator = KVCACHE_APPEND if is_appending else KVCACHE
    else:
        _refuse_rotary(rotary)
        args = (
            *(*tensors, cache.seqlens, cache.batch_idx, cache.leftpad, cache.page_table),
            *(*numbers, num_splits, score.s_aux, *score.quantization),
        )
        operator = FP8_KVCACHE_APPEND if is_appending else FP8_KVCACHE
    out, lse = _run(operator, args, wants_lse)
    if not wants_lse:
        return out, None
    if cache.seqlens is None and cache.leftpad is None:
        return out, sequences_of.mark_dense(lse, score, _capacity(cache))
    seqlens = cache.seqlens
    if seqlens is None:
        seqlens = torch.full((q.shape[0],), _capacity(cache), device=q.device)
    if is_appending:
        seqlens = seqlens + new.k.shape[1]
    if cache.leftpad is not None:
        seqlens = seqlens - cache.leftpad
    return out, sequences_of.mark_padded(lse, score, seqlens)


def _refuse_rotary(rotary: Rotary) -> None:
    if rotary.cos is not None or rotary.sin is not None:
        raise NotImplementedError(
            "rotary_cos and rotary_sin do not rotate fp8 tensors: rotate q and k before they are "
            "converted"
        )


def _capacity(cache: Cache) -> int:
    """Return the number of tokens that a sequence may have."""
    pages = 1 if cache.page_table is None else cache.page_table.shape[1]
    return pages * cache.k.shape[1]


# ------------------------------------------------------------------------------------------------
# A packed batch over pages


def _by_pages(queries: Queries, cache: Cache, new, rotary, score: Score, num_splits, wants_lse):
    q = queries.q
    check_tensors(q=q, k_cache=cache.k, v_cache=cache.v)
    cu_seqlens_q, max_seqlen_q = _packed_queries(queries)
    batch = cu_seqlens_q.shape[0] - 1
    table = _pages_of(cache, batch)
    seqlens = check_int32("cache_seqlens", cache.seqlens, batch)
    if seqlens is None:
        seqlens = torch.full((batch,), _capacity(cache), dtype=torch.int32, device=q.device)
    check_int32("cache_leftpad", cache.leftpad, batch)
    check_used("cache_seqlens", seqlens, torch.full_like(seqlens, _capacity(cache)))
    if cache.leftpad is not None:
        check_used("cache_leftpad", cache.leftpad, seqlens)
    check_int32("rotary_seqlens", rotary.seqlens, batch)
    rows = q if q.dim() == 3 else q.flatten(0, 1)
    check_cumulative("q", cu_seqlens_q, max_seqlen_q, rows.shape[0])
    qv = None if queries.qv is None else queries.qv.reshape(-1, *queries.qv.shape[-2:])
    if qv is not None:
        check_query_of_values(rows, cache.k, cache.v, qv)
    if new.k is not None or new.v is not None:
        _check_attention(rows, qv, max_seqlen_q, cache, table, score, num_splits)
        rows, seqlens = _append(
            rows, cu_seqlens_q, cache, table, seqlens, new, rotary, score.is_by_row
        )
    elif rotary.cos is not None or rotary.sin is not None:
        raise ValueError(
            "rotary_cos and rotary_sin rotate new keys and the queries: k and v must be given"
        )
    rows, keys = with_query_of_values(rows, cache.k, cache.v, qv)
    seqused = check_int32("seqused_q", queries.seqused, batch)
    given_q = cu_seqlens_q.diff()
    if seqused is not None:
        check_used("seqused_q", seqused, given_q)
    first = cache.leftpad
    given_k = seqlens if first is None else seqlens - first
    lengths = Lengths(given_q if seqused is None else seqused, given_k)
    out, lse = _attend_pages(
        rows, (keys, cache.v, table), cu_seqlens_q, max_seqlen_q, (first, lengths),
        seqused is None, score, num_splits, wants_lse,
    )  # fmt: skip
    if q.dim() == 4:
        out = out.reshape(*q.shape[:3], out.shape[-1])
        if lse is not None:
            lse = lse.reshape(q.shape[2], *q.shape[:2]).transpose(0, 1).contiguous()
    return out, lse


def _packed_queries(queries: Queries) -> tuple[Tensor, int]:
    """Return cu_seqlens_q and max_seqlen_q."""
    q = queries.q
    dims = 4 if queries.cu_seqlens is None else 3
    if q.dim() != dims:
        shape = "(batch, seqlen_q, nheads, headdim)" if dims == 4 else "(total_q, nheads, headdim)"
        word = "without" if dims == 4 else "with"
        raise ValueError(f"q must have shape {shape} {word} cu_seqlens_q, got {tuple(q.shape)}")
    if queries.cu_seqlens is None:
        return sequences_of.constant(*q.shape[:2], q.device), q.shape[1]
    if queries.max_seqlen is None:
        raise ValueError("max_seqlen_q must be provided if cu_seqlens_q is provided")
    cu_seqlens = check_int32("cu_seqlens_q", queries.cu_seqlens)
    if not cu_seqlens.shape[0]:
        raise ValueError("cu_seqlens_q must have shape (batch + 1,), got (0,)")
    return cu_seqlens, as_int("max_seqlen_q", queries.max_seqlen)


def _pages_of(cache: Cache, batch: int) -> Tensor:
    """Return the page table, int32 (batch, pages of a sequence)."""
    if cache.page_table is not None:
        table = cache.page_table
        if cache.batch_idx is not None:
            raise ValueError("cache_batch_idx must be None with page_table, which says it")
        if table.dim() != 2 or table.shape[0] != batch or table.dtype != torch.int32:
            raise ValueError(
                f"page_table must be int32 ({batch}, max_pages_per_sequence), got {table.dtype} "
                f"of shape {tuple(table.shape)}"
            )
        return table
    if cache.batch_idx is not None:
        table = check_int32("cache_batch_idx", cache.batch_idx, batch)
        rows = cache.k.shape[0]
        if is_readable(table) and not all(0 <= row < rows for row in table.tolist()):
            raise ValueError(f"cache_batch_idx must be from 0 to {rows - 1}, got {table.tolist()}")
        return table[:, None]
    if cache.k.shape[0] < batch:
        raise ValueError(
            f"k_cache has {cache.k.shape[0]} rows for a batch size of {batch}: cache_batch_idx "
            "must be given"
        )
    return torch.arange(batch, dtype=torch.int32, device=cache.k.device)[:, None]


def _attend_pages(
    q, pages, cu_seqlens_q, max_seqlen_q, keys, all_used, score: Score, num_splits, wants_lse
):
    """Attend over pages: (out (total_q, nheads, headdim_v), softmax_lse (nheads, total_q)).

    Args:
        pages: k, v, and the table.
        keys: (first, lengths): where each sequence's keys start, None: at 0, and how many there
            are.
    """
    k, v, table = pages
    first, lengths = keys
    cut_q, begins, ends, pieces = _cut(
        cu_seqlens_q, max_seqlen_q, first, lengths, all_used, score.attention_chunk
    )
    if pieces > 1:
        table = table.repeat_interleave(pieces, 0)
    tensors = (q, k, v, cut_q, sequences_of.cumulative(ends), max_seqlen_q)
    capacity, table = table.shape[1] * k.shape[1], table.contiguous()
    if score.quantization is None:
        args = (
            *(*tensors, capacity, *score.operators, None, False, table, begins, None, False),
            *(num_splits, score.s_aux, None),
        )
        out, lse, *_ = _run(VARLEN_FORWARD, args, wants_lse)
    else:
        args = (
            *(*tensors, capacity, *score.operators[1:], table, begins, None, num_splits),
            *(score.s_aux, *factors_of_pieces(score, cu_seqlens_q, cut_q)),
        )
        out, lse = _run(FP8_VARLEN_FORWARD, args, wants_lse)
    if not wants_lse:
        return out, None
    return out, sequences_of.mark_packed(lse, score, cu_seqlens_q, lengths)


def _cut(cu_seqlens_q, max_seqlen_q, first, lengths: Lengths, all_used: bool, chunk: int):
    """As ``sequences_of.cut`` for keys in pages: (cu_seqlens_q, leftpad_k, ends of keys, pieces).

    The pieces of a sequence share its row of the table, and each begins and ends in it. Where all
    begin at 0 leftpad_k is None, which more kernels take.
    """
    if all_used and not chunk:
        return cu_seqlens_q, first, lengths.k if first is None else first + lengths.k, 1
    if chunk:
        queries, keys = sequences_of.chunk_bounds(lengths, max_seqlen_q, chunk)
        queries, begins, ends = queries[:, 1:], keys[:, :-1], keys[:, 1:]
    else:
        queries, ends = lengths.q[:, None], lengths.k[:, None]
        begins = torch.zeros_like(ends)
    queries = cu_seqlens_q[:-1, None] + queries
    if not all_used:  # the rest of the queries sees no key
        queries = torch.cat([queries, cu_seqlens_q[1:, None]], 1)
        begins, ends = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (begins, ends))
    cut_q = torch.cat([queries.new_zeros(1), queries.flatten()])
    if first is not None:
        begins, ends = (first[:, None] + x for x in (begins, ends))
    begins, ends = (x.flatten().contiguous() for x in (begins, ends))
    return cut_q, None if first is None and not chunk else begins, ends, queries.shape[1]


# ------------------------------------------------------------------------------------------------
# Appending


def _check_attention(
    q, qv, max_seqlen_q: int, cache: Cache, table, score: Score, num_splits: int
) -> None:
    """Raise what the attention would raise after the cache is written: ask for that of no query."""
    none = table.new_zeros(table.shape[0] + 1)
    k, v = cache.k[:1], cache.v[:1]
    q, keys = with_query_of_values(q[:0], k, v, None if qv is None else qv[:0])
    first = None if cache.leftpad is None else none[1:]  # as the call will have it
    nothing = (first, Lengths(none[1:], none[1:]))
    _attend_pages(q, (keys, v, table), none, max_seqlen_q, nothing, True, score, num_splits, False)


def _append(q, cu_seqlens_q, cache: Cache, table, seqlens, new, rotary: Rotary, by_row: bool):
    """Write new tokens to the cache: (queries, rotated, and the sequences' lengths after it)."""
    k, v, cu_seqlens_new = _packed_tokens(new, cache, cu_seqlens_q.shape[0] - 1)
    sequence, row = sequences_of.place_of_rows(k.shape[0], cu_seqlens_new)
    lengths = seqlens + cu_seqlens_new.diff()
    page, slot = _places(cache, table, seqlens, lengths, sequence, row)
    if k.dtype is FP8:
        _refuse_rotary(rotary)
    if rotary.cos is not None or rotary.sin is not None:
        starts = seqlens if rotary.seqlens is None else rotary.seqlens
        k = _rotated("k", k, starts[sequence] + row, rotary)
        of_q, row_of_q = sequences_of.place_of_rows(q.shape[0], cu_seqlens_q)
        q = _rotated("q", q, starts[of_q] + (row_of_q if by_row else 0), rotary)
    _as_stored(cache.k)[page, slot] = _as_stored(k)
    _as_stored(cache.v)[page, slot] = _as_stored(v)
    return q, lengths


def _as_stored(x: Tensor) -> Tensor:
    """Return fp8 numbers as bytes, which torch can index."""
    return x.view(torch.uint8) if x.dtype is FP8 else x


def _packed_tokens(new: NewTokens, cache: Cache, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    if new.k is None or new.v is None:
        raise ValueError("k and v must be given together")
    if cache.seqlens is None:
        raise ValueError("cache_seqlens must be given with k and v, which are written there")
    check_tensors(k=new.k, v=new.v)
    dims = 4 if new.cu_seqlens is None else 3
    for name, x, rows in (("k", new.k, cache.k), ("v", new.v, cache.v)):
        if x.dim() != dims or x.shape[-2:] != rows.shape[-2:] or x.dtype != rows.dtype:
            shape = "batch, seqlen_new" if dims == 4 else "total_new"
            raise ValueError(
                f"{name} must be {rows.dtype} of shape ({shape}, {rows.shape[-2]}, "
                f"{rows.shape[-1]}), got {x.dtype} of shape {tuple(x.shape)}"
            )
        if x.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device}, as the cache, got {x.device}")
    if new.k.shape[:-1] != new.v.shape[:-1]:
        raise ValueError(
            f"v must have as many tokens as k, {tuple(new.k.shape[:-2])}, got "
            f"{tuple(new.v.shape[:-2])}"
        )
    if new.cu_seqlens is not None:
        cu_seqlens = check_int32("cu_seqlens_k_new", new.cu_seqlens, batch + 1)
        total = int(cu_seqlens[-1])  # waits for a GPU: what follows must not be written
        if total > new.k.shape[0]:
            raise ValueError(
                f"cu_seqlens_k_new ends at {total}, beyond the {new.k.shape[0]} rows of k"
            )
        return new.k[:total], new.v[:total], cu_seqlens
    if new.k.shape[0] != batch:
        raise ValueError(f"k must have a batch of {batch}, got {new.k.shape[0]}")
    cu_seqlens = sequences_of.constant(*new.k.shape[:2], new.k.device)
    return new.k.flatten(0, 1), new.v.flatten(0, 1), cu_seqlens


def _places(cache: Cache, table, seqlens, lengths, sequence, row) -> tuple[Tensor, Tensor]:
    """Return page and slot of each new token, which are checked before anything is written."""
    capacity, page_size = _capacity(cache), cache.k.shape[1]
    if is_readable(lengths):
        for i, (before, after) in enumerate(zip(seqlens.tolist(), lengths.tolist())):
            if not 0 <= before <= after:
                raise ValueError(f"cu_seqlens_k_new decreases at sequence {i}")
            if after > capacity:
                raise ValueError(
                    f"cache_seqlens[{i}] = {before} plus {after - before} new tokens exceeds the "
                    f"{capacity} tokens that the cache has for a sequence"
                )
    position = seqlens[sequence] + row
    page = table[sequence, position.div(page_size, rounding_mode="floor").long()].long()
    slot = position.remainder(page_size).long()
    if is_readable(page) and page.numel():
        name = "cache_batch_idx" if cache.page_table is None else "page_table"
        low, high = int(page.min()), int(page.max())
        if low < 0 or high >= cache.k.shape[0]:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} names {wrong}, outside the cache's {cache.k.shape[0]}")
        place = page * page_size + slot
        if place.unique().numel() != place.numel():
            raise ValueError(f"{name} appends twice to the same place of the cache")
    return page, slot


def _rotated(name: str, x: Tensor, position: Tensor, rotary: Rotary) -> Tensor:
    """Return tokens (total, nheads, headdim) rotated, each by its own position."""
    check_optional(rotary_cos=rotary.cos, rotary_sin=rotary.sin)
    if rotary.cos is None or rotary.sin is None:
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if is_readable(position) and position.numel():
        low, high = int(position.min()), int(position.max())
        if low < 0 or high >= rotary.cos.shape[0]:
            raise ValueError(
                f"rotary_cos has {rotary.cos.shape[0]} rows, but positions of {name} go from "
                f"{low} to {high}"
            )
    return apply_rotary_emb(
        x[:, None], rotary.cos, rotary.sin, rotary.interleaved, seqlen_offsets=position
    )[:, 0]
