"""Sequences of a packed batch as more of them: chunks, and rows that are not used.

The operators know sequences one after another, of which a query sees the keys of its own, aligned
to the end of both. FlashAttention-3 has more to say about a sequence, and all of it can be said by
cutting it up:

- ``attention_chunk``: a query sees the keys of its own chunk. Each chunk is a sequence. Its last
  query and its last key have the same position, so causal masks and windows mean the same there.
- ``seqused_q``, ``seqused_k``: rows past the used ones are a sequence of queries without keys, and
  one of keys without queries.

No tensor but the cumulative lengths is copied, and derivatives follow by themselves.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from flash_attn.v3._arguments import Score


class Sequences(NamedTuple):
    """Where the sequences of a packed batch lie: int32 (batch + 1), and the longest of them."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Lengths(NamedTuple):
    """How much of each sequence counts, int32 (batch,)."""

    q: Tensor
    k: Tensor


def constant(batch: int, seqlen: int, device) -> Tensor:
    """Return cu_seqlens, int32 (batch + 1), of sequences of one length."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen


def cumulative(lengths: Tensor) -> Tensor:
    """Return cu_seqlens, int32 (batch + 1), of lengths (batch,)."""
    ends = lengths.cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


def used_lengths(sequences: Sequences, seqused_q, seqused_k) -> Lengths:
    """Return the lengths of sequences, of which None means all rows."""
    return Lengths(
        sequences.cu_seqlens_q.diff() if seqused_q is None else seqused_q,
        sequences.cu_seqlens_k.diff() if seqused_k is None else seqused_k,
    )


def num_chunks(max_seqlen_q: int, chunk: int) -> int:
    """Return how many chunks that many queries in a row touch at most."""
    return max((max_seqlen_q + chunk - 2) // chunk + 1, 1)


def chunk_bounds(lengths: Lengths, max_seqlen_q: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Return where the chunks of each sequence's queries begin and end: (queries, keys).

    Both are int32 (batch, num_chunks + 1): rows of the sequence before each bound. The first chunk
    is that of the first query; those after the last query's are empty. A query before the first key
    is in a chunk without keys.
    """
    first = (lengths.k - lengths.q)[:, None]  # position of the first query
    steps = torch.arange(
        num_chunks(max_seqlen_q, chunk) + 1, dtype=torch.int32, device=first.device
    )
    bounds = (first.div(chunk, rounding_mode="floor") + steps) * chunk
    queries = (bounds - first).clamp_min(0).minimum(lengths.q[:, None])
    return queries, bounds.clamp_min(0).minimum(lengths.k[:, None])


def _from_ends(ends: Tensor) -> Tensor:
    """Return cu_seqlens of (batch, pieces) ends."""
    return torch.cat([ends.new_zeros(1), ends.flatten()])


def cut(sequences: Sequences, lengths: Optional[Lengths], all_used: bool, chunk: int) -> Sequences:
    """Return sequences that say the same without chunks and unused rows.

    Args:
        lengths: of the used rows; may be None if ``all_used`` and there is no chunk.
        all_used: whether these are all rows.
        chunk: number of positions of a chunk, or 0.
    """
    if all_used and not chunk:
        return sequences
    start_q, start_k = sequences.cu_seqlens_q[:-1, None], sequences.cu_seqlens_k[:-1, None]
    max_seqlen_q = sequences.max_seqlen_q
    if chunk:  # the first bound ends the keys before the first query's chunk
        queries, keys = chunk_bounds(lengths, max_seqlen_q, chunk)
        max_seqlen_q = min(max_seqlen_q, chunk) if all_used else max_seqlen_q
    else:
        queries, keys = lengths.q[:, None], lengths.k[:, None]
    ends_q, ends_k = start_q + queries, start_k + keys
    if not all_used:
        rest_q, rest_k = sequences.cu_seqlens_q[1:, None], sequences.cu_seqlens_k[1:, None]
        ends_q = torch.cat([ends_q, rest_q, rest_q], 1)
        ends_k = torch.cat([ends_k, ends_k[:, -1:], rest_k], 1)
    return Sequences(_from_ends(ends_q), _from_ends(ends_k), max_seqlen_q, sequences.max_seqlen_k)


# ------------------------------------------------------------------------------------------------
# Rows that see no key: softmax_lse is -inf there, where the operators have +inf.


def _sees_none(score: Score, position: Tensor, seqlen_k: Tensor) -> Tensor:
    """Whether queries at these positions, a sequence's first key being at 0, see no key."""
    if score.attention_chunk:
        return position < 0
    if score.last_ahead is None:
        return seqlen_k <= 0
    return (position + score.last_ahead < 0) | (seqlen_k <= 0)


def mark_dense(lse: Tensor, score: Score, seqlen_k: int) -> Tensor:
    """Mark rows without keys in softmax_lse (batch, nheads, seqlen_q); all sequences are alike."""
    ahead, seqlen_q = score.last_ahead, lse.shape[-1]
    if score.s_aux is not None or ahead is None or seqlen_k == 0 or seqlen_q <= seqlen_k + ahead:
        return lse
    empty = torch.arange(seqlen_q, device=lse.device) < seqlen_q - seqlen_k - ahead
    return lse.masked_fill(empty, -torch.inf)


def mark_padded(lse: Tensor, score: Score, seqlens_k: Tensor) -> Tensor:
    """Mark them in softmax_lse (batch, nheads, seqlen_q) of sequences with ``seqlens_k`` keys."""
    if score.s_aux is not None:
        return lse
    rows = torch.arange(lse.shape[-1], device=lse.device) - lse.shape[-1]
    seqlens_k = seqlens_k[:, None]
    return lse.masked_fill(_sees_none(score, rows + seqlens_k, seqlens_k)[:, None], -torch.inf)


def place_of_rows(total: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's sequence, and its number in it: int64 (total,).

    Rows after the last sequence count as its own.
    """
    rows = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    sequence = sequence.clamp_max(cu_seqlens.shape[0] - 2)
    return sequence, rows - cu_seqlens[sequence]


def mark_packed(lse: Tensor, score: Score, cu_seqlens_q: Tensor, lengths: Lengths) -> Tensor:
    """Mark them, and rows that are not used, in softmax_lse (nheads, total_q)."""
    if score.s_aux is not None or cu_seqlens_q.shape[0] < 2:
        return lse
    sequence, row = place_of_rows(lse.shape[1], cu_seqlens_q)
    seqlen_q, seqlen_k = lengths.q[sequence], lengths.k[sequence]
    empty = _sees_none(score, row + seqlen_k - seqlen_q, seqlen_k) | (row >= seqlen_q)
    return lse.masked_fill(empty, -torch.inf)
