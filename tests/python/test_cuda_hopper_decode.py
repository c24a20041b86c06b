"""Decoding on the kernels of compute capability 9.0, emulated: few queries over many keys, or over
a cache, of more rows than a tile of sm80's decode kernel has."""

from __future__ import annotations

import contextlib
import dataclasses

import cache_cases
import captured_calls
import pytest
import torch
import unchecked_indices
from attention_cases import BF16, FP16, check, cuda_case, qkv, sampled_cases
from backends import HOPPER, EmulatedBackend, needs_emulator
from reference import INF, attention
from scripts import report_of_emulated_driver

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

pytestmark = needs_emulator

NAN = float("nan")
MLA = (576, 512)
DIMS = [(64, 64), (128, 128), (256, 256)]


@contextlib.contextmanager
def decode_emulator(**options):
    """The emulated H100, on which no attention but its decode kernel's may run."""
    with flash_attn.emulator(arch="sm_90a", **options) as gpu:
        yield gpu
    kinds = {"_".join(name.split("_")[1:3]) for name in gpu.counters}
    assert "decode_sm90" in kinds
    assert kinds <= {"append_sm80", "decode_sm90"}


class DecodeBackend(EmulatedBackend):
    def calls(self, seed=0):
        return decode_emulator(mode=("eager", "late", "random")[seed % 3], seed=seed)


CHOICES = {
    **HOPPER.choices,
    "seqlens": [(17, 512), (20, 700), (19, 1300), (30, 600), (18, 513), (32, 1025)],
    "heads": [(1, 1), (2, 1), (4, 2), (4, 4), (3, 3), (2, 2)],
    "dims": [(64, 64), (128, 128), (256, 256), (40, 72), (128, 64), (8, 120), (192, 128), (96, 96)],
    "window_size": [(-1, -1), (-1, -1), (0, 0), (16, 0), (-1, 7), (50, 30), (400, -1), (300, 200)],
    "bias": [""],
}  # fmt: skip
CACHE_CHOICES = {
    **HOPPER.cache_choices,
    "seqlen_q": [1, 1, 2, 3],
    "heads": [(20, 1), (17, 1), (48, 2), (64, 2), (21, 1)],
    "dims": [(64, 64), (128, 128), (256, 256), (192, 128), (40, 40), (96, 72), (8, 8)],
}
DECODE = DecodeBackend(
    **{
        **{f.name: getattr(HOPPER, f.name) for f in dataclasses.fields(HOPPER)},
        "name": "hopper_decode",
        "choices": CHOICES,
        "cache_choices": CACHE_CHOICES,
        "max_backward_dim": 0,  # no gradients
    },
)


@pytest.mark.parametrize("case", sampled_cases(48, seed=1, backend=DECODE), ids=str)
def test_feature_product(case):
    check(case, backend=DECODE)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(400, seed=2, backend=DECODE), ids=str)
def test_feature_product_at_length(case):
    check(case, backend=DECODE)


def sampled_caches(count, seed):
    """Every fifth has values within keys."""
    cases = []
    for i, case in enumerate(cache_cases.sampled_cases(count, seed, backend=DECODE)):
        changes = {}
        if case.seqlen_q * case.heads[0] // case.heads[1] > 64:
            changes["seqlen_q"] = 1
        if case.lengths == "none" and case.capacity < 512:
            changes["lengths"] = "tensor"  # else few keys, not known to be a cache
        if i % 5 == 0:
            changes.update(dims=MLA, latent=True, rotary="")
        cases.append(dataclasses.replace(case, **changes))
    return cases


@pytest.mark.parametrize("case", sampled_caches(60, seed=1), ids=str)
def test_cache(case):
    cache_cases.check(case, DECODE)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_caches(400, seed=2), ids=str)
def test_cache_at_length(case):
    cache_cases.check(case, DECODE)


@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 48, 64, 256])
@pytest.mark.parametrize("dims", [*DIMS, (40, 40), MLA])
def test_pages(page_size, dims):
    """By TMA where they are whole boxes and keys begin with them, else row by row."""
    latent = dims == MLA
    options = {"dtype": BF16, "dims": dims, "page_size": page_size, "capacity": 700}
    options.update(latent=latent, batch=2)
    few = cache_cases.Case(**options, heads=(20, 1), leftpad=True, seed=1)
    cache_cases.check(few, DECODE)
    more = cache_cases.Case(
        **options, heads=(20, 1), seqlen_q=3, seqlen_new=3, causal=True, num_splits=3, seed=2
    )
    cache_cases.check(more, DECODE)


@pytest.mark.parametrize("dims", [(64, 64), MLA])
@pytest.mark.parametrize("lengths", [(0, 0, 0), (0, 1, 64), (128, 129, 700)])
def test_lengths_of_a_cache(lengths, dims):
    """Also of sequences without keys, beside others or alone."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 20, dims[0], generator=gen).to(BF16)
    k = torch.randn(3, 700, 1, dims[0], generator=gen).to(BF16)
    v = k[..., : dims[1]]
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
    q = torch.randn(6 + 4, 40, 72, generator=gen).to(dtype)
    k, v = torch.randn(2, 1302, 2, 72, generator=gen).to(dtype).unbind(0)
    v = v[..., :40]
    cu = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in zip(*lengths)]
    with decode_emulator(mode="random", seed=2):
        out, lse, _ = flash_attn_varlen_func(
            q, k, v, *cu, 3, 700, causal=True, return_attn_probs=True
        )
    for i, (rows, keys) in enumerate(lengths):
        own = slice(cu[0][i], cu[0][i] + rows)
        keys = slice(cu[1][i], cu[1][i] + keys)
        exact, exact_lse = attention(
            q[None, own].double(), k[None, keys].double(), v[None, keys].double(), causal=True
        )
        torch.testing.assert_close(out[own].double(), exact[0], atol=2e-2, rtol=0)
        torch.testing.assert_close(lse[:, own].double(), exact_lse[0], atol=1e-5, rtol=0)
    assert (out[6:] == 0).all()
    assert (lse[:, 6:] == -INF).all()


# ------------------------------------------------------------------------------------------------
# Who takes a call


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "decode_sm90"),
        ({"heads": (16, 1)}, "decode_sm80"),  # whose tile has as many rows
        ({"heads": (16, 1), "seqlen_q": 2}, "decode_sm90"),
        ({"seqlen_q": 5}, "fwd_sm90"),
        ({"page_size": 1}, "decode_sm90"),
        ({"page_size": 16, "leftpad": True}, "decode_sm90"),
        ({"dims": (60, 60), "page_size": 16}, "decode_sm80"),  # rows of no whole chunks
        ({"dims": MLA}, "decode_wide"),
        ({"dims": MLA, "latent": True}, "decode_sm90"),
        ({"dims": MLA, "latent": True, "heads": (128, 1), "seqlen_q": 2}, "decode_sm90"),
        ({"dims": (300, 260), "latent": True, "heads": (40, 1)}, "decode_wide"),
        ({"dims": (320, 256), "latent": True, "heads": (40, 1)}, "decode_sm90"),
        ({"dims": MLA, "latent": True, "heads": (16, 1)}, "decode_wide"),
    ],
)
def test_which_kernel_takes_a_cache(changes, kernel):
    case = cache_cases.Case(**{"dtype": FP16, "heads": (20, 1), "batch": 1, **changes})
    cache_cases.check(case, HOPPER)
    with HOPPER.emulator(checks="memory") as gpu:
        cache_cases.Problem(case).call()
    (name,) = gpu.counters
    assert "_".join(name.split("_")[1:3]) == kernel


# ------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dims", DIMS)
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


@pytest.mark.parametrize("key", [560, 594, 599])
def test_bad_values_in_k_and_v_reach_the_rows_that_see_them(key):
    """Where they are the same memory, in either half of a block."""
    q, k, _ = qkv(cuda_case(dtype=FP16, heads=(3, 1), seqlens=(20, 600), dims=MLA))
    clean = flash_attn_func(q.float(), k.float(), k[..., :512].float(), window_size=(30, 0))
    k[0, key, 0, 300] = NAN
    with decode_emulator(mode="random", seed=3):
        out = flash_attn_func(q, k, k[..., :512], window_size=(30, 0))
    sees = torch.tensor([query + 580 - 30 <= key <= query + 580 for query in range(20)])
    assert sees.any() and not sees.all()
    assert out[0, sees].isnan().all()
    torch.testing.assert_close(out[0, ~sees].float(), clean[0, ~sees], atol=2e-2, rtol=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [4, 12, 22, 60])
@pytest.mark.parametrize("dims", [(64, 64), MLA])
def test_scores_far_from_0(dims, exponent, sign):
    """They weigh by their distances, within a unit and between units."""
    step = 2.0 ** max(exponent - 22, -3)
    q, k = torch.zeros(1, 20, 1, dims[0]), torch.zeros(1, 1100, 1, dims[0])
    *_, v = qkv(cuda_case(dtype=BF16, seqlens=(20, 1100), heads=(1, 1)))
    k[..., 2:60] = v[..., :58].float()
    q[..., 0], k[..., 0] = 2.0 ** (exponent // 2), sign * 8 * 2.0 ** (exponent - exponent // 2)
    q[..., 1], k[0, :, 0, 1] = 1.0, torch.arange(1100) * 7 % 16 * step * 8
    q, k = q.to(BF16), k.to(BF16)
    scale = 0.125
    exact_out, exact_lse = attention(
        q.double(), k.double(), k[..., 2:60].double(), softmax_scale=scale
    )
    with decode_emulator():
        out, lse, _ = flash_attn_func(
            q, k, k[..., : dims[1]], softmax_scale=scale, return_attn_probs=True
        )
    torch.testing.assert_close(lse.double(), exact_lse, rtol=3e-7, atol=2e-6)
    torch.testing.assert_close(out[..., 2:60].double(), exact_out, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dims", [(128, 128), MLA])
def test_rows_without_keys(dims):
    """The first of a batch of few keys, which is known to be a cache."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 20, 3, dims[0], generator=gen).to(BF16)
    k = torch.randn(1, 64, 1, dims[0], generator=gen).to(BF16)
    used = torch.tensor([3], dtype=torch.int32)
    with decode_emulator(mode="late"):
        out, lse = flash_attn_with_kvcache(
            q,
            k,
            k[..., : dims[1]],
            cache_seqlens=used,
            causal=True,
            return_softmax_lse=True,
        )
    assert (out[:, :17] == 0).all()
    assert (lse[..., :17] == INF).all()
    assert lse[..., 17:].isfinite().all()


# ------------------------------------------------------------------------------------------------
# Tensors in device memory, through the C interface.

CALLS = ("decode", "paged_decode", "shared_decode", "paged_shared_decode")


@pytest.fixture(scope="module")
def index_report():
    return report_of_emulated_driver(unchecked_indices.__file__, "1", *CALLS)


@pytest.mark.parametrize("name", unchecked_indices.cases(CALLS))
def test_element_out_of_range(index_report, name):
    """As test_cuda_indices.py has it for the other kernels."""
    tensor = unchecked_indices.cases(CALLS)[name][1]
    first, (status, sentence), third = index_report[name]["calls"]
    assert first == [0, ""]
    assert status == 1
    assert sentence.startswith(
        f"an earlier call on CUDA device 1 was given values out of range in {tensor}: "
    )
    assert third == [0, ""]
    assert index_report[name]["wrong"] == []


def test_replays_give_what_eager_calls_give():
    """With other lengths, pages and tokens."""
    report = report_of_emulated_driver(captured_calls.__file__, "1", *CALLS)
    assert {name: report[name] for name in CALLS} == {name: [] for name in CALLS}
