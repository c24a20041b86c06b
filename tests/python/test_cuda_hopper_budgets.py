"""What the kernels of compute capability 9.0 may cost, counted on the emulated GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_cases import BF16, cuda_case, qkv
from backends import HOPPER, needs_emulator
from reference import visible
from test_cuda_budgets import MASKS, MODIFIERS

from flash_attn import flash_attn_func, flash_attn_varlen_func

pytestmark = needs_emulator

HEADDIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
WARPGROUP_ROWS = 64
# Queries of a tile and keys of a block: csrc/flash_attn/src/hopper/tile_size.h.
TILES = {
    (64, 64): (192, 128),
    (96, 96): (128, 128),
    (128, 128): (128, 128),
    (192, 128): (128, 112),
    (192, 192): (128, 112),
    (256, 256): (128, 80),
}
# Warp instructions, moves not counted, for a block of keys and 16 queries, a consumer warp's, with
# its part of what the producer does; of blocks that need no mask. 2 % above what they are: with
# plain scores, and with the modifier that takes most.
BUDGET = {
    (64, 64): (505, 900),
    (96, 96): (485, 910),
    (128, 128): (490, 930),
    (192, 128): (470, 785),
    (192, 192): (470, 785),
    (256, 256): (405, 655),
}
MODIFIED_KEYS = {192: 96, 256: 64}  # of a block, where they are fewer


def launch(case, **options):
    """Counters of a launch, and how often each line of its PTX was executed."""
    stores_lse = "dropout_p" not in options  # with which there would be S_dmask
    with HOPPER.emulator(checks="none") as gpu:
        flash_attn_func(*qkv(case), **options, return_attn_probs=stores_lse)
    ((name, counters),) = gpu.counters.items()
    assert name.startswith("flash_fwd_sm90_")
    return counters, gpu.line_counters[name]


def executed(lines, instruction):
    return sum(line["executed"] for line in lines if instruction in line["text"])


def groups_of_columns(headdim):
    """Boxes of a tile: 128 bytes wide, or 64."""
    return headdim // 64 if headdim % 64 == 0 else headdim // 32


def visible_blocks(seqlens, mask, rows, keys):
    """How many blocks of so many queries and keys hold a visible score."""
    seen = visible(*seqlens, **MASKS[mask])
    starts = itertools.product(range(0, seqlens[0], rows), range(0, seqlens[1], keys))
    return sum(bool(seen[i : i + rows, j : j + keys].any()) for i, j in starts)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("headdims", HEADDIMS)
def test_memory_is_accessed_without_waste(headdims, mask):
    """No shared-memory bank conflicts; no sector of global memory is moved in vain."""
    case = cuda_case(seqlens=(200, 328), heads=(2, 1), dims=headdims)
    counters, _ = launch(case, **MASKS[mask])
    assert counters["shared"]["wavefronts"] == counters["shared"]["ideal_wavefronts"] > 0
    assert counters["global"]["sectors"] == counters["global"]["ideal_sectors"] > 0


@pytest.mark.parametrize("headdim", [64, 96, 128, 256])
def test_packed_memory_is_accessed_without_waste(headdim):
    """The ends of sequences are stored by warps."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(175, 2, headdim, generator=gen).to(BF16)
    k = torch.randn(500, 1, headdim, generator=gen).to(BF16)
    lengths = [torch.tensor([0, *n], dtype=torch.int32) for n in ((70, 100, 175), (300, 310, 500))]
    with HOPPER.emulator(checks="none") as gpu:
        flash_attn_varlen_func(q, k, k, *lengths, 75, 300, causal=True)
    ((name, counters),) = gpu.counters.items()
    assert name.startswith("flash_fwd_sm90_")
    assert counters["shared"]["wavefronts"] == counters["shared"]["ideal_wavefronts"] > 0
    # Rows of the LSE need not start at a sector.
    sectors = counters["global"]["sectors"], counters["global"]["ideal_sectors"]
    assert 0 < sectors[0] <= sectors[1] + 16


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("headdims", HEADDIMS)
@pytest.mark.parametrize("seqlens", [(200, 328), (328, 200), (83, 500)])
def test_no_product_and_no_copy_without_a_visible_score(headdims, mask, seqlens):
    """As many wgmma as the blocks of a warpgroup's queries and one block of keys that hold a
    visible score need, and as many boxes by TMA as those of a CTA's queries."""
    case = cuda_case(seqlens=seqlens, heads=(2, 1), dims=headdims)
    counters, lines = launch(case, **MASKS[mask])
    rows, keys = TILES[headdims]
    heads = case.heads[0]
    blocks = heads * visible_blocks(seqlens, mask, WARPGROUP_ROWS, keys)
    expected = {}
    for n, products in ((keys, headdims[0] // 16), (headdims[1], keys // 16)):
        name = f"wgmma.m64n{n}k16.bf16"
        expected[name] = expected.get(name, 0) + 4 * blocks * products  # of four warps
    assert counters["tensor"] == expected

    q, v = map(groups_of_columns, headdims)
    cta_blocks = visible_blocks(seqlens, mask, rows, keys)
    tiles = visible_blocks(seqlens, mask, rows, seqlens[1])
    loads = executed(lines, "cp.async.bulk.tensor.4d.shared::cluster")
    assert loads == heads * (tiles * q + cta_blocks * (q + v))
    warpgroups = -(-seqlens[0] // rows) * rows // WARPGROUP_ROWS
    assert executed(lines, "cp.async.bulk.tensor.4d.global") <= heads * warpgroups * v


def instructions_for_each_block(headdims, keys, options):
    """Of the loop alone: the difference between two lengths of keys, whose blocks need no mask."""
    rows = TILES[headdims][0] if options == {} or "causal" in options else 128

    def total(blocks):
        case = cuda_case(seqlens=(rows, keys * blocks + rows), heads=(1, 1), dims=headdims)
        counters, _ = launch(case, **options)
        return counters["warp_instructions"] - counters["classes"]["move"]

    return (total(12) - total(6)) / (6 * rows // 16)


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("headdims", HEADDIMS)
def test_instructions_for_each_block(headdims, mask):
    count = instructions_for_each_block(headdims, TILES[headdims][1], MASKS[mask])
    assert count <= BUDGET[headdims][0], f"{count:.1f} warp instructions for each block"


@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("headdims", HEADDIMS)
def test_instructions_for_each_block_of_modified_scores(headdims, modifier):
    keys = MODIFIED_KEYS.get(headdims[0], 128)
    count = instructions_for_each_block(headdims, keys, MODIFIERS[modifier])
    assert count <= BUDGET[headdims][1], f"{count:.1f} warp instructions for each block"
