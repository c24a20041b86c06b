"""inf, NaN and numbers whose products overflow, seen by rows: results are those of fp32 arithmetic.

Instruction sets that multiply numbers as sums of bf16 terms must not show it: of an infinite number
and another's terms of both signs the products are NaN, where the numbers' own product is not.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import BF16, FP16, FP32
from reference import INF, assert_same_non_finite, attention

from flash_attn import flash_attn_func

pytestmark = pytest.mark.usefixtures("isa")

NAN = float("nan")
HUGE = 3.4e38  # the next bf16 is inf
TOLERANCE = {FP32: 2e-5, BF16: 2e-2, FP16: 3e-3}
DIM = 5  # of the number that is not finite


def make_inputs(dtype, *, seqlens=(150, 280), dims=(40, 40)):
    """q, k, v, dout of batch 1 with heads 2 and 1."""
    gen = torch.Generator().manual_seed(7)
    (sq, sk), (d, dv) = seqlens, dims
    shapes = ((1, sq, 2, d), (1, sk, 1, d), (1, sk, 1, dv), (1, sq, 2, dv))
    q, k, v, dout = (torch.randn(shape, generator=gen) for shape in shapes)
    q[:, 3::50, :, DIM] = 0.0  # of which inf makes NaN
    return {n: x.to(dtype) for n, x in zip(("q", "k", "v", "dout"), (q, k, v, dout))}


def forward(q, k, v, **options):
    out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    return {"out": out, "lse": lse}


def forward_backward(tensors, **options):
    q, k, v = (tensors[n].detach().requires_grad_() for n in "qkv")
    out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    gradients = torch.autograd.grad(out, (q, k, v), tensors["dout"])
    results = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients))}
    return {n: x.detach() for n, x in results.items()}


def assert_close(actual, exact, dtype, name):
    assert_same_non_finite(actual, exact, name)
    finite = exact.isfinite()
    torch.testing.assert_close(
        actual.double()[finite], exact[finite], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def values_of(dtype):
    return [INF, -INF, NAN] + ([HUGE, -HUGE, 1e30] if dtype != FP16 else [])


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("causal", [False, True])
def test_softcap_makes_infinite_scores_finite(which, dtype, causal):
    """Whatever the number's terms are: out and lse are NaN only for NaN, and where it meets a 0."""
    for value in values_of(dtype):
        tensors = make_inputs(dtype)
        for row in (0, 70, 149):
            tensors[which][0, row, 0, DIM] = value
        q, k, v = (tensors[n] for n in "qkv")
        options = {"softcap": 5.0, "causal": causal}
        actual = forward(q, k, v, **options)
        out, lse = attention(q.double(), k.double(), v.double(), **options)
        assert_close(actual["out"], out, dtype, f"{value} out")
        assert_close(actual["lse"], lse, FP32, f"{value} lse")


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 130)}], ids=str)
def test_minus_infinite_scores_weigh_nothing(dtype, options):
    """A row is NaN where a score is +inf or NaN; where one is -inf, the others share the weight."""
    tensors = make_inputs(dtype)
    q, k, v = (tensors[n] for n in "qkv")
    for row in (0, 131, 200):
        k[0, row, 0, DIM] = -INF
    actual = forward(q, k, v, **options)
    out, _ = attention(q.double(), k.double(), v.double(), **options)
    assert out.isnan().any() and out.isfinite().any()
    assert_close(actual["out"], out, dtype, "out")
    rows = out[..., 0].isfinite().transpose(1, 2)
    lse = attention(q.double(), k.double(), v.double(), **options)[1]
    assert_close(actual["lse"][rows], lse[rows], FP32, "lse")


def test_products_that_overflow():
    """Finite numbers whose terms' products are inf and -inf: their scores are -inf, or +inf."""
    tensors = make_inputs(FP32)
    q, k, v = (tensors[n] for n in "qkv")
    q[..., DIM] = 1.7e25 * q[..., DIM].abs().clamp_min(0.1)
    k[..., DIM] = 0.0
    k[0, 9::100, 0, DIM] = -1.3e25
    actual = forward(q, k, v)
    out, lse = attention(q.double(), k.double(), v.double())
    assert_close(actual["out"], out, FP32, "out")
    assert_close(actual["lse"], lse, FP32, "lse")


def exact_gradients(q, k, v, dout, softcap=0.0):
    """Results of ``forward_backward`` in fp64, by the formulas that the library computes: D is the
    sum of dout out, where PyTorch's softmax sums P dP, which has inf and -inf where D has one."""
    q, k, v, dout = (x.double().transpose(1, 2) for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5
    s = scale * q @ k.mT
    slope = torch.ones_like(s)
    if softcap:
        slope = 1 - torch.tanh(s / softcap).square()
        s = softcap * torch.tanh(s / softcap)
    p = s.softmax(-1)
    out = p @ v
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * slope
    results = {
        "out": out,
        "dq": scale * ds @ k,
        "dk": scale * (ds.mT @ q).sum(1, keepdim=True),
        "dv": (p.mT @ dout).sum(1, keepdim=True),
    }
    return {n: x.transpose(1, 2) for n, x in results.items()}


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("which", ["q", "k"])
def test_gradients_of_infinite_scores_under_softcap(which, dtype):
    """Every row sees every key: the reference's products with 0 are no masked ones. What a slope of
    softcap, 0 but for rounding, is times the infinite number itself is left open."""
    other = {"q": "dk", "k": "dq"}[which]
    for value in values_of(dtype):
        tensors = make_inputs(dtype)
        for row in (0, 70, 149):
            tensors[which][0, row, 0, DIM] = value
        actual = forward_backward(tensors, softcap=5.0)
        exact = exact_gradients(**tensors, softcap=5.0)
        for results in (actual, exact):
            results[other][..., DIM] = 0.0
        for name, x in exact.items():
            assert_close(actual[name], x, dtype, f"{value} {name}")


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("which", ["v", "dout"])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_gradients_of_infinite_values(which, dtype, value):
    """dP is infinite, and so is dS: what it adds to dK and dQ is inf of the other's sign."""
    tensors = make_inputs(dtype, seqlens=(70, 90))
    tensors[which][0, 33, 0, DIM] = value
    actual, exact = forward_backward(tensors), exact_gradients(**tensors)
    for name, x in exact.items():
        assert_close(actual[name], x, dtype, name)
