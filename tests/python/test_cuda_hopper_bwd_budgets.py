"""What the backward of compute capability 9.0 may cost, counted on the emulated GPU."""

from __future__ import annotations

import itertools
import re

import pytest
from attention_cases import cuda_case, flash_forward_backward, make_tensors
from backends import HOPPER, needs_emulator
from reference import visible
from test_cuda_bwd_budgets import MASKS, sectors

pytestmark = needs_emulator

# Queries and keys of a block: csrc/flash_attn/src/hopper/bwd_tile_size.h.
TILES = {64: (128, 128), 96: (64, 128), 128: (64, 128), 192: (64, 64), 256: (64, 64)}
# Warp instructions, moves not counted, of a visit that needs no mask, all warps together, 2 % above
# what they are: of 128 queries at d = 64.
BUDGET = {64: 12570, 96: 8000, 128: 8555, 192: 7580, 256: 8570}


def launch(headdim, seqlens, heads=(1, 1), **options):
    """Counters of the main kernel, and how often each line of its PTX was executed. CTAs run one
    after the other: none waits for its turn."""
    case = cuda_case(seqlens=seqlens, heads=heads, dims=(headdim, headdim), **options)
    with HOPPER.emulator(checks="none", threads=1) as gpu:
        flash_forward_backward(*make_tensors(case))
    (name,) = (x for x in gpu.counters if x.startswith("flash_bwd_sm90_"))
    return gpu.counters[name], gpu.line_counters[name]


def executed(lines, instruction):
    return sum(line["executed"] for line in lines if instruction in line["text"])


def multiplied(counters):
    """Products of two numbers, of 64 x N x 16 by four warps."""
    widths = ((int(re.search(r"n(\d+)k16", name)[1]), n) for name, n in counters["tensor"].items())
    return sum(64 * 16 * width * count // 4 for width, count in widths)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlens", [(200, 328), (33, 500)])
@pytest.mark.parametrize("headdim", TILES)
def test_five_products_of_each_visible_block(headdim, seqlens, mask):
    """And an instruction of TMA for its Q and dO, and for the K and V of a CTA: lanes have a group
    of columns each."""
    counters, lines = launch(headdim, seqlens, heads=(2, 1), **MASKS[mask])
    seen = visible(*seqlens, **MASKS[mask])
    m, n = TILES[headdim]
    starts = itertools.product(range(0, seqlens[0], m), range(0, seqlens[1], n))
    blocks = {(i, j) for i, j in starts if seen[i : i + m, j : j + n].any()}
    assert multiplied(counters) == 2 * len(blocks) * 5 * m * n * headdim
    loads = 2 * (2 * len(blocks) + len({j for _, j in blocks}))
    assert executed(lines, "cp.async.bulk.tensor.4d.shared::cluster") == loads


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("headdim", TILES)
def test_no_bank_conflicts(headdim, mask):
    shared = launch(headdim, (200, 328), heads=(2, 1), **MASKS[mask])[0]["shared"]
    assert shared["wavefronts"] == shared["ideal_wavefronts"] > 0


@pytest.mark.parametrize("headdim", TILES)
def test_memory_is_read_once(headdim):
    """Beside TMA's: dK and dV written, lse and delta read at each visit, dQ written, half a sector
    by a store's row."""
    m, n = TILES[headdim]
    queries = 4 * m
    memory = launch(headdim, (queries, n))[0]["global"]
    dq = sectors(queries * headdim, 2)
    expected = 2 * sectors(n * headdim, 2) + 2 * sectors(queries, 4) + dq
    assert memory["ideal_sectors"] <= expected <= memory["sectors"] <= expected + dq


@pytest.mark.parametrize("headdim", TILES)
def test_sums_of_dq_are_added_once(headdim):
    """Of three CTAs the first stores, the second adds, the third reads."""
    m, n = TILES[headdim]
    _, lines = launch(headdim, (4 * m, 3 * n))
    rounds = 2 if headdim <= 128 else headdim // 64
    assert executed(lines, "cp.reduce.async.bulk.global") == 4 * rounds
    assert executed(lines, "cp.async.bulk.global.shared") == 4 * rounds


@pytest.mark.parametrize("headdim", TILES)
def test_instructions_of_a_visit(headdim):
    """Of those alone of CTAs in the middle: the difference between two numbers of them, eight
    visits each, with a part of what comes before and behind."""
    m, n = TILES[headdim]

    def total(ctas):
        counters, _ = launch(headdim, (8 * m, ctas * n))
        return counters["warp_instructions"] - counters["classes"]["move"]

    count = (total(5) - total(3)) / (2 * 8)
    assert count <= BUDGET[headdim], f"{count:.1f} warp instructions"
