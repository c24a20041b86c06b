"""KV caches, whole or in pages, and packed batches over pages, on the kernels of compute capability
9.0, emulated: calls with more queries than decoding takes."""

from __future__ import annotations

import dataclasses

import pytest
from backends import BF16, FP16, HOPPER, needs_emulator
from cache_cases import Case, Problem, check, sampled_cases
from test_varlen import check_paged

import flash_attn

pytestmark = needs_emulator

CACHES = dataclasses.replace(
    HOPPER,
    cache_choices={
        **HOPPER.cache_choices,
        "seqlen_q": [70, 129, 200],
        "seqlen_new": [0, 1, 33, 70],
        "capacity": [130, 300, 500],
        "dims": [(64, 64), (128, 128), (40, 40), (192, 128), (256, 256), (96, 96), (192, 192)],
        "rotary": ["", "interleaved", "halves"],
        "page_size": [0, 0, 8, 16, 48, 64, 128, 256],
    },
)


@pytest.mark.parametrize("case", sampled_cases(24, seed=3, backend=CACHES), ids=str)
def test_feature_product(case):
    check(case, CACHES)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(300, seed=4, backend=CACHES), ids=str)
def test_feature_product_at_length(case):
    check(case, CACHES)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_paged(page_size, index):
    check_paged(page_size, index, BF16, 0, backend=HOPPER)


@pytest.mark.parametrize(
    ("page_size", "options", "kernel"),
    [
        (16, {}, "fwd_sm90"),
        (8, {}, "fwd_sm90"),
        (48, {}, "fwd_sm90"),
        (4, {}, "fwd_sm80"),  # a box of TMA has 8 rows at least
        (12, {}, "fwd_sm80"),
        (16, {"leftpad": True}, "fwd_sm80"),  # keys begin within a page
        (0, {"leftpad": True}, "fwd_sm90"),
        (16, {"rotary": "halves", "seqlen_new": 3}, "fwd_sm90"),
        (0, {"rotary": "interleaved", "seqlen_new": 140, "causal": True}, "fwd_sm90"),
        (16, {"seqlen_q": 5}, "decode_sm80"),
    ],
)
def test_which_kernel_takes_a_cache(page_size, options, kernel):
    case = Case(**{"dtype": FP16, "seqlen_q": 140, "page_size": page_size, **options})
    check(case, HOPPER)
    with flash_attn.emulator(arch="sm_90a", checks="memory") as gpu:
        Problem(case).call()
    names = {"_".join(name.split("_")[1:3]) for name in gpu.counters}
    assert names - {"append_sm80"} == {kernel}
