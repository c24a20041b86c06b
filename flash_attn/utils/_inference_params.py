"""What a generating model knows of its cache, and how the tokens of one call lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Optional

import torch
from torch import Tensor

__all__ = ["InferenceParams", "Packing"]


class Packing:
    """New tokens of several sequences, one sequence after the other in a batch of one row.

    Attributes:
        cu_seqlens_q: int32 ``(batch + 1,)``, where the new tokens of each sequence start and end.
        total: number of new tokens.
        max_seqlen_q: the most new tokens of a sequence.
        cu_seqlens_k, max_seqlen_k: the same for the tokens in the cache and the new ones together.
        starts: int32 ``(batch,)``, how many tokens the cache has of each sequence.
        sequences: int64 ``(total,)``, the sequence of each new token.
        positions: int64 ``(total,)``, the place of each new token in its sequence.
    """

    def __init__(self, seqlens: Sequence[int], starts: Optional[Sequence[int]] = None, device=None):
        """Make the tables.

        Args:
            seqlens: new tokens of each sequence, at least one.
            starts: tokens that the cache has of each; None: none.
            device: of the tables.

        Raises:
            ValueError: a sequence has no new token, or a negative number in the cache.
        """
        starts = [0] * len(seqlens) if starts is None else list(starts)
        if len(starts) != len(seqlens) or not seqlens:
            raise ValueError(
                f"seqlens and starts must have an entry for each sequence, got {len(seqlens)} and "
                f"{len(starts)}"
            )
        if min(seqlens) < 1 or min(starts) < 0:
            raise ValueError(
                f"every sequence needs a new token and no negative start, got seqlens "
                f"{list(seqlens)} and starts {starts}"
            )
        ends = [start + new for start, new in zip(starts, seqlens)]
        self.max_seqlen_q, self.max_seqlen_k = max(seqlens), max(ends)
        as_int32 = {"dtype": torch.int32, "device": device}
        self.cu_seqlens_q = torch.tensor([0, *accumulate(seqlens)], **as_int32)
        self.cu_seqlens_k = torch.tensor([0, *accumulate(ends)], **as_int32)
        self.starts = torch.tensor(starts, **as_int32)
        self._parts = list(zip((0, *accumulate(seqlens)), seqlens, starts))
        count = torch.tensor(seqlens, device=device)
        self.total = total = sum(seqlens)
        self.sequences = torch.arange(len(seqlens), device=device).repeat_interleave(
            count, output_size=total
        )
        first = (self.starts - self.cu_seqlens_q[:-1]).long()
        self.positions = torch.arange(total, device=device) + first[self.sequences]
        self._slots: dict = {}
        self._rows: dict[int, Tensor] = {}

    def parts(self) -> list[tuple[int, int, int]]:
        """Return of each sequence its first new token, their number, and those in the cache."""
        return self._parts

    def rows(self, first: int) -> Tensor:
        """Return int32 ``(batch, 1)``: the sequences' rows of a cache from ``first`` on."""
        if first not in self._rows:
            rows = torch.arange(len(self.starts), dtype=torch.int32, device=self.starts.device)
            self._rows[first] = rows[:, None] + first
        return self._rows[first]

    def slots(self, page_size: int, block_table: Tensor) -> Tensor:
        """Return int64 ``(total,)``, each token's place in a cache of ``page_size`` tokens a page
        whose pages are seen as one row.

        Args:
            block_table: int32 ``(batch, max_pages)``, the pages of each sequence.
        """
        key = (page_size, block_table.data_ptr())
        if key not in self._slots:
            page = self.positions.div(page_size, rounding_mode="floor")
            pages = block_table[self.sequences, page].long()
            self._slots[key] = (pages * page_size + self.positions % page_size, block_table)
        return self._slots[key][0]

    def last(self, count: int) -> Tensor:
        """Return int64 ``(batch, count)``, where the last new tokens of each sequence are.

        Raises:
            ValueError: a sequence has fewer.
        """
        back = torch.arange(-count, 0, device=self.positions.device)
        places = self.cu_seqlens_q[1:, None].long() + back
        if count > 1 and bool((places < self.cu_seqlens_q[:-1, None]).any()):
            raise ValueError(f"a sequence has fewer than {count} new tokens")
        return places


@dataclass
class InferenceParams:
    """The cache of a generating model, and what it has.

    Attributes:
        max_seqlen: tokens of the longest sequence that the cache has room for.
        max_batch_size: sequences that it has room for.
        seqlen_offset: how many tokens it has of every sequence.
        batch_size_offset: its row of the first sequence.
        key_value_memory_dict: from a layer's index to its keys and values, ``(max_batch_size,
            max_seqlen, 2, nheads_k, headdim)``; with ``block_table`` ``(num_blocks, block_size, 2,
            nheads_k, headdim)``. A layer that has none makes one, without ``block_table``.
        lengths_per_sample: int32 ``(max_batch_size,)``, how many tokens the cache has of each
            sequence; goes before ``seqlen_offset``.
        block_table: int32 ``(batch, max_blocks)``, the blocks of each sequence in a paged cache;
            ``lengths_per_sample`` then has an entry for each of its rows.
        packing: how the tokens of the next call lie: the model's input is one row ``(1, total)``.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Optional[Tensor] = None
    block_table: Optional[Tensor] = None
    packing: Optional[Packing] = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Forget what the cache has, before the next prompts."""
        self.max_seqlen, self.max_batch_size = max_seqlen, max_batch_size
        self.seqlen_offset, self.packing = 0, None
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
