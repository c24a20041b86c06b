"""What the decode kernels of compute capability 9.0 may cost, counted on the emulated GPU."""

from __future__ import annotations

import pytest
import torch
from attention_cases import BF16
from backends import needs_emulator
from test_cuda_hopper_decode import DIMS, MLA, decode_emulator

from flash_attn import flash_attn_with_kvcache

pytestmark = needs_emulator


def launch(dims, seqlen_k, *, heads=(64, 1), page_size=0, num_splits=0, batch=1, **options):
    """Counters of a call with one query, and how often each line of its PTX was executed."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(batch, 1, heads[0], dims[0], generator=gen).to(BF16)
    k = torch.randn(batch, seqlen_k, heads[1], dims[0], generator=gen).to(BF16)
    v = None if dims == MLA else torch.randn(k.shape, generator=gen).to(BF16)
    if page_size:
        k = k.reshape(-1, page_size, *k.shape[2:])
        v = v if v is None else v.reshape(k.shape)
        pages = torch.randperm(k.shape[0], generator=gen).to(torch.int32).view(batch, -1)
        options["block_table"] = pages
    v = k[..., : MLA[1]] if v is None else v
    used = torch.full((batch,), seqlen_k, dtype=torch.int32)
    with decode_emulator(checks="none") as gpu:
        flash_attn_with_kvcache(q, k, v, cache_seqlens=used, num_splits=num_splits, **options)
    ((name, kernel),) = gpu.counters.items()
    return kernel, gpu.line_counters[name]


def counters(*args, **options):
    return launch(*args, **options)[0]


def key_bytes(dims):
    """That are read for a key."""
    return 2 * (dims[0] if dims == MLA else sum(dims))


def boxes(lines):
    """Instructions of TMA: a warp's, for all boxes of a slot and 64 columns."""
    return sum(line["executed"] for line in lines if "cp.async.bulk.tensor.4d" in line["text"])


@pytest.mark.parametrize("page_size", [0, 16, 64, 256])
@pytest.mark.parametrize("dims", [*DIMS, MLA])
def test_keys_are_read_once_by_tma(dims, page_size):
    kernel, lines = launch(dims, 8192, page_size=page_size, num_splits=1)
    assert kernel["ctas"] == 1
    assert boxes(lines) == 8192 // (32 if dims == MLA else 64) * key_bytes(dims) // 128
    assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"] > 0
    # Q, the output and the LSE; pages, looked up for K and V and once to check them.
    others = 64 * (2 * dims[0] + 2 * dims[1] + 4) // 32
    box = min(page_size, 32 if dims == MLA else 64)
    lookups = 2 * 8192 // box + 8192 // page_size if page_size else 0
    assert kernel["global"]["sectors"] <= others + lookups + 8
    assert kernel["global"]["sectors"] == kernel["global"]["ideal_sectors"]


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("dims", [*DIMS, MLA])
def test_keys_are_read_once_row_by_row(dims, page_size):
    kernel, lines = launch(dims, 8192, page_size=page_size, num_splits=1)
    assert boxes(lines) == 0
    assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"] > 0
    assert kernel["global"]["sectors"] == kernel["global"]["ideal_sectors"] > 0
    # A warp looks up the pages of four rows at a time; once more to check them.
    lookups = (1 if dims == MLA else 2) * 8192 // (4 if page_size > 1 else 2) + 8192 // 8
    fewest = 8192 * key_bytes(dims) // 32
    assert fewest <= kernel["global"]["sectors"] <= 1.02 * fewest + lookups


def test_units_are_kept_and_merged_without_waste():
    """In the workspace, by CTAs that share a tile."""
    kernel = counters((128, 128), 1024)
    assert kernel["ctas"] == 4
    assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"] > 0
    assert 0 < kernel["global"]["sectors"] <= kernel["global"]["ideal_sectors"] + 4 * 16
    units, queries = 2 * 4 * 64 * (128 + 2) * 4, 4 * 64 * 128 * 2
    output = 64 * (128 * 2 + 4)
    fewest = units + queries + output
    assert fewest <= kernel["global"]["sectors"] * 32 <= 1.03 * fewest


@pytest.mark.parametrize("num_splits", [1, 2, 5, 100])
@pytest.mark.parametrize(("dims", "most"), [((64, 64), 16), (MLA, 16)])
def test_num_splits(dims, most, num_splits):
    """So many CTAs share a tile at most; each has a block of keys at least."""
    assert counters(dims, 1000, num_splits=num_splits)["ctas"] == min(num_splits, most)


@pytest.mark.parametrize("dims", [*DIMS, MLA])
def test_products(dims):
    """Of the blocks of 64 keys that there are, for each tile of 64 rows."""
    kernel = counters(dims, 1000, heads=(128, 1) if dims == MLA else (64, 1), num_splits=1)
    tiles = 2 if dims == MLA else 1
    assert kernel["ctas"] == tiles
    done = 0
    for name, count in kernel["tensor"].items():
        n = int(name.split("n")[1].split("k")[0])
        done += count // 4 * 64 * n * 16  # of four warps
    assert done == tiles * 64 * 1024 * sum(dims)


def test_keys_that_no_query_sees_are_not_read():
    _, lines = launch((64, 64), 8192, window_size=(255, 0))
    assert boxes(lines) == 2 * 256 // 64


@pytest.mark.parametrize("dims", [*DIMS, MLA])
def test_occupancy(dims):
    """Copies under way: the rings of an SM's CTAs, without what is being read."""
    kernel = counters(dims, 512)
    ctas = {64: 2, 128: 2, 256: 1, 576: 1}[dims[0]]
    assert kernel["occupancy"]["ctas_per_sm"] == ctas
    ring = {64: 64, 128: 64, 256: 128, 576: 144}[dims[0]]
    read = 64 * key_bytes(dims) >> 10
    assert ctas * (ring - read) >= 40


# Warp instructions of PTX for a block of 64 keys, moves not counted: of all warps, where no mask
# cuts it. 2 % above what they are.
BUDGET = {(64, 64): 1320, (128, 128): 1455, (256, 256): 1725, MLA: 5060}


@pytest.mark.parametrize("dims", [*DIMS, MLA])
def test_instructions(dims):
    """Of the loop: the difference between two lengths of one unit."""

    def total(seqlen_k):
        kernel = counters(dims, seqlen_k, num_splits=1)
        return kernel["warp_instructions"] - kernel["classes"]["move"]

    count = (total(8192) - total(4096)) / 64
    assert count <= BUDGET[dims], f"{count:.1f} warp instructions for a block"
