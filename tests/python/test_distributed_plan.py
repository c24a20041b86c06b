"""Who holds what, which blocks a mask leaves, and how keys travel: pure functions, brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from flash_attn.distributed import layout
from flash_attn.distributed._blocks import plan_hops, visible_blocks

LAYOUTS = ("contiguous", "zigzag")
WINDOWS = [(-1, -1), (-1, 0), (0, 0), (3, 0), (-1, 2), (2, -1), (1, 4), (30, 30)]


def seen(block):
    """Pairs (query, key) that a kernel's mask, aligned to the bottom right, leaves of a block."""
    rows, keys = block.rows, block.keys
    for i, j in itertools.product(range(rows), range(keys)):
        at = i + keys - rows
        if (block.left < 0 or j >= at - block.left) and (block.right < 0 or j <= at + block.right):
            yield block.q_start + i, block.k_start + j


def positions(segments):
    return [s.position + i for s in segments for i in range(s.length)]


@pytest.mark.parametrize("with_distances", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(16, 16), (13, 13), (3, 3), (7, 18), (18, 7)])
def test_blocks_hold_every_visible_pair_once(kind, seqlen_q, seqlen_k, with_distances):
    for size, (left, right) in itertools.product((1, 2, 3, 4), WINDOWS):
        queries = layout.shares(seqlen_q, size, kind)
        keys = layout.shares(seqlen_k, size, kind)
        for q, k in itertools.product(queries, keys):
            q = tuple(s._replace(position=s.position + seqlen_k - seqlen_q) for s in q)
            blocks = visible_blocks(q, k, left, right, with_distances)
            found = [pair for block in blocks for pair in seen(block)]
            expected = [
                (i, j)
                for (i, p), (j, r) in itertools.product(
                    enumerate(positions(q)), enumerate(positions(k))
                )
                if (left < 0 or r >= p - left) and (right < 0 or r <= p + right)
            ]
            assert sorted(found) == expected
            for block in blocks:
                assert block.left >= -1 and block.right >= -1
                if with_distances and block.side == 0:
                    assert block.ahead == block.keys - block.rows
                # No row and no key at an edge is without a pair.
                rows, cols = zip(*seen(block))
                assert (min(rows), max(rows)) == (block.q_start, block.q_stop - 1)
                assert (min(cols), max(cols)) == (block.k_start, block.k_stop - 1)


def test_zigzag_shares_causal_work():
    for size in (2, 4, 8):
        held = layout.shares(16 * size, size, "zigzag")
        work = [
            sum(len(list(seen(b))) for k in held for b in visible_blocks(q, k, -1, 0)) for q in held
        ]
        assert len(set(work)) == 1
        calls = [sum(len(visible_blocks(q, k, -1, 0)) for k in held) for q in held]
        assert calls == [size] * size  # one a process' keys: neighbouring halves are one block


def travel(hops, size):
    """The sources that each process has had, by following the messages."""
    held = {rank: rank for rank in range(size)}
    had = [{rank} for rank in range(size)]
    for hop in hops:
        before, held = held, {}
        for rank in range(size):
            if hop.carried[rank]:
                held[rank] = before[(rank - hop.step) % size]
                assert held[rank] == (rank - hop.shift) % size
                had[rank].add(held[rank])
    return had


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_hops_bring_what_is_needed(size):
    generator = torch.Generator().manual_seed(size)
    for density in (0.0, 0.2, 0.6, 1.0):
        for _ in range(20):
            wanted = torch.rand(size, size, generator=generator) < density
            needs = [{s for s in range(size) if wanted[r, s] or s == r} for r in range(size)]
            hops = plan_hops(needs)
            had = travel(hops, size)
            assert all(needed <= got for needed, got in zip(needs, had))
            # Nothing arrives where neither this process nor a later one needs it.
            last = {}
            for stage, hop in enumerate(hops):
                for rank in range(size):
                    source = (rank - hop.shift) % size
                    if source in needs[rank]:
                        last[source] = stage
            for stage, hop in enumerate(hops):
                for rank in range(size):
                    source = (rank - hop.shift) % size
                    assert hop.carried[rank] == (stage <= last.get(source, -1))


def test_masks_shorten_the_way():
    size = 8
    held = layout.shares(8 * size, size, "contiguous")

    def messages(left, right):
        needs = [{s for s in range(size) if visible_blocks(q, held[s], left, right)} for q in held]
        return [sum(hop.carried) for hop in plan_hops(needs)]

    assert messages(-1, -1) == [8] * 7
    assert messages(-1, 0) == [7, 6, 5, 4, 3, 2, 1]  # nobody is sent keys of the future
    assert messages(5, 0) == [7]
    assert messages(5, 5) == [8, 7]  # behind, then before; both at once only for the first process
    assert messages(0, 0) == []


@pytest.mark.parametrize("kind", LAYOUTS)
def test_lengths_and_positions(kind):
    for seqlen, size in itertools.product((0, 1, 5, 16, 17, 23), (1, 2, 3, 4)):
        held = layout.shares(seqlen, size, kind)
        assert sorted(p for s in held for p in positions(s)) == list(range(seqlen))
        lengths = layout.shard_lengths(seqlen, size, kind)
        assert lengths == [layout.count(s) for s in held]
        assert max(lengths) - min(lengths) <= (1 if kind == "contiguous" else 2)
    assert layout.shard_lengths(10, 4) == [3, 3, 2, 2]
    assert [positions(s) for s in layout.shares(9, 2, "zigzag")] == [[0, 1, 2, 7, 8], [3, 4, 5, 6]]


def test_refusals():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"layout must be 'contiguous' or 'zigzag', got 'stripes'"):
        layout.shard_sequence(x, 1, None, "stripes")
    with pytest.raises(ValueError, match=r"dim \(2\) is not a dimension of x, which has 2"):
        layout.shard_sequence(x, 2)
    with pytest.raises(TypeError, match="group must be a ProcessGroup, a DeviceMesh or None, got"):
        layout.shard_sequence(x, 1, "all")
    with pytest.raises(ValueError, match="x has 4 tokens, but this process' share of seqlen 5 is"):
        layout.unshard_sequence(x, 1, seqlen=5)
    with pytest.raises(
        ValueError, match=r"cu_seqlens must be int32 \(batch \+ 1,\), got torch.int6"
    ):
        layout.local_cu_seqlens(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"cu_seqlens must ascend from 0, got \[0, 3, 2\]"):
        layout.local_cu_seqlens(torch.tensor([0, 3, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"x must have the 3 tokens of cu_seqlens, got shape"):
        layout.shard_varlen(x, torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        layout.shard_lengths(4, 0)
