"""Packed batches and paged keys on the CUDA kernels, emulated: the cases of test_varlen.py."""

from __future__ import annotations

import pytest
import torch
from attention_cases import BF16, FP16, SWEEP_FACTOR, Case, make_tensors
from backends import EMULATOR, HOPPER, needs_emulator, on_each_emulated
from test_varlen import (
    FORWARD_OPTIONS,
    INF,
    TAIL,
    check,
    check_paged,
    check_used_keys,
    flash_varlen,
    varlen_cases,
)

import flash_attn

pytestmark = needs_emulator


@pytest.mark.parametrize("case", varlen_cases(30, seed=4, backend=EMULATOR), ids=str)
def test_feature_product(case):
    check(case, backend=EMULATOR)


@pytest.mark.slow
@pytest.mark.parametrize("case", varlen_cases(300, seed=5, backend=EMULATOR), ids=str)
def test_feature_product_at_length(case):
    check(case, SWEEP_FACTOR, backend=EMULATOR)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("rows", [3, 300])
@on_each_emulated
def test_rows_of_no_sequence(backend, dtype, rows):
    """out is 0 there and softmax_lse -inf, whatever they held; there may be more than in a
    sequence."""
    case = Case(dtype=dtype, batch=2, seqlens=(40, 70), heads=(4, 2), dims=(72, 40))
    tensors, *_ = make_tensors(case)
    q = torch.cat([tensors["q"][0], tensors["q"].new_full((rows, 4, 72), float("nan"))])
    cu_q, cu_k = (torch.tensor([0, n, n], dtype=torch.int32) for n in (40, 70))
    with backend.emulator(mode="late"):
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            q, tensors["k"][0], tensors["v"][0], cu_q, cu_k, 40, 70, return_attn_probs=True
        )
    assert out[:40].isfinite().all()
    assert (out[40:] == 0).all()
    assert (lse[:, 40:] == -INF).all()


@on_each_emulated
def test_no_tokens_at_all(backend):
    case = Case(dtype=BF16, batch=2, seqlens=(4, 4), heads=(2, 1))
    with backend.emulator():
        none = flash_varlen([(0, 0), (0, 0)], *make_tensors(case))
        no_keys = flash_varlen([(4, 0), (3, 0)], *make_tensors(case))
    assert none["out"].shape[0] == TAIL and (none["out"] == 0).all()
    assert (no_keys["out"] == 0).all()
    assert (no_keys["lse"] == INF).all()


@pytest.mark.parametrize("index", range(len(FORWARD_OPTIONS)))
@pytest.mark.parametrize("leftpad", [None, [0, 7, 33, 0, 150]])
@pytest.mark.parametrize("seqused", [None, [257, 8, 33, 0, 290]])
@pytest.mark.parametrize(
    ("backend", "num_splits"), [(EMULATOR, 0), (EMULATOR, 3), (HOPPER, 0)], ids=str
)
def test_used_keys_and_left_padding(index, leftpad, seqused, backend, num_splits):
    check_used_keys(index, leftpad, seqused, num_splits, dtype=FP16, backend=backend)


@pytest.mark.parametrize("index", range(len(FORWARD_OPTIONS)))
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize(
    ("backend", "num_splits"), [(EMULATOR, 0), (EMULATOR, 3), (HOPPER, 0)], ids=str
)
def test_paged(page_size, index, backend, num_splits):
    check_paged(page_size, index, BF16, num_splits, backend=backend)
