"""What of a mask lies between the queries of one process and the keys of another.

Pure functions of positions; tested without processes. Queries and keys are given as segments (runs
of neighbouring tokens), the positions of queries in the keys' numbering: query i sees key j iff
``i - left <= j <= i + right``, -1 meaning no limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Optional

from flash_attn.distributed.layout import Segment, Segments, count


class Block(NamedTuple):
    """Queries and keys of which one call of a kernel makes attention."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    left: int  # of the kernel's window, whose mask is aligned to the block's bottom right corner
    right: int
    ahead: int  # position of the first query less that of the first key

    @property
    def rows(self) -> int:
        return self.q_stop - self.q_start

    @property
    def keys(self) -> int:
        return self.k_stop - self.k_start

    @property
    def side(self) -> int:
        """Where the keys are: 1 before all queries, -1 behind them, 0 among them."""
        if self.ahead >= self.keys:
            return 1
        return -1 if self.ahead <= -self.rows else 0


def visible_block(q: Segment, k: Segment, left: int, right: int) -> Optional[Block]:
    """The queries of ``q`` that see a key of ``k``, and the keys that one of them sees; or None."""
    ahead = q.position - k.position
    first = 0 if right < 0 else max(0, -(ahead + right))
    stop = q.length if left < 0 else min(q.length, k.length - ahead + left)
    k_first = 0 if left < 0 else max(0, first + ahead - left)
    k_stop = k.length if right < 0 else min(k.length, stop + ahead + right)
    if first >= stop or k_first >= k_stop:
        return None
    rows, keys, ahead = stop - first, k_stop - k_first, ahead + first - k_first
    left = -1 if left < 0 else left + keys - rows - ahead
    right = -1 if right < 0 else right + ahead - (keys - rows)
    return Block(
        *(q.start + first, q.start + stop, k.start + k_first, k.start + k_stop),
        -1 if left >= keys - 1 else left,
        -1 if right >= rows - 1 else right,
        ahead,
    )


def _cut(segment: Segment, at: tuple[int, int]) -> Iterator[Segment]:
    """The parts of a segment before, between and behind two positions."""
    end = segment.position + segment.length
    marks = [segment.position, *(min(max(p, segment.position), end) for p in at), end]
    for a, b in zip(marks, marks[1:]):
        if b > a:
            yield Segment(a, segment.start + a - segment.position, b - a)


def _apart(q: Segment, k: Segment) -> Iterator[tuple[Segment, Segment]]:
    """Pairs of parts at the same positions or at none in common."""
    for q_part in _cut(q, (k.position, k.position + k.length)):
        for k_part in _cut(k, (q.position, q.position + q.length)):
            yield q_part, k_part


def _joined(a: Block, b: Block) -> Optional[Block]:
    """One block in the place of two of which every query sees every key."""
    if max(a.left, a.right, b.left, b.right) >= 0:
        return None
    if (a.q_start, a.q_stop) == (b.q_start, b.q_stop) and a.k_stop == b.k_start:
        return a._replace(k_stop=b.k_stop)
    if (a.k_start, a.k_stop) == (b.k_start, b.k_stop) and a.q_stop == b.q_start:
        return a._replace(q_stop=b.q_stop)
    return None


def visible_blocks(
    q: Segments, k: Segments, left: int, right: int, with_distances: bool = False
) -> list[Block]:
    """The blocks that together hold every pair of a query and a key that it sees, each once.

    Args:
        q, k: what the processes hold.
        left, right: the window.
        with_distances: whether a kernel is to know distances (ALiBi). Each block then lies at one
            side of the diagonal or has it from corner to corner.
    """
    if q == k and left < 0 and right == 0 and not with_distances and q:
        # Tokens in the order of their positions: the mask of the whole is that of all segments.
        return [Block(0, count(q), 0, count(k), -1, 0, 0)]
    pairs = ((a, b) for a in q for b in k)
    if with_distances:
        pairs = (parts for pair in pairs for parts in _apart(*pair))
    blocks: list[Block] = []
    for pair in pairs:
        block = visible_block(*pair, left, right)
        if block is None:
            continue
        while blocks and not with_distances and (joined := _joined(blocks[-1], block)):
            block = joined
            blocks.pop()
        blocks.append(block)
    return blocks


class Hop(NamedTuple):
    """How the keys of each process come one stage further round the ring."""

    shift: int  # process r now has those of process r - shift
    step: int  # which come from process r - step
    carried: tuple[bool, ...]  # whether process r has them: itself or a later one needs them
    contributions: tuple[int, ...]  # to their gradient, up to process r


def plan_hops(needs: list[set[int]]) -> list[Hop]:
    """The hops after which every process has had the keys that it needs.

    Args:
        needs: for each process the processes whose keys its queries see.

    Shifts that no process needs are passed over, and keys travel no further than to the last
    process that needs them.
    """
    size = len(needs)
    shifts = sorted({(r - s) % size for r in range(size) for s in needs[r]} - {0})
    hops, before = [], 0
    for stage, shift in enumerate(shifts):
        carried, contributions = [], []
        for rank in range(size):
            source = (rank - shift) % size
            is_needed = [source in needs[(source + s) % size] for s in shifts]
            carried.append(any(is_needed[stage:]))
            contributions.append(sum(is_needed[: stage + 1]))
        hops.append(Hop(shift, shift - before, tuple(carried), tuple(contributions)))
        before = shift
    return hops
