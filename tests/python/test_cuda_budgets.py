"""What the CUDA kernels may cost, counted on the emulated GPU."""

from __future__ import annotations

import itertools

import pytest
from attention_cases import BF16, FP16, cuda_case, qkv
from backends import needs_emulator
from reference import visible

import flash_attn
from flash_attn import flash_attn_func

pytestmark = needs_emulator

ROWS_OF_A_WARP = 32
MASKS = {"none": {}, "causal": {"causal": True}, "window": {"window_size": (150, 40)}}
# Warp instructions for each mma in the loop over blocks that need no mask, moves not counted.
BUDGET = {64: 6.0, 128: 4.0}


def keys_of_a_block(headdim, mask):
    """The kernel's tile: docs/cuda.md."""
    return 128 if headdim <= 64 and mask == "none" else 64


def counters(case, **options):
    """What one launch did."""
    with flash_attn.emulator(checks="none") as gpu:
        flash_attn_func(*qkv(case), **options, return_attn_probs=True)
    (kernel,) = gpu.counters.values()
    return kernel


def mma_count(kernel):
    return sum(kernel["tensor"].values())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_memory_is_accessed_without_waste(dtype, headdim, mask):
    """No shared-memory bank conflicts; no sector of global memory is moved in vain."""
    case = cuda_case(dtype=dtype, seqlens=(200, 328), heads=(2, 1), dims=(headdim, headdim))
    kernel = counters(case, **MASKS[mask])
    assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"] > 0
    assert kernel["global"]["sectors"] == kernel["global"]["ideal_sectors"] > 0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("seqlens", [(200, 328), (328, 200), (33, 500)])
def test_no_mma_without_a_visible_score(headdim, mask, seqlens):
    """As many as the blocks of 32 queries and one block of keys that hold a visible score need."""
    case = cuda_case(seqlens=seqlens, heads=(2, 1), dims=(headdim, headdim))
    kernel = counters(case, **MASKS[mask])
    seen = visible(*seqlens, **MASKS[mask])
    size = keys_of_a_block(headdim, mask)
    rows, cols = range(0, seqlens[0], ROWS_OF_A_WARP), range(0, seqlens[1], size)
    blocks = sum(
        bool(seen[i : i + ROWS_OF_A_WARP, j : j + size].any())
        for i, j in itertools.product(rows, cols)
    )
    mma_of_a_block = 2 * ROWS_OF_A_WARP * size * headdim // (16 * 8 * 16)
    assert mma_count(kernel) == case.heads[0] * blocks * mma_of_a_block


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_instructions_for_each_mma(dtype, headdim, mask):
    """Of the loop alone: the difference between two lengths of keys, whose blocks need no mask."""

    def totals(seqlen_k):
        case = cuda_case(
            dtype=dtype, seqlens=(128, seqlen_k), heads=(1, 1), dims=(headdim, headdim)
        )
        kernel = counters(case, **MASKS[mask])
        return mma_count(kernel), kernel["warp_instructions"] - kernel["classes"]["move"]

    (mma, instructions), (more_mma, more_instructions) = totals(512), totals(1024)
    assert more_mma > mma
    ratio = (more_instructions - instructions) / (more_mma - mma)
    assert ratio <= BUDGET[headdim], f"{ratio:.2f} warp instructions for each mma"
