"""Head dims above 256 on the emulated GPU: the decode kernel whose warps share keys."""

from __future__ import annotations

import contextlib

import cache_cases
import pytest
import torch
from attention_cases import BF16, FP16, FP32, check, cuda_case, make_tensors, qkv, sampled_cases
from backends import CUDA, EmulatedBackend, needs_emulator
from reference import INF, attention

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

pytestmark = needs_emulator

NAN = float("nan")
MLA = (576, 512)


@contextlib.contextmanager
def wide_emulator(**options):
    """The emulated GPU, on which no attention but this kernel's may run."""
    with flash_attn.emulator(**options) as gpu:
        yield gpu
    kinds = {name.split("_sm80_")[0] for name in gpu.counters}
    assert "flash_decode_wide" in kinds
    assert kinds <= {"flash_append", "flash_decode_wide"}


class WideBackend(EmulatedBackend):
    def calls(self, seed=0):
        return wide_emulator(mode=("eager", "late", "random")[seed % 3], seed=seed)


CHOICES = {
    **CUDA["choices"],
    "seqlens": [
        (1, 300), (2, 700), (3, 15), (40, 90), (17, 64), (64, 17), (1, 1), (70, 150), (31, 200),
        (130, 0), (1, 1300),
    ],
    "heads": [(1, 1), (16, 1), (4, 2), (3, 1), (20, 2)],
    "dims": [
        (576, 512), (576, 512), (512, 512), (257, 257), (300, 129), (571, 509), (264, 504),
        (320, 64), (64, 320), (9, 257), (272, 1),
    ],
}  # fmt: skip
WIDE = WideBackend("wide", **{**CUDA, "choices": CHOICES})


@pytest.mark.parametrize("case", sampled_cases(66, seed=1, backend=WIDE), ids=str)
def test_feature_product(case):
    check(case, backend=WIDE)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(400, seed=2, backend=WIDE), ids=str)
def test_feature_product_at_length(case):
    check(case, backend=WIDE)


CACHES = WideBackend(
    "wide",
    **{
        **CUDA,
        "cache_choices": {
            **CUDA["cache_choices"],
            "dims": [(576, 512), (576, 512), (512, 512), (257, 300), (320, 40), (40, 301)],
            "heads": [(1, 1), (16, 1), (6, 1), (4, 2)],
            "seqlen_q": [1, 1, 2, 4, 7],
        },
    },
)


@pytest.mark.parametrize("case", cache_cases.sampled_cases(60, seed=3, backend=CACHES), ids=str)
def test_cache(case):
    cache_cases.check(case, CACHES)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("dims", [MLA, (571, 509)])
def test_pages(page_size, dims):
    options = {"dtype": BF16, "dims": dims, "page_size": page_size, "capacity": 300, "batch": 2}
    few = cache_cases.Case(**options, heads=(16, 1), leftpad=True, seed=1)
    cache_cases.check(few, CACHES)
    more = cache_cases.Case(
        **options, heads=(20, 1), seqlen_q=3, seqlen_new=3, causal=True, num_splits=3, seed=2
    )
    cache_cases.check(more, CACHES)


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_packed_batch(dtype):
    """Sequences of different lengths, one without keys, one without queries, rows of none."""
    lengths = [(2, 300), (1, 0), (0, 90), (33, 112)]
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(36 + 4, 4, 288, generator=gen).to(dtype)
    k, v = torch.randn(2, 502, 2, 288, generator=gen).to(dtype).unbind(0)
    cu = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in zip(*lengths)]
    with wide_emulator(mode="random", seed=2):
        out, lse, _ = flash_attn_varlen_func(
            q, k, v, *cu, 33, 300, causal=True, return_attn_probs=True
        )
    for i, (rows, keys) in enumerate(lengths):
        own = slice(cu[0][i], cu[0][i] + rows)
        keys = slice(cu[1][i], cu[1][i] + keys)
        exact, exact_lse = attention(
            q[None, own].double(), k[None, keys].double(), v[None, keys].double(), causal=True
        )
        torch.testing.assert_close(out[own].double(), exact[0], atol=2e-2, rtol=0)
        torch.testing.assert_close(lse[:, own].double(), exact_lse[0], atol=1e-5, rtol=0)
    assert (out[36:] == 0).all()
    assert (lse[:, 36:] == -INF).all()


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 9.0}])
def test_dropout_is_the_cpus(options):
    """Of rows of several heads and queries of both halves of 16."""
    case = cuda_case(dtype=FP16, dims=(260, 33), seqlens=(21, 150), heads=(6, 2))
    results = []
    for backend in (WIDE, contextlib.nullcontext()):
        torch.manual_seed(3)
        with backend.calls(1) if backend is WIDE else backend:
            results.append(flash_attn_func(*qkv(case), dropout_p=0.4, **options))
    torch.testing.assert_close(*results, atol=4e-3, rtol=0)


# ------------------------------------------------------------------------------------------------
# V within K


def latent(seqlen_k, *, rows=1, heads=16, page_size=0, batch=1, dims=MLA):
    """``(q, k, options)`` of a call whose V is the first columns of K."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(batch, rows, heads, dims[0], generator=gen).to(BF16)
    k = torch.randn(batch, seqlen_k, 1, dims[0], generator=gen).to(BF16)
    options = {"cache_seqlens": torch.full((batch,), seqlen_k, dtype=torch.int32)}
    if page_size:
        k = k.reshape(-1, page_size, 1, dims[0])
        pages = torch.randperm(k.shape[0], generator=gen).to(torch.int32).view(batch, -1)
        options["block_table"] = pages
    return q, k, options


def decode(problem, *, within=True, dims=MLA, checks="none", **more):
    """``(out, lse, counters)``; V is a view of K, or a copy of it."""
    q, k, options = problem
    v = k[..., : dims[1]] if within else k[..., : dims[1]].clone()
    with wide_emulator(checks=checks, **more.pop("gpu", {})) as gpu:
        out, lse = flash_attn_with_kvcache(q, k, v, **options, **more, return_softmax_lse=True)
    (counters,) = gpu.counters.values()
    return out, lse, counters


@pytest.mark.parametrize("page_size", [0, 16, 64])
@pytest.mark.parametrize("dims", [MLA, (300, 290)])
def test_values_within_keys_change_no_bit(page_size, dims):
    problem = latent(192, rows=2, page_size=page_size, batch=2, dims=dims)
    options = {"dims": dims, "causal": True, "checks": "all", "gpu": {"mode": "late"}}
    out, lse, _ = decode(problem, **options)
    other, other_lse, _ = decode(problem, within=False, **options)
    assert torch.equal(out, other)
    assert torch.equal(lse, other_lse)


def test_columns_of_k_beyond_v_are_no_values():
    """inf there reaches the scores of the rows that see the key, and no other rows."""
    q, k, options = latent(100, rows=3)
    k[0, 99, 0, 570] = INF
    out, *_ = decode((q, k, options), causal=True)
    clean, *_ = decode(latent(100, rows=3), causal=True)
    assert torch.equal(out[:, :2], clean[:, :2])


# ------------------------------------------------------------------------------------------------
# What results do not depend on


def run(case, count=None, **options):
    """``(out, lse, counters)`` of the first ``count`` entries of a case's batch."""
    tensors, arguments, *_ = make_tensors(case)
    tensors = {name: x[:count] for name, x in tensors.items()}
    with wide_emulator(**options) as gpu:
        out, lse, _ = flash_attn_func(**tensors, **arguments, return_attn_probs=True)
    (counters,) = gpu.counters.values()
    return out, lse, counters


@pytest.mark.parametrize("dims", [MLA, (300, 400)])
def test_batch_and_sharing_change_no_bit(dims):
    """In a small batch several CTAs share a tile, in a large one none does."""
    case = cuda_case(dims=dims, batch=27, seqlens=(1, 333), heads=(8, 8), window_size=(300, -1))
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
    case = cuda_case(dims=MLA, seqlens=(2, 600), heads=(16, 1), causal=True)
    out, lse, _ = run(case)
    other, other_lse, _ = run(case, arch=arch, mode=mode, seed=seed)
    assert torch.equal(out, other)
    assert torch.equal(lse, other_lse)


# ------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (60, 5)}])
def test_bad_values_in_v_reach_the_rows_that_see_them(options, bad):
    q, k, v = qkv(cuda_case(dtype=FP16, heads=(3, 1), seqlens=(11, 300), dims=MLA))
    for key, column in ((0, 3), (230, 129), (294, 300), (299, 511)):
        v[0, key, 0, column] = bad
    expected = flash_attn_func(q.float(), k.float(), v.float(), **options)
    with wide_emulator(mode="random", seed=3):
        out = flash_attn_func(q, k, v, **options)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0, equal_nan=True)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [4, 22, 60])
def test_scores_far_from_0(exponent, sign):
    """They weigh by their distances, within a unit and between units."""
    *_, v = qkv(cuda_case(dtype=BF16, seqlens=(2, 300), heads=(1, 1)))
    step = 2.0 ** max(exponent - 22, -3)
    q, k = torch.zeros(1, 2, 1, 576), torch.zeros(1, 300, 1, 576)
    q[..., 40], k[..., 40] = 2.0 ** (exponent // 2), sign * 8 * 2.0 ** (exponent - exponent // 2)
    q[..., 41], k[0, :, 0, 41] = 1.0, torch.arange(300) * 7 % 16 * step * 8
    exact_out, exact_lse = attention(q.double(), k.double(), v.double())
    with wide_emulator():
        out, lse, _ = flash_attn_func(q.to(BF16), k.to(BF16), v, return_attn_probs=True)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=3e-7, atol=2e-6)
    torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=2e-2)


def test_rows_without_keys():
    q, k, v = qkv(cuda_case(dims=MLA, seqlens=(20, 3), heads=(2, 1)))
    with wide_emulator(mode="late"):
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :17] == 0).all()
    assert (lse[..., :17] == INF).all()
    assert lse[..., 17:].isfinite().all()


# ------------------------------------------------------------------------------------------------
# What a call costs


@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
@pytest.mark.parametrize("within", [True, False])
def test_memory_is_read_once_and_without_waste(within, page_size):
    *_, kernel = decode(latent(4096, page_size=page_size), within=within, num_splits=1)
    assert kernel["ctas"] == 1
    assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"] > 0
    assert kernel["global"]["sectors"] == kernel["global"]["ideal_sectors"] > 0
    # Each warp looks up the pages of its four rows.
    copies = 1 if within else 2
    lookups = copies * 4096 // (4 if page_size > 1 else 2) if page_size else 0
    fewest = 4096 * (576 if within else 576 + 512) * 2 // 32
    assert fewest <= kernel["global"]["sectors"] <= 1.02 * fewest + lookups


def test_units_are_kept_and_merged_without_waste():
    """In the workspace, by CTAs that share a tile. Maxima and sums lie side by side, and are stored
    one after the other: four sectors twice."""
    *_, kernel = decode(latent(1024))
    assert kernel["ctas"] == 8
    assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"] > 0
    assert 0 < kernel["global"]["sectors"] <= kernel["global"]["ideal_sectors"] + 8 * 4
    units, queries, keys = 2 * 8 * 16 * (512 + 2) * 4, 8 * 16 * 576 * 2, 1024 * 576 * 2
    fewest = units + queries + keys
    assert fewest <= kernel["global"]["sectors"] * 32 <= 1.03 * fewest


@pytest.mark.parametrize("seqlen_k", [1, 17, 250])
def test_mma(seqlen_k):
    """Of the blocks of 16 keys that there are."""
    *_, kernel = decode(latent(seqlen_k, rows=3), num_splits=1)
    assert kernel["ctas"] == 3
    blocks = (seqlen_k + 15) // 16
    assert sum(kernel["tensor"].values()) == 3 * blocks * (16 * 16 * sum(MLA)) // (16 * 8 * 16)


# Warp instructions for 512 bytes of what is read, moves not counted: where V is within K, and where
# it is not.
BUDGET = {True: 32.0, False: 21.5}


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize(("page_size", "more"), [(0, 0.0), (64, 4.2)])
def test_instructions(within, page_size, more):
    """Of the loop: the difference between two lengths of one unit."""

    def total(seqlen_k):
        problem = latent(seqlen_k, page_size=page_size)
        *_, kernel = decode(problem, within=within, num_splits=1)
        return kernel["warp_instructions"] - kernel["classes"]["move"]

    read = 2048 * (576 if within else sum(MLA)) * 2
    ratio = 512 * (total(4096) - total(2048)) / read
    assert ratio <= BUDGET[within] + more, f"{ratio:.2f} warp instructions for 512 bytes"


@pytest.mark.parametrize(("arch", "ctas"), [("sm_80", 2), ("sm_90a", 2)])
def test_occupancy(arch, ctas):
    *_, kernel = decode(latent(100), gpu={"arch": arch})
    assert kernel["occupancy"]["ctas_per_sm"] == ctas


def test_keys_that_no_query_sees_are_not_read():
    *_, kernel = decode(latent(4096), window_size=(255, 0))
    assert kernel["global"]["sectors"] * 32 <= 1.2 * (256 + 128) * 576 * 2


def test_workspace_holds_the_rows_that_there_are():
    """16 rows of (query, head), of which 3 are used, and a bias, which this kernel takes."""
    q, k, v = qkv(cuda_case(dims=MLA, seqlens=(1, 700), heads=(3, 1)))
    bias = torch.randn(3, 1, 700, generator=torch.Generator().manual_seed(1)).to(FP32)
    expected = flash_attn_func(q.float(), k.float(), v.float(), attn_bias=bias)
    with wide_emulator(mode="random", seed=1) as gpu:
        out = flash_attn_func(q, k, v, attn_bias=bias)
    (kernel,) = gpu.counters.values()
    assert kernel["ctas"] > 1
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=0)
