"""What the CUDA kernels may cost, counted on the emulated GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_cases import BF16, cuda_case, qkv
from backends import needs_emulator
from reference import visible

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func

pytestmark = needs_emulator

MASKS = {"none": {}, "causal": {"causal": True}, "window": {"window_size": (150, 40)}}
HEADDIMS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
MODIFIERS = {
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi_slopes": torch.ones(1)},
    "dropout": {"dropout_p": 0.1},
    "bias": {"attn_bias": torch.zeros(128, 1)},
}
# Warp instructions for each mma in the loop over blocks that need no mask, moves not counted: with
# plain scores, and with modified ones.
BUDGET = {
    (32, 32): (9.8, 17.1),
    (64, 64): (6.0, 9.5),
    (96, 96): (4.6, 8.6),
    (128, 128): (4.0, 7.0),
    (192, 128): (4.7, 6.7),
    (192, 192): (4.4, 6.7),
    (256, 256): (4.5, 5.7),
}


def rows_of_a_warp(headdim):
    """The kernel's tile: docs/cuda.md."""
    return 32 if headdim <= 128 else 16


def keys_of_a_block(headdims, mask):
    """The kernel's tile: docs/cuda.md."""
    if headdims == (64, 64):
        return 128 if mask == "none" else 64
    return {192: 48, 256: 32}.get(headdims[0], 64)


def counters(case, **options):
    """What one launch did."""
    with flash_attn.emulator(checks="none") as gpu:
        flash_attn_func(*qkv(case), **options)
    (kernel,) = gpu.counters.values()
    return kernel


def mma_count(kernel):
    return sum(kernel["tensor"].values())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("headdims", HEADDIMS)
def test_memory_is_accessed_without_waste(headdims, mask):
    """No shared-memory bank conflicts; no sector of global memory is moved in vain."""
    case = cuda_case(seqlens=(200, 328), heads=(2, 1), dims=headdims)
    kernel = counters(case, **MASKS[mask])
    assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"] > 0
    assert kernel["global"]["sectors"] == kernel["global"]["ideal_sectors"] > 0


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("headdim", [64, 128])
def test_packed_and_paged_memory_is_accessed_without_waste(headdim, page_size):
    gen = torch.Generator().manual_seed(0)
    pages = torch.randn(40, page_size, 1, headdim, generator=gen).to(BF16)
    q = torch.randn(100, 2, headdim, generator=gen).to(BF16)
    table = torch.randperm(40, generator=gen).to(torch.int32).view(2, 20)
    lengths = [torch.tensor([0, *n], dtype=torch.int32) for n in ((70, 100), (300, 500))]
    with flash_attn.emulator(checks="none") as gpu:
        for k, more in ((pages, {"block_table": table}), (pages.flatten(0, 1)[:500], {})):
            flash_attn_varlen_func(q, k, k, *lengths, 70, 300, causal=True, **more)
    (kernel,) = gpu.counters.values()
    assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"] > 0
    # Rows of the table need not start at a sector.
    assert 0 < kernel["global"]["sectors"] <= kernel["global"]["ideal_sectors"] + 4


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("headdims", HEADDIMS)
@pytest.mark.parametrize("seqlens", [(200, 328), (328, 200), (33, 500)])
def test_no_mma_without_a_visible_score(headdims, mask, seqlens):
    """As many as the blocks of a warp's queries and one block of keys that hold a visible score
    need."""
    case = cuda_case(seqlens=seqlens, heads=(2, 1), dims=headdims)
    kernel = counters(case, **MASKS[mask])
    seen = visible(*seqlens, **MASKS[mask])
    rows, size = rows_of_a_warp(headdims[0]), keys_of_a_block(headdims, mask)
    blocks = sum(
        bool(seen[i : i + rows, j : j + size].any())
        for i, j in itertools.product(range(0, seqlens[0], rows), range(0, seqlens[1], size))
    )
    mma_of_a_block = rows * size * sum(headdims) // (16 * 8 * 16)
    assert mma_count(kernel) == case.heads[0] * blocks * mma_of_a_block


def instructions_for_each_mma(headdims, options):
    """Of the loop alone: the difference between two lengths of keys, whose blocks need no mask."""

    def totals(seqlen_k):
        case = cuda_case(seqlens=(128, seqlen_k), heads=(1, 1), dims=headdims)
        kernel = counters(case, **options)
        return mma_count(kernel), kernel["warp_instructions"] - kernel["classes"]["move"]

    (mma, instructions), (more_mma, more_instructions) = totals(768), totals(1536)
    assert more_mma > mma
    return (more_instructions - instructions) / (more_mma - mma)


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("headdims", HEADDIMS)
def test_instructions_for_each_mma(headdims, mask):
    ratio = instructions_for_each_mma(headdims, MASKS[mask])
    assert ratio <= BUDGET[headdims][0], f"{ratio:.2f} warp instructions for each mma"


@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("headdims", HEADDIMS)
def test_instructions_for_each_mma_of_modified_scores(headdims, modifier):
    ratio = instructions_for_each_mma(headdims, MODIFIERS[modifier])
    assert ratio <= BUDGET[headdims][1], f"{ratio:.2f} warp instructions for each mma"
