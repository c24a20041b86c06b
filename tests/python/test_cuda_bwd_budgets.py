"""What the backward of the CUDA kernels may cost, counted on the emulated GPU."""

from __future__ import annotations

import itertools

import pytest
from attention_cases import cuda_case, flash_forward_backward, make_tensors
from backends import needs_emulator
from reference import visible

import flash_attn

pytestmark = needs_emulator

MASKS = {"none": {}, "causal": {"causal": True}, "window": {"window_size": (150, 40)}}
SCORES = {"masked": {}, "modified": {"softcap": 30.0}}
# (head dim, scores): queries and keys of a block, as in docs/cuda.md.
TILES = {
    (32, "masked"): (64, 128),
    (64, "masked"): (64, 128),
    (96, "masked"): (64, 64),
    (128, "masked"): (64, 128),
    (192, "masked"): (32, 64),
    (256, "masked"): (64, 64),
    (64, "modified"): (64, 128),
    (128, "modified"): (64, 64),
    (256, "modified"): (32, 32),
}
# Warp instructions for each mma of visits that need no mask, moves not counted.
BUDGET = {
    (32, "masked"): 13.8,
    (64, "masked"): 8.1,
    (96, "masked"): 6.5,
    (128, "masked"): 5.3,
    (192, "masked"): 9.4,
    (256, "masked"): 5.2,
    (64, "modified"): 10.1,
    (128, "modified"): 8.7,
    (256, "modified"): 8.8,
}
kernels = pytest.mark.parametrize(("headdim", "scores"), TILES)


def counters(headdim, scores, seqlens, heads=(1, 1), **options):
    """Of the main kernel of a call. CTAs run one after the other: none waits for its turn."""
    dims = (headdim, headdim)
    case = cuda_case(seqlens=seqlens, heads=heads, dims=dims, **SCORES[scores], **options)
    with flash_attn.emulator(checks="none", threads=1) as gpu:
        flash_forward_backward(*make_tensors(case))
    (kernel,) = (x for name, x in gpu.counters.items() if name.startswith("flash_bwd_sm80"))
    return kernel


def mma_count(kernel):
    return sum(kernel["tensor"].values())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlens", [(200, 328), (328, 200), (33, 500)])
@kernels
def test_five_products_of_each_visible_block(headdim, scores, seqlens, mask):
    kernel = counters(headdim, scores, seqlens, heads=(2, 1), **MASKS[mask])
    seen = visible(*seqlens, **MASKS[mask])
    m, n = TILES[headdim, scores]
    blocks = sum(
        bool(seen[i : i + m, j : j + n].any())
        for i, j in itertools.product(range(0, seqlens[0], m), range(0, seqlens[1], n))
    )
    assert mma_count(kernel) == 2 * blocks * 5 * m * n * headdim // (16 * 8 * 16)


@pytest.mark.parametrize("mask", MASKS)
@kernels
def test_no_bank_conflicts(headdim, scores, mask):
    shared = counters(headdim, scores, (200, 328), heads=(2, 1), **MASKS[mask])["shared"]
    assert shared["wavefronts"] == shared["ideal_wavefronts"] > 0


def sectors(elements, size):
    """Of 32 bytes."""
    return elements * size // 32


@kernels
def test_memory_is_read_once(headdim, scores):
    """K, V, dK and dV by the one CTA, Q, dO, lse and delta at each visit, dQ written. Of dQ a
    store's row is half a sector."""
    m, n = TILES[headdim, scores]
    queries = 4 * m
    memory = counters(headdim, scores, (queries, n))["global"]
    dq = sectors(queries * headdim, 2)
    expected = 4 * sectors(n * headdim, 2) + 2 * dq + 2 * sectors(queries, 4) + dq
    assert memory["ideal_sectors"] == expected
    assert memory["sectors"] <= expected + dq


@kernels
def test_sums_of_dq_are_read_and_written_once(headdim, scores):
    """By three CTAs: twice each, whole sectors; each warp asks for its turn and tells the next."""
    m, n = TILES[headdim, scores]
    queries = 4 * m
    kernel = counters(headdim, scores, (queries, 3 * n))
    memory, warps = kernel["global"], kernel["warps"] // kernel["ctas"]
    dq, sums = sectors(queries * headdim, 2), sectors(queries * headdim, 4)
    of_a_cta = 4 * sectors(n * headdim, 2) + 2 * dq + 2 * sectors(queries, 4)
    turns = 2 * 2 * 4 * warps
    assert memory["ideal_sectors"] == 3 * of_a_cta + 2 * 2 * sums + dq + turns
    assert memory["sectors"] <= memory["ideal_sectors"] + dq


@kernels
def test_instructions_for_each_mma(headdim, scores):
    """Of the visits alone: the difference between two numbers of CTAs."""
    m, n = TILES[headdim, scores]

    def totals(ctas):
        kernel = counters(headdim, scores, (4 * m, ctas * n))
        return mma_count(kernel), kernel["warp_instructions"] - kernel["classes"]["move"]

    (mma, instructions), (more_mma, more_instructions) = totals(3), totals(5)
    ratio = (more_instructions - instructions) / (more_mma - mma)
    assert ratio <= BUDGET[headdim, scores], f"{ratio:.2f} warp instructions for each mma"
