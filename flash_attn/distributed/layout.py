"""How the tokens of a sequence are shared by the processes of a group.

- ``"contiguous"``: process r of n has the r-th of n runs of tokens.
- ``"zigzag"``: the sequence is cut in 2n runs, and process r has the r-th and the (2n - 1 - r)-th,
  so that under a causal mask every process has the same work.

Runs are as long as each other; where their number does not divide the tokens, the first ones have
one token more. Of packed sequences each is shared so by itself. A ``DeviceMesh`` of two dimensions
shares by its first one, and every process' tokens once more, contiguously, by its second one (the
layout of ``hybrid_attention``).

``group`` is a process group, a ``DeviceMesh`` of one dimension, or None: torch's default group, or
this process alone where torch.distributed is not initialised.
"""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn._arguments import as_int, check_tensors, wrong_kind
from flash_attn.utils.distributed import all_gather, group_rank, group_size

__all__ = [
    "local_cu_seqlens",
    "position_ids",
    "position_ids_varlen",
    "shard_lengths",
    "shard_sequence",
    "shard_varlen",
    "unshard_sequence",
    "unshard_varlen",
]

LAYOUTS = ("contiguous", "zigzag")


class Segment(NamedTuple):
    """A run of tokens of one sequence that a process holds."""

    position: int  # of the first token in the whole sequence
    start: int  # of the first token among the process' own
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


Segments = tuple[Segment, ...]


def check_layout(layout) -> str:
    """Return ``layout``; raise ValueError if there is none of this name."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'contiguous' or 'zigzag', got {layout!r:.80}")
    return layout


def is_mesh(group) -> bool:
    """Whether this is a DeviceMesh; does not import torch.distributed.device_mesh."""
    return hasattr(group, "get_group") and hasattr(group, "mesh_dim_names")


def as_group(group):
    """Return a process group, or None for this process alone.

    Raises:
        TypeError: it is neither a group, nor a DeviceMesh, nor None.
        ValueError: it is a mesh of more dimensions, or this process is not in it.
    """
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if is_mesh(group):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a DeviceMesh of one dimension, got one of {group.ndim}: "
                "mesh['name'] is a dimension of it, and hybrid_attention takes two"
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise wrong_kind("group", group, "a ProcessGroup, a DeviceMesh or None")
    group_size(group)  # raises for a process outside
    return group


def segments_of(lengths: list[int], places: list[int]) -> Segments:
    """The segments of a process that has the runs ``places`` of a sequence cut in ``lengths``."""
    ends, segments, start = [0, *accumulate(lengths)], [], 0
    for place in places:
        if lengths[place]:
            segments.append(Segment(ends[place], start, lengths[place]))
        start += lengths[place]
    return tuple(segments)


def _run_lengths(seqlen: int, runs: int) -> list[int]:
    share, rest = divmod(seqlen, runs)
    return [share + (run < rest) for run in range(runs)]


@functools.lru_cache(maxsize=4096)
def shares(seqlen: int, size: int, layout: str) -> tuple[Segments, ...]:
    """The segments of each of ``size`` processes."""
    if layout == "contiguous":
        lengths = _run_lengths(seqlen, size)
        return tuple(segments_of(lengths, [rank]) for rank in range(size))
    lengths = _run_lengths(seqlen, 2 * size)
    return tuple(segments_of(lengths, [rank, 2 * size - 1 - rank]) for rank in range(size))


def count(segments: Segments) -> int:
    """The number of tokens in segments."""
    return sum(segment.length for segment in segments)


def shard_lengths(seqlen: int, size: int, layout: str = "contiguous") -> list[int]:
    """Return the number of tokens that each of ``size`` processes has of a sequence."""
    seqlen, size = as_int("seqlen", seqlen), as_int("size", size)
    for name, value, least in (("seqlen", seqlen, 0), ("size", size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    return [count(segments) for segments in shares(seqlen, size, check_layout(layout))]


def indices_of(segments: Segments) -> Tensor:
    """The positions of the tokens of segments, int64, in the order in which they are held."""
    runs = [torch.arange(s.position, s.position + s.length) for s in segments]
    return torch.cat([torch.empty(0, dtype=torch.int64), *runs])


class Owners(NamedTuple):
    """The processes that share sequences, flattened: ring and, within it, Ulysses."""

    group: object  # of all of them; None: this process
    ring: int
    inner: int
    rank: int

    @property
    def size(self) -> int:
        return self.ring * self.inner


def owners(group) -> Owners:
    """Return who shares a sequence, for a group or a mesh of one or two dimensions."""
    if is_mesh(group) and group.ndim == 2:
        ring, inner = group.shape
        outer_rank, inner_rank = group.get_coordinate()
        return Owners(group, ring, inner, outer_rank * inner + inner_rank)
    group = as_group(group)
    return Owners(group, group_size(group), 1, group_rank(group))


def _places(seqlen: int, owned: Owners, layout: str) -> list[Tensor]:
    """The positions of the tokens of each process, int64 on the CPU."""
    places = []
    for segments in shares(seqlen, owned.ring, layout):
        indices = indices_of(segments)
        places.extend(indices.split(_run_lengths(len(indices), owned.inner)))
    return places


def _starts(name: str, cu_seqlens) -> list[int]:
    """Return cu_seqlens as ints.

    Raises:
        TypeError, ValueError: they do not ascend from 0, or are no tensor of one dimension.
    """
    check_tensors(**{name: cu_seqlens})
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{name} must be int32 (batch + 1,), got {cu_seqlens.dtype} of shape "
            f"{tuple(cu_seqlens.shape)}"
        )
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or any(a > b for a, b in zip(starts, starts[1:])):
        raise ValueError(f"{name} must ascend from 0, got {starts!s:.80}")
    return starts


def seqlens_of(name: str, cu_seqlens) -> list[int]:
    """Return the lengths of packed sequences."""
    starts = _starts(name, cu_seqlens)
    return [b - a for a, b in zip(starts, starts[1:])]


def _packed_places(seqlens: list[int], owned: Owners, layout: str) -> list[list[Tensor]]:
    """For each process the positions within each sequence of the tokens it has of it."""
    by_sequence = [_places(seqlen, owned, layout) for seqlen in seqlens]
    return [[places[rank] for places in by_sequence] for rank in range(owned.size)]


def _join(places: list[Tensor], offsets: list[int]) -> Tensor:
    """Indices into packed sequences that start at ``offsets``."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *(p + o for p, o in zip(places, offsets))])


def dense_segments(name: str, lengths: list[int], layout: str) -> tuple[Segments, ...]:
    """The segments of each process, which have these numbers of tokens.

    Raises:
        ValueError: they are not those that the layout gives them.
    """
    if layout == "contiguous":
        return tuple(segments_of(lengths, [rank]) for rank in range(len(lengths)))
    held = shares(sum(lengths), len(lengths), layout)
    for rank, (segments, length) in enumerate(zip(held, lengths)):
        if count(segments) != length:
            raise ValueError(
                f"{name} has {length} tokens on process {rank} of the group, but its share of "
                f"{sum(lengths)} in layout {layout!r} is {count(segments)} (see shard_sequence)"
            )
    return held


def order_of_tokens(name: str, lengths: list[int], layout: str) -> Optional[Tensor]:
    """The places in the whole of the tokens of all processes, one process after the other.

    None: they are in order. Raises ValueError as ``dense_segments``.
    """
    held = dense_segments(name, lengths, layout)
    return None if layout == "contiguous" else torch.cat([indices_of(s) for s in held])


def order_of_packed(seqlens: list[int], size: int, layout: str) -> list[Tensor]:
    """For each process the places in the whole of its tokens of packed sequences."""
    starts = [0, *accumulate(seqlens)]
    packed = _packed_places(seqlens, Owners(None, size, 1, 0), layout)
    return [_join(places, starts) for places in packed]


def _dim(x: Tensor, dim) -> int:
    check_tensors(x=x)
    dim = as_int("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim ({dim}) is not a dimension of x, which has {x.dim()}")
    return dim % x.dim()


def shard_sequence(x: Tensor, dim: int = 1, group=None, layout: str = "contiguous") -> Tensor:
    """Return this process' tokens of ``x``, which every process has whole.

    Args:
        x: of any dtype; on every process the same.
        dim: the dimension of tokens.
        group: who shares them: a process group, a DeviceMesh of one or two dimensions, or None.
        layout: "contiguous" or "zigzag".

    Returns:
        A tensor of its own, with fewer elements in ``dim``. Its gradient flows into this process'
        tokens of ``x`` alone.
    """
    dim, owned = _dim(x, dim), owners(group)
    mine = _places(x.shape[dim], owned, check_layout(layout))[owned.rank]
    return x.index_select(dim, mine.to(x.device))


def unshard_sequence(
    x: Tensor, dim: int = 1, group=None, layout: str = "contiguous", seqlen: Optional[int] = None
) -> Tensor:
    """Return the whole of which every process has ``x``: the inverse of ``shard_sequence``.

    Args:
        x: this process' tokens.
        dim, group, layout: as for ``shard_sequence``.
        seqlen: tokens of the whole; None: as many on every process as here.

    Returns:
        The whole, the same on every process. Its gradients on all processes are added, as those of
        ``flash_attn.utils.distributed.all_gather``.

    Raises:
        ValueError: this process has another number of tokens than ``seqlen`` says.
    """
    dim, owned = _dim(x, dim), owners(group)
    if seqlen is None:
        seqlen = x.shape[dim] * owned.size
    places = _places(as_int("seqlen", seqlen), owned, check_layout(layout))
    _check_share("x", x.shape[dim], len(places[owned.rank]), "seqlen", seqlen)
    return _gathered(x.movedim(dim, 0), places, owned).movedim(0, dim)


def _check_share(name: str, has: int, expected: int, of: str, whole) -> None:
    if has != expected:
        raise ValueError(
            f"{name} has {has} tokens, but this process' share of {of} {whole} is {expected}"
        )


def _gathered(x: Tensor, places: list[Tensor], owned: Owners) -> Tensor:
    """Tokens (n, ...) of all processes, where ``places`` says that they belong."""
    if owned.size == 1:
        return x
    longest = max(map(len, places))
    padded = torch.cat((x, x.new_zeros(longest - len(x), *x.shape[1:])))
    if is_mesh(owned.group):  # the inner dimension first: its processes are neighbours
        for mesh_dim in (1, 0):
            padded = all_gather(padded, owned.group.get_group(mesh_dim))
    else:
        padded = all_gather(padded, owned.group)
    order = torch.empty(sum(map(len, places)), dtype=torch.int64)
    for rank, indices in enumerate(places):
        order[indices] = torch.arange(len(indices)) + rank * longest
    return padded.index_select(0, order.to(x.device))


def position_ids(seqlen: int, group=None, layout: str = "contiguous", device=None) -> Tensor:
    """Return the positions of this process' tokens in the whole, int64: what rotary embedding asks.

    Args:
        seqlen: tokens of the whole.
        group, layout: as for ``shard_sequence``.
        device: of the result.
    """
    owned = owners(group)
    return _places(as_int("seqlen", seqlen), owned, check_layout(layout))[owned.rank].to(device)


def shard_varlen(x: Tensor, cu_seqlens: Tensor, group=None, layout: str = "contiguous") -> Tensor:
    """Return this process' tokens of packed sequences, which every process has whole.

    Args:
        x: ``(total, ...)``.
        cu_seqlens: int32 ``(batch + 1,)``, where the whole sequences start and end.
        group, layout: as for ``shard_sequence``; every sequence is shared by itself.

    Returns:
        ``(local total, ...)``, packed as ``local_cu_seqlens`` says.
    """
    check_tensors(x=x)
    starts, owned = _starts("cu_seqlens", cu_seqlens), owners(group)
    if x.dim() == 0 or x.shape[0] != starts[-1]:
        raise ValueError(
            f"x must have the {starts[-1]} tokens of cu_seqlens, got shape {tuple(x.shape)}"
        )
    seqlens = [b - a for a, b in zip(starts, starts[1:])]
    mine = _packed_places(seqlens, owned, check_layout(layout))[owned.rank]
    return x.index_select(0, _join(mine, starts).to(x.device))


def unshard_varlen(x: Tensor, cu_seqlens: Tensor, group=None, layout: str = "contiguous") -> Tensor:
    """Return the whole packed sequences: the inverse of ``shard_varlen``, gradient as of
    ``unshard_sequence``.

    Raises:
        ValueError: this process has another number of tokens than its share of cu_seqlens.
    """
    check_tensors(x=x)
    starts, owned = _starts("cu_seqlens", cu_seqlens), owners(group)
    seqlens = [b - a for a, b in zip(starts, starts[1:])]
    packed = _packed_places(seqlens, owned, check_layout(layout))
    places = [_join(own, starts) for own in packed]
    _check_share("x", x.shape[0], len(places[owned.rank]), "cu_seqlens' total", starts[-1])
    return _gathered(x, places, owned)


def local_cu_seqlens(
    cu_seqlens: Tensor, group=None, layout: str = "contiguous"
) -> tuple[Tensor, int]:
    """Return where this process' parts of packed sequences start and end, and the longest part.

    Returns:
        ``(cu_seqlens, max_seqlen)``: int32 ``(batch + 1,)`` on the device of the argument, and an
        int.
    """
    seqlens, owned = seqlens_of("cu_seqlens", cu_seqlens), owners(group)
    mine = _packed_places(seqlens, owned, check_layout(layout))[owned.rank]
    lengths = [len(places) for places in mine]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=cu_seqlens.device)
    return ends, max(lengths, default=0)


def position_ids_varlen(cu_seqlens: Tensor, group=None, layout: str = "contiguous") -> Tensor:
    """Return the position of each of this process' tokens in its own sequence, int64 (total,)."""
    seqlens, owned = seqlens_of("cu_seqlens", cu_seqlens), owners(group)
    mine = _packed_places(seqlens, owned, check_layout(layout))[owned.rank]
    return _join(mine, [0] * len(mine)).to(cu_seqlens.device)
