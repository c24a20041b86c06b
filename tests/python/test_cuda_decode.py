"""The decode kernel on the emulated GPU: few queries over many keys, or over a cache."""

from __future__ import annotations

import contextlib
import dataclasses

import cache_cases
import pytest
import torch
from attention_cases import BF16, FP16, check, cuda_case, make_tensors, qkv, sampled_cases
from backends import CUDA, EmulatedBackend, needs_emulator
from reference import INF, attention

import flash_attn
from flash_attn import _library, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

pytestmark = needs_emulator

NAN = float("nan")


@contextlib.contextmanager
def decode_emulator(**options):
    """The emulated GPU, on which no attention but the decode kernel's may run."""
    with flash_attn.emulator(**options) as gpu:
        yield gpu
    kinds = {name.split("_")[1] for name in gpu.counters}
    assert "decode" in kinds and kinds <= {"append", "decode"}


class DecodeBackend(EmulatedBackend):
    def calls(self, seed=0):
        return decode_emulator(mode=("eager", "late", "random")[seed % 3], seed=seed)


CHOICES = {
    **CUDA["choices"],
    "seqlens": [(1, 512), (1, 700), (2, 1300), (5, 600), (16, 513), (1, 1025)],
    "heads": [(1, 1), (2, 1), (8, 2), (4, 4), (3, 1), (4, 1)],
    "dims": [
        (64, 64), (128, 128), (256, 256), (40, 72), (128, 64), (8, 120), (33, 50), (1, 1),
        (192, 128), (576, 512), (300, 40),
    ],
    "window_size": [(-1, -1), (-1, -1), (0, 0), (16, 0), (-1, 7), (50, 30), (400, -1), (300, 200)],
    "bias": [""],
}  # fmt: skip
# The forward alone.
DECODE = DecodeBackend("decode", **{**CUDA, "choices": CHOICES, "max_backward_dim": 0})


@pytest.mark.parametrize("case", sampled_cases(60, seed=1, backend=DECODE), ids=str)
def test_feature_product(case):
    check(case, backend=DECODE)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(400, seed=2, backend=DECODE), ids=str)
def test_feature_product_at_length(case):
    check(case, backend=DECODE)


def sampled_caches(count, seed):
    """The cases of the CPU, of few queries."""
    cases = []
    for i, case in enumerate(cache_cases.sampled_cases(count, seed)):
        rows = 64 * case.heads[1] // case.heads[0]
        changes = {"dtype": (FP16, BF16)[i % 2], "seqlen_q": min(case.seqlen_q, rows)}
        if case.lengths == "none" and case.capacity < 512:
            changes["lengths"] = "tensor"  # else few keys, not known to be a cache
        cases.append(dataclasses.replace(case, **changes))
    return cases


@pytest.mark.parametrize("case", sampled_caches(60, seed=1), ids=str)
def test_cache(case):
    cache_cases.check(case, DECODE)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_caches(400, seed=2), ids=str)
def test_cache_at_length(case):
    cache_cases.check(case, DECODE)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (33, 17)])
def test_pages(page_size, dims):
    options = {"dtype": BF16, "dims": dims, "page_size": page_size, "capacity": 700}
    few = cache_cases.Case(**options, heads=(8, 1), leftpad=True, seed=1)
    cache_cases.check(few, DECODE)
    more = cache_cases.Case(**options, seqlen_q=3, causal=True, num_splits=3, seed=2)
    cache_cases.check(more, DECODE)


@pytest.mark.parametrize("lengths", [(0, 0, 0), (0, 1, 64), (128, 129, 700)])
def test_lengths_of_a_cache(lengths):
    """Also of sequences without keys, beside others or alone."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 4, 64, generator=gen).to(BF16)
    k, v = torch.randn(2, 3, 700, 2, 64, generator=gen).to(BF16).unbind(0)
    used = torch.tensor(lengths, dtype=torch.int32)
    with decode_emulator(mode="late"):
        out, lse = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=used, causal=True, return_softmax_lse=True
        )
    for i, n in enumerate(lengths):
        exact, exact_lse = attention(
            q[i : i + 1].double(), k[i : i + 1, :n].double(), v[i : i + 1, :n].double(), causal=True
        )
        torch.testing.assert_close(out[i].double(), exact[0], atol=1e-2, rtol=0)
        torch.testing.assert_close(lse[i].double(), exact_lse[0], atol=1e-5, rtol=0)
    if not any(lengths):
        assert (out == 0).all() and (lse == INF).all()


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_packed_batch(dtype):
    """Sequences of different lengths, one without keys, one without queries, rows of none."""
    lengths = [(2, 700), (1, 0), (0, 90), (3, 512)]
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(6 + 4, 4, 72, generator=gen).to(dtype)
    k, v = torch.randn(2, 1302, 2, 72, generator=gen).to(dtype).unbind(0)
    v = v[..., :40]
    cu = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in zip(*lengths)]
    with decode_emulator(mode="random", seed=2):
        out, lse, _ = flash_attn_varlen_func(
            q, k, v, *cu, 3, 700, causal=True, return_attn_probs=True
        )
        for i, (rows, keys) in enumerate(lengths):
            first_q, first_k = cu[0][i], cu[1][i]
            own = slice(first_q, first_q + rows)
            keys = slice(first_k, first_k + keys)
            exact, exact_lse = attention(
                q[None, own].double(), k[None, keys].double(), v[None, keys].double(), causal=True
            )
            torch.testing.assert_close(out[own].double(), exact[0], atol=2e-2, rtol=0)
            torch.testing.assert_close(lse[:, own].double(), exact_lse[0], atol=1e-5, rtol=0)
    assert (out[6:] == 0).all()
    assert (lse[:, 6:] == -INF).all()


# ------------------------------------------------------------------------------------------------
# What results do not depend on


def run(case, count=None, **options):
    """``(out, lse, counters)`` of the first ``count`` entries of a case's batch."""
    tensors, arguments, *_ = make_tensors(case)
    tensors = {name: x[:count] for name, x in tensors.items()}
    with decode_emulator(**options) as gpu:
        out, lse, _ = flash_attn_func(**tensors, **arguments, return_attn_probs=True)
    (counters,) = gpu.counters.values()
    return out, lse, counters


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_batch_and_sharing_change_no_bit(dims):
    """In a small batch several CTAs share a tile, in a large one none does."""
    case = cuda_case(dims=dims, batch=27, seqlens=(1, 777), heads=(8, 8), window_size=(600, -1))
    out, lse, together = run(case, checks="memory")
    first, first_lse, alone = run(case, count=1)
    assert together["ctas"] == 27 * 8
    assert together["classes"]["atomic"] == 0
    assert alone["ctas"] > 8
    assert alone["classes"]["atomic"] > 0
    assert torch.equal(out[:1], first)
    assert torch.equal(lse[:1], first_lse)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("mode", "seed"), [("late", 0), ("random", 1), ("random", 2)])
def test_devices_and_schedules_change_no_bit(arch, mode, seed):
    case = cuda_case(dims=(128, 128), seqlens=(2, 2000), heads=(8, 2), causal=True)
    out, lse, _ = run(case)
    other, other_lse, _ = run(case, arch=arch, mode=mode, seed=seed)
    assert torch.equal(out, other)
    assert torch.equal(lse, other_lse)


def test_capacity_changes_no_bit():
    """Of a cache: what decides is the length in use."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 4, 64, generator=gen).to(BF16)
    k, v = torch.randn(2, 1, 5000, 2, 64, generator=gen).to(BF16).unbind(0)
    used = torch.tensor([600], dtype=torch.int32)
    with decode_emulator():
        results = [
            flash_attn_with_kvcache(q, k[:, :n], v[:, :n], cache_seqlens=used)
            for n in (600, 700, 5000)
        ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (60, 5)}])
def test_bad_values_in_v_reach_the_rows_that_see_them(dims, options, bad):
    q, k, v = qkv(cuda_case(dtype=FP16, heads=(3, 1), seqlens=(11, 600), dims=dims))
    for key, column in ((0, 3), (530, 1), (594, 17), (599, 0)):
        v[0, key, 0, column] = bad
    expected = flash_attn_func(q.float(), k.float(), v.float(), **options)
    with decode_emulator(mode="random", seed=3):
        out = flash_attn_func(q, k, v, **options)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0, equal_nan=True)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [4, 12, 22, 60])
def test_scores_far_from_0(exponent, sign):
    """They weigh by their distances, within a unit and between units."""
    *_, v = qkv(cuda_case(dtype=BF16, seqlens=(2, 700), heads=(1, 1)))
    step = 2.0 ** max(exponent - 22, -3)
    q, k = torch.zeros(1, 2, 1, 64), torch.zeros(1, 700, 1, 64)
    q[..., 0], k[..., 0] = 2.0 ** (exponent // 2), sign * 8 * 2.0 ** (exponent - exponent // 2)
    q[..., 1], k[0, :, 0, 1] = 1.0, torch.arange(700) * 7 % 16 * step * 8
    exact_out, exact_lse = attention(q.double(), k.double(), v.double())
    with decode_emulator():
        out, lse, _ = flash_attn_func(q.to(BF16), k.to(BF16), v, return_attn_probs=True)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=3e-7, atol=2e-6)
    torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=2e-2)


# ------------------------------------------------------------------------------------------------
# What a call costs


def counters(dims, seqlen_k, *, heads=(1, 1), page_size=0, num_splits=0, batch=1, **options):
    """Of a call with one query."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(batch, 1, heads[0], dims[0], generator=gen).to(BF16)
    k, v = (torch.randn(batch, seqlen_k, heads[1], d, generator=gen).to(BF16) for d in dims)
    if page_size:
        k, v = (x.reshape(-1, page_size, *x.shape[2:]) for x in (k, v))
        pages = torch.randperm(k.shape[0], generator=gen).to(torch.int32).view(batch, -1)
        options["block_table"] = pages
    used = torch.full((batch,), seqlen_k, dtype=torch.int32)
    with decode_emulator(checks="none") as gpu:
        flash_attn_with_kvcache(q, k, v, cache_seqlens=used, num_splits=num_splits, **options)
    (kernel,) = gpu.counters.values()
    return kernel


DIMS = [(64, 64), (128, 128), (256, 256)]


@pytest.mark.parametrize("page_size", [0, 16, 64, 256])
@pytest.mark.parametrize("dims", DIMS)
def test_memory_is_read_once_and_without_waste(dims, page_size):
    kernel = counters(dims, 8192, heads=(4, 1), page_size=page_size, num_splits=1)
    assert kernel["ctas"] == 1
    assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"] > 0
    assert kernel["global"]["sectors"] == kernel["global"]["ideal_sectors"] > 0
    # A warp's block looks up its page, or, where it has several, those of four rows at a time.
    block = 32 if dims == (64, 64) else 16
    lookups = 2 * 8192 // (block if page_size >= block else 4) if page_size else 0
    fewest = 8192 * sum(dims) * 2 // 32
    assert fewest <= kernel["global"]["sectors"] <= 1.02 * fewest + lookups


# Warp instructions for 512 bytes of K and V, moves not counted: of these 4 are a copy, an ldmatrix
# and two mma.
BUDGET = {(64, 64): 21.0, (128, 128): 20.0, (256, 256): 13.5}


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize(("page_size", "more"), [(0, 0.0), (64, 3.5)])
def test_instructions(dims, page_size, more):
    """Of the loop: the difference between two lengths of one unit."""

    def total(seqlen_k):
        kernel = counters(dims, seqlen_k, page_size=page_size, num_splits=1)
        return kernel["warp_instructions"] - kernel["classes"]["move"]

    read = 4096 * sum(dims) * 2
    ratio = 512 * (total(8192) - total(4096)) / read
    assert ratio <= BUDGET[dims] + more, f"{ratio:.2f} warp instructions for 512 bytes"


@pytest.mark.parametrize("num_splits", [1, 2, 5, 100])
def test_num_splits(num_splits):
    """So many CTAs share a tile at most; each has a block of keys at least."""
    assert counters((64, 64), 1000, num_splits=num_splits)["ctas"] == min(num_splits, 8)


def test_keys_that_no_query_sees_are_not_read():
    kernel = counters((64, 64), 8192, window_size=(255, 0))
    assert kernel["global"]["sectors"] * 32 <= 1.2 * (256 + 128) * 2 * 64 * 2
    short = counters((128, 128), 4096, causal=True, window_size=(-1, -1))
    assert short["global"]["sectors"] * 32 >= 4096 * 2 * 128 * 2


@pytest.mark.parametrize("dims", DIMS)
def test_occupancy(dims):
    """Copies under way: all slots of the rings of an SM's CTAs but one a warp."""
    kernel = counters(dims, 512)
    ctas, stages = {64: (2, 4), 128: (2, 4), 256: (1, 2)}[dims[0]]
    assert kernel["occupancy"]["ctas_per_sm"] == ctas
    slot = 4 * (8 if dims[0] == 256 else 4) << 10
    assert ctas * (stages - 1) * slot >= 32 << 10


# ------------------------------------------------------------------------------------------------
# The workspace


@pytest.fixture
def requests():
    """Sizes and devices of the workspaces that calls ask for."""
    made = []

    def allocate(*request):
        made.append(request)
        return _library._allocate(*request)

    _library.lib.set_allocator(allocate)
    yield made
    _library.lib.set_allocator(_library._allocate)


def test_workspace_is_allocated_for_shared_tiles_alone(requests):
    case = cuda_case(seqlens=(1, 1024), heads=(4, 2), batch=1)
    on_cpu = flash_attn_func(*qkv(case))
    assert requests == []
    with decode_emulator():
        out = flash_attn_func(*qkv(case))
    torch.testing.assert_close(out, on_cpu, atol=1e-2, rtol=0)
    # 8 units of 2 rows for each of 2 heads: outputs, maxima and sums; a counter a head.
    assert requests == [(2 * 8 * 2 * (64 + 2) * 4 + 2 * 4, 1, 0)]
    del requests[:]
    with decode_emulator():
        flash_attn_with_kvcache(*qkv(case), num_splits=1)
    assert requests == []


def test_errors_of_the_allocation_reach_the_caller():
    def allocate(size, device_type, device_id):
        raise MemoryError(f"no {size} bytes")

    _library.lib.set_allocator(allocate)
    try:
        with flash_attn.emulator(), pytest.raises(MemoryError, match="no 2116 bytes"):
            flash_attn_func(*qkv(cuda_case(seqlens=(1, 1024), heads=(1, 1), batch=1)))
    finally:
        _library.lib.set_allocator(_library._allocate)
