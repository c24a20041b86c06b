"""Scores far from 0: what counts is their distance from each other.

Masks that are finite numbers (-1e9, ``torch.finfo.min``) hide all keys from padded rows; then the
mean of v is due, and gradients of rows that no loss sees must be 0, not NaN.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import BF16, FP16, FP32
from reference import attention_and_gradients

from flash_attn import flash_attn_func
from flash_attn.flash_attn_interface import _flash_attn_backward

pytestmark = pytest.mark.usefixtures("isa")

TOLERANCE = {FP32: 2e-5, BF16: 2e-2, FP16: 3e-3}
SEEN, HIDDEN = slice(None, 40), slice(40, None)


def smallest(dtype):
    return torch.finfo(dtype).min


def make_hidden_rows(dtype, value, bias_dtype):
    """q, k, v, bias, dout: rows from 40 on have score 0 and the bias ``value`` everywhere."""
    torch.manual_seed(0)
    q = torch.randn(2, 60, 4, 32)
    k, v = torch.randn(2, 60, 2, 32), torch.randn(2, 60, 2, 32)
    q[:, HIDDEN] = 0.0
    bias = torch.zeros(1, 1, 60, 60)
    bias[:, :, :, 50:] = value
    bias[:, :, HIDDEN] = value
    return *(x.to(dtype) for x in (q, k, v)), bias.to(bias_dtype), torch.randn_like(q).to(dtype)


def forward_backward(q, k, v, dout, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    return out, lse, *torch.autograd.grad(out, (q, k, v), dout)


VALUES = [-1e4, -1e6, -1e9, -1e10, -1e12, -1e15, -1e30, "finfo.min"]


def assert_the_mean_is_due(dtype, value, bias_dtype):
    """In rows hidden by the bias ``value``; None: a bias of ``dtype``."""
    bias_dtype = bias_dtype or dtype
    value = max(smallest(bias_dtype), smallest(bias_dtype) if value == "finfo.min" else value)
    q, k, v, bias, dout = make_hidden_rows(dtype, value, bias_dtype)
    names = ("out", "lse", "dq", "dk", "dv")
    actual = dict(zip(names, forward_backward(q, k, v, dout, attn_bias=bias)))
    exact = attention_and_gradients(
        {"q": q, "k": k, "v": v}, {"attn_bias": bias.double()}, dout, dtype=torch.float64
    )
    mean = v.double().mean(1, keepdim=True).repeat_interleave(2, dim=2)
    torch.testing.assert_close(exact["out"][:, HIDDEN], mean.expand(-1, 20, -1, -1))
    for name in names:
        tolerance = TOLERANCE[dtype] if name != "lse" else 1e-6
        torch.testing.assert_close(
            actual[name].double(), exact[name], rtol=tolerance, atol=5 * tolerance, msg=name
        )


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("bias_dtype", [FP32, None])
def test_rows_hidden_by_a_finite_bias(dtype, value, bias_dtype):
    assert_the_mean_is_due(dtype, value, bias_dtype)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_hidden_rows_that_no_loss_sees(dtype, value):
    """Gradients are those of the call without these rows."""
    value = max(smallest(dtype), smallest(dtype) if value == "finfo.min" else value)
    q, k, v, bias, dout = make_hidden_rows(dtype, value, dtype)
    dout[:, HIDDEN] = 0.0
    _, _, dq, dk, dv = forward_backward(q, k, v, dout, attn_bias=bias)
    _, _, *expected = forward_backward(
        q[:, SEEN], k, v, dout[:, SEEN], attn_bias=bias[:, :, SEEN].contiguous()
    )
    assert (dq[:, HIDDEN] == 0).all()
    for actual, wanted in zip((dq[:, SEEN], dk, dv), expected):
        torch.testing.assert_close(actual, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("seqlens", [(70, 70), (2, 700)])  # (2, 700): one pass over unpacked keys
@pytest.mark.parametrize(("dtype", "x"), [(FP32, 1e18), (BF16, 133120.0), (FP16, 6e4)])
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_products_of_any_size(dtype, x, seqlens, sign):
    q = torch.full((1, seqlens[0], 2, 64), x, dtype=dtype)
    k = torch.full((1, seqlens[1], 2, 64), sign * x, dtype=dtype)
    out, lse, _, _, dv = forward_backward(q, k, k, torch.ones_like(q))
    rounding = 1e-6 if dtype == FP32 else 0.0
    torch.testing.assert_close(out, k[:, :1].expand_as(out), rtol=rounding, atol=0)
    score = torch.full_like(lse, sign * q[0, 0, 0, 0].item() ** 2 * 64 / 8)
    torch.testing.assert_close(lse, score, rtol=1e-6, atol=0)
    share = torch.full_like(dv, seqlens[0] / seqlens[1])
    torch.testing.assert_close(dv, share, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_one_visible_key_has_the_weight_1(dtype):
    torch.manual_seed(0)
    q = torch.randn(1, 256, 4, 64).to(dtype)
    k, v = torch.randn(1, 1, 2, 64).to(dtype), torch.randn(1, 1, 2, 64).to(dtype)
    slopes = torch.tensor([4.0, 0.5, 0.25, 0.125])
    out, _, _, _, dv = forward_backward(q, k, v, torch.ones_like(q), alibi_slopes=slopes)
    assert torch.equal(out, v.repeat_interleave(2, dim=2).expand_as(out))
    assert (dv == 512).all()


@pytest.mark.parametrize("jump", [20, 100, 300, 1000, 3000])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_scores_that_jump(dtype, jump):
    """From near 0 to ``jump``: e^jump has no exponent, or one that wraps around to a small one."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64) for n in (200, 300, 300))
    k *= 0.1
    q[..., 0] = 8.0
    k[..., 0] = 0.0
    k[:, 150:, :, 0] = jump
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out, lse, *_ = forward_backward(q, k, v, torch.ones_like(q))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double())
    tolerance = max(TOLERANCE[dtype], 2**-22 * jump)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_alibi_that_grows_by_more_than_any_headroom(dtype, causal):
    """Up to 2800 from the first key to the diagonal: references rise again and again."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 700, 4, 64).to(dtype) for _ in range(3))
    slopes = torch.tensor([4.0, 1.0, 0.1, 0.01])
    dout = torch.ones_like(q)
    out, lse, *_ = forward_backward(q, k, v, dout, alibi_slopes=slopes, causal=causal)
    distance = (torch.arange(700)[:, None] - torch.arange(700)).abs()
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8
    scores -= slopes.double()[:, None, None] * distance
    if causal:
        scores.masked_fill_(torch.ones(700, 700).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=2e-5)


def assert_winners_take_all(dtype, seqlen_q):
    """Of scores that forward and backward may round differently, by more than exp can bear."""
    torch.manual_seed(0)
    q = (torch.randn(1, seqlen_q, 2, 64) * 1e6).to(dtype)
    k, v = (torch.randn(1, 700, 2, 64) * 1e6).to(dtype), torch.randn(1, 700, 2, 64).to(dtype)
    dout = torch.randn_like(q)
    out, _, dq, dk, dv = forward_backward(q, k, v, dout)
    best = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()).argmax(-1)[0]
    for h in range(2):
        assert torch.equal(out[0, :, h], v[0, best[h], h])
        expected = torch.zeros(700, 64).index_add_(0, best[h], dout[0, :, h].float())
        torch.testing.assert_close(dv[0, :, h].float(), expected, rtol=1e-2, atol=1e-2)
    assert dq.isfinite().all()
    assert dk.isfinite().all()


@pytest.mark.parametrize("seqlen_q", [3, 100])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_huge_random_scores_choose_one_key(dtype, seqlen_q):
    assert_winners_take_all(dtype, seqlen_q)


def far_keys(dtype):
    """q, k, v, dout, whose scores are 2048 and a little more."""
    torch.manual_seed(0)
    q, k = torch.zeros(1, 50, 2, 64), torch.zeros(1, 90, 2, 64)
    q[..., 0], k[..., 0] = 128.0, 128.0
    q[..., 1:] = torch.randn(1, 50, 2, 63).round()
    k[..., 1:] = torch.randn(1, 90, 2, 63).round()
    v, dout = torch.randn(1, 90, 2, 64), torch.randn(1, 50, 2, 64)
    return [x.to(dtype) for x in (q, k, v, dout)]


def assert_parts_add_up(dtype):
    """Ring attention: every part's backward is given out and softmax_lse of all keys.

    The rounding of that softmax_lse, 2^-13, is part of P there; q of 128 multiplies it in dk.
    """
    q, k, v, dout = far_keys(dtype)
    out, lse, dq, dk, dv = forward_backward(q, k, v, dout)
    assert lse.min() > 2000

    def part(keys):
        gradients = [torch.empty_like(x) for x in (q, k[:, keys], v[:, keys])]
        _flash_attn_backward(
            dout, q, k[:, keys], v[:, keys], out.detach(), lse.detach(), *gradients,
            0.0, 0.125, False, -1, -1, 0.0, None, False,
        )  # fmt: skip
        return gradients

    first, second = part(slice(None, 37)), part(slice(37, None))
    tolerance = 2.0**-13 if dtype == FP32 else 2.0**-7
    scale = {"dq": 128, "dk": 128, "dv": 8}
    parts = first[0] + second[0], *(torch.cat(x, 1) for x in zip(first[1:], second[1:]))
    for (name, size), actual, wanted in zip(scale.items(), parts, (dq, dk, dv)):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * size, msg=name)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_keys_in_parts(dtype):
    assert_parts_add_up(dtype)
