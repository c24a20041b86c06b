"""Rows of the backward whose scores are far from 0, as masks that are finite numbers make them: the
CUDA kernels, emulated. What counts is the scores' distance from each other."""

from __future__ import annotations

import pytest
import torch
from attention_cases import BF16, FP16, FP32, cuda_case, flash_forward_backward, make_tensors
from backends import EMULATOR, HOPPER, needs_emulator, on_each_emulated
from reference import attention_and_gradients
from test_cuda_bwd import GRADIENTS, SCHEDULES, assert_equal
from test_far_scores import (
    TOLERANCE,
    VALUES,
    assert_parts_add_up,
    assert_the_mean_is_due,
    assert_winners_take_all,
    smallest,
)
from test_varlen import flash_varlen, one_by_one, sampled_lengths

import flash_attn

pytestmark = needs_emulator


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias_dtype", [FP32, None])
def test_rows_hidden_by_a_finite_bias(dtype, value, bias_dtype):
    with flash_attn.emulator():
        assert_the_mean_is_due(dtype, value, bias_dtype)


STEPS = 16  # by which scores of a row differ, at most
SCALE = 0.125
# (exponent, sign, dtype): scores are about sign * 2^exponent.
BIAS = [
    (9, 1, FP16), (11, -1, BF16), (16, -1, FP16), (20, 1, FP16), (22, -1, BF16), (33, -1, BF16),
    (60, 1, BF16), (126, -1, BF16),
]  # fmt: skip
PRODUCTS = [
    (9, -1, FP16), (11, 1, BF16), (16, 1, FP16), (22, -1, FP16), (33, 1, BF16), (60, -1, BF16),
]  # fmt: skip
DIMS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (33, 50)]
MODIFIED_DIMS = [(64, 64), (128, 128), (256, 256), (33, 50)]


def far_problem(kind, exponent, sign, case):
    """A case's tensors with scores sign * 2^exponent and a little more, all of whose sums fp32
    holds exactly, in whatever order: ``(tensors, options, dout, dlse)``."""
    tensors, options, dout, dlse = make_tensors(case)
    step = 2.0 ** max(exponent - 22, -3)
    far = sign * 2.0**exponent
    q, k = torch.zeros(tensors["q"].shape), tensors["k"].float()
    q[..., 1], k[..., 0] = 1.0, 0.0
    k[..., 1] = (torch.arange(case.seqlens[1]) * 7 % STEPS * step / SCALE)[:, None]
    if kind == "products":
        q[..., 0] = 2.0 ** (exponent // 2)
        k[..., 0] = sign * 2.0 ** (exponent - exponent // 2) / SCALE
    else:
        tensors["attn_bias"] = torch.full((1, 1, *case.seqlens), far)
    tensors["s_aux"] = torch.full((case.heads[0],), far + (STEPS - 1) * step)
    tensors |= {"q": q.to(case.dtype), "k": k.to(case.dtype)}
    return tensors, {**options, "softmax_scale": SCALE}, dout, dlse


def assert_gradients_close(actual, exact, q, dtype):
    """Relative to the largest. The columns of dq that scores come of are sums of what cancels."""
    q_size = q.double().abs().amax((0, 1, 2)).clamp(min=1)
    for name in [n for n in exact if n.startswith("d")]:
        x, y = actual[name].double(), exact[name]
        if name == "dq":
            x, y = x[..., 2:], y[..., 2:]
        if name == "dk":
            x, y = x / q_size, y / q_size
        atol = TOLERANCE[dtype] * y.abs().max().item()
        torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("backend", "kind", "exponent", "sign", "dtype", "dims"),
    [
        *((EMULATOR, "bias", *x, dims) for x in BIAS for dims in MODIFIED_DIMS),
        *(
            (backend, "products", *x, dims)
            for backend in (EMULATOR, HOPPER)
            for x in PRODUCTS
            for dims in DIMS
        ),
    ],
    ids=str,
)
def test_weights_by_distances(backend, kind, exponent, sign, dtype, dims):
    """With a gradient of lse up to where the exact one loses itself in fp64."""
    dlse = exponent < 40
    case = cuda_case(dtype=dtype, batch=2, seqlens=(70, 140), dims=dims, causal=True, dlse=dlse)
    tensors, *rest = far_problem(kind, exponent, sign, case)
    exact = attention_and_gradients(tensors, *rest)
    with backend.calls(exponent):
        actual = flash_forward_backward(tensors, *rest)
    assert_gradients_close(actual, exact, tensors["q"], dtype)


def mixed_case(**more):
    """Of modified scores, of which ``mixed_problem`` makes a few rows far from 0."""
    fields = {"seqlens": (90, 150), "heads": (4, 2), "bias": "hqk", "bias_dtype": "fp32"}
    return cuda_case(**{**fields, "dlse": True, **more})


def mixed_problem(case):
    problem = make_tensors(case)
    for first, value in enumerate((-1e6, -1e9, -1e30, smallest(BF16), smallest(FP32))):
        problem[0]["attn_bias"][:, :, 10 * first : 10 * first + 3] = value
    return problem


@pytest.mark.parametrize("case", [
    mixed_case(),
    mixed_case(causal=True, window_size=(60, 0), dims=(128, 72), softcap=4.0),
    mixed_case(dims=(33, 50), alibi="h"),
], ids=str)  # fmt: skip
def test_schedules_agree_bitwise(case):
    problem = mixed_problem(case)
    with flash_attn.emulator():
        expected = flash_forward_backward(*problem)
    assert (expected["lse"].abs() > 1e5).sum() == 4 * 15
    for options in SCHEDULES:
        with flash_attn.emulator(**options):
            assert_equal(flash_forward_backward(*problem), expected)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dims", [(64, 64), (33, 50)])
def test_packed_equals_each_sequence_alone(dtype, dims):
    case = mixed_case(dtype=dtype, dims=dims, batch=4, seqlens=(90, 70), causal=True)
    lengths, problem = sampled_lengths(case, seed=3), mixed_problem(case)
    with EMULATOR.calls(1):
        together = flash_varlen(lengths, *problem)
        alone = one_by_one(flash_forward_backward, lengths, problem)
    for name in ("out", "lse", *GRADIENTS):
        assert torch.equal(together[name], alone[name]), name


def test_dropout_leaves_a_far_row_its_weights():
    """Of equal keys each is kept as often: dv's mean is that without dropout."""
    case = cuda_case(seqlens=(128, 128), heads=(1, 1), bias="qk", bias_dtype="fp32")
    tensors, options, dout, _ = make_tensors(case)
    tensors["attn_bias"].fill_(smallest(FP32))
    dout = torch.ones_like(dout)
    torch.manual_seed(0)
    with flash_attn.emulator():
        dv = flash_forward_backward(tensors, options, dout, dropout_p=0.5)["dv"]
    kept = (dv[..., 0].double() * 64).round()  # rows that keep a key, each with 2 / 128
    assert torch.equal(dv.double() * 64, kept[..., None].expand_as(dv))
    assert 40 < kept.min() < 60 < 68 < kept.max() < 90


@on_each_emulated
@pytest.mark.parametrize("seqlen_q", [3, 100])
def test_huge_random_scores_choose_one_key(seqlen_q, backend):
    with backend.emulator():
        assert_winners_take_all(BF16, seqlen_q)


@on_each_emulated
def test_keys_in_parts(backend):
    with backend.emulator():
        assert_parts_add_up(BF16)


def test_rows_near_0_are_not_summed_again():
    """Each 16 rows of a head with a far one among them multiply once more, no others."""
    case = cuda_case(seqlens=(64, 80), heads=(2, 1), bias="hqk", bias_dtype="fp32")
    problem = make_tensors(case)
    products = []
    for far_rows in ([], [20], [20, 21, 40]):
        problem[0]["attn_bias"][0, 0, far_rows] = -1e9
        with flash_attn.emulator() as gpu:
            flash_forward_backward(*problem)
        products.append(sum(gpu.counters["flash_bwd_prepare_sm80_bf16"]["tensor"].values()))
    of_16_rows = 80 // 8 * 64 // 16
    assert products == [0, of_16_rows, 2 * of_16_rows]
