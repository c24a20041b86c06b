"""Activation functions on the CPU, against torch's in fp64."""

from __future__ import annotations

import contextlib

import activation_cases
import pytest
import torch
from activation_cases import BF16, DTYPES, FP16, FP32, FP64, FUNCTIONS, ActivationCase
from guard_bands import Guarded
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from flash_attn._library import bind
from flash_attn.ops import activations

ops = torch.ops.flash_attn


@pytest.mark.parametrize("case", activation_cases.cases(), ids=str)
def test_values(case, operator_isa):
    activation_cases.check(case, contextlib.nullcontext)


SHAPES = [(), (1,), (7,), (8,), (4096,), (0,), (0, 5), (5, 0), (2, 3, 40), (40000,), (3, 17000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(shape):
    case = ActivationCase("silu", BF16, bias=len(shape) > 0, gate=True, shape=shape)
    activation_cases.check(case, contextlib.nullcontext)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("cols", [1, 7, 2049])
def test_sums_over_rows(rows, cols, operator_isa):
    case = ActivationCase("gelu_approx", FP32, bias=True, shape=(rows, cols))
    activation_cases.check(case, contextlib.nullcontext)


@pytest.mark.parametrize("gate", [False, True])
def test_threads_do_not_change_results(gate, restore_threads):
    case = ActivationCase("silu", FP16, bias=True, gate=gate, shape=(300, 777))
    dout, x, bias, y = case.tensors()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(activations._backward(dout, x, bias, y, 3, True))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_inputs(name, dtype, operator_isa):
    """Finite, and close, wherever torch's own values and derivatives in fp64 are, unless the dtype
    cannot hold them; NaN stays NaN."""
    info = torch.finfo(dtype)
    values = [0.0, info.tiny, 1e-3, 5.0, 10.0, 20.0, 60.0, 89.0, 1e4, info.max / 2, info.max]
    finite = torch.tensor(values, dtype=FP64)
    x = torch.cat((finite, -finite, torch.tensor([torch.inf, -torch.inf, torch.nan]))).to(dtype)
    number = list(FUNCTIONS).index(name)
    out = activations._forward(x, None, None, number)
    dx = activations._backward(torch.ones_like(x), x, None, None, number, False)[0]
    leaf = x.double().requires_grad_()
    exact = FUNCTIONS[name](leaf)
    (exact_dx,) = torch.autograd.grad(exact.sum(), leaf)
    for actual, wanted in ((out, exact.detach()), (dx, exact_dx)):
        holds = wanted.abs() <= info.max
        tolerance = {"rtol": 2 * info.eps, "atol": 1e-6}
        torch.testing.assert_close(actual[holds].double(), wanted[holds], **tolerance)
    assert out[-1].isnan()
    assert name == "relu" or dx[-1].isnan()


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, BF16), (FP16, BF16)])
def test_dtypes_are_promoted(dtypes):
    y, bias = torch.randn(3, 40).to(dtypes[0]), torch.randn(40).to(dtypes[1])
    leaves = [t.requires_grad_() for t in (y, bias)]
    out = activations.bias_gelu(*leaves)
    exact = FUNCTIONS["gelu_approx"]((y + bias).float())
    assert out.dtype == torch.promote_types(*dtypes)
    torch.testing.assert_close(out.float(), exact, rtol=8e-3, atol=8e-3)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert [g.dtype for g in grads] == list(dtypes)
    for mine, other in zip(grads, torch.autograd.grad(exact.sum(), leaves)):
        torch.testing.assert_close(mine, other, rtol=8e-3, atol=8e-2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_halves_of_one_tensor(name):
    """The gate and the gated lie in one product; gradients reach both."""
    product = torch.randn(2, 5, 80, requires_grad=True)
    x, y = product.chunk(2, dim=-1)
    out = activations.gated(x, y, activation=name)
    exact = FUNCTIONS[name](x) * y
    dout = torch.randn_like(out)
    torch.testing.assert_close(out, exact)
    (grad,) = torch.autograd.grad(out, product, dout, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(exact, product, dout)[0])


def test_functions_by_their_names():
    x, y, g, bias = (torch.randn(3, 40) for _ in range(4))
    bias = bias[0]
    gelu, silu = FUNCTIONS["gelu_approx"], FUNCTIONS["silu"]
    check = torch.testing.assert_close

    def pulled(f, *inputs):
        leaves = [t.clone().requires_grad_() for t in inputs]
        grads = torch.autograd.grad(f(*leaves), leaves, g)
        return grads if len(grads) > 1 else grads[0]

    def of_sum(x, b):
        return gelu(x + b)

    for bias_gelu in (
        activations.bias_gelu,
        activations.bias_gelu_impl,
        activations.GeLUFunction.apply,
    ):
        check(bias_gelu(x, bias), of_sum(x, bias))
        check(pulled(bias_gelu, x, bias), pulled(of_sum, x, bias))
    check(activations.bias_gelu_back(g, x, bias), pulled(of_sum, x, bias)[0])
    check(activations.bias_act_bwd(g, x, bias), pulled(of_sum, x, bias))
    for fast_gelu in (activations.fast_gelu_impl, activations.FastGeLUFunction.apply):
        check(fast_gelu(x), gelu(x))
        check(pulled(fast_gelu, x), pulled(gelu, x))
    check(activations.gelu_fwd(x), gelu(x))
    check(activations.gelu_bwd(g, x), pulled(gelu, x))
    check(activations.relu_bwd(g, x), pulled(torch.relu, x))
    check(activations.sqrelu_fwd(x), FUNCTIONS["sqrelu"](x))
    check(activations.sqrelu_bwd(g, x), pulled(FUNCTIONS["sqrelu"], x))
    for swiglu in (activations.swiglu, activations.SwiGLUFunction.apply):
        check(swiglu(x, y), silu(x) * y)
        check(pulled(swiglu, x, y), pulled(lambda x, y: silu(x) * y, x, y))
    check(activations.swiglu_fwd(x, y), silu(x) * y)
    check(activations.swiglu_bwd(x, y, g), pulled(lambda x, y: silu(x) * y, x, y))


@pytest.mark.parametrize("operands", range(4))
def test_opcheck(operands):
    case = ActivationCase("silu", FP32, bool(operands & 1), bool(operands & 2), shape=(3, 8))
    dout, x, bias, y = case.tensors()
    leaves = [None if t is None else t.requires_grad_() for t in (x, bias, y)]
    opcheck(ops.activation_fwd.default, (*leaves, 3))
    opcheck(ops.activation_bwd.default, (dout, x.detach(), bias, y, 3, case.bias)[:6])


def test_one_graph():
    run = torch.compile(
        lambda x, y, b: activations.swiglu(activations.bias_gelu(x, b), y),
        backend="aot_eager",
        fullgraph=True,
    )
    inputs = [torch.randn(3, 8, requires_grad=True) for _ in range(2)]
    inputs.append(torch.randn(8, requires_grad=True))
    x, y, b = inputs
    exact = FUNCTIONS["silu"](FUNCTIONS["gelu_approx"](x + b)) * y
    actual = run(*inputs)
    torch.testing.assert_close(actual, exact)
    dout = torch.randn_like(exact)
    grads = torch.autograd.grad(actual, inputs, dout)
    torch.testing.assert_close(grads, torch.autograd.grad(exact, inputs, dout))


def test_checkpoint_and_autocast():
    x, y = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", BF16):
        out = checkpoint(activations.swiglu, x, y, use_reentrant=False)
    assert out.dtype == FP32
    grads = torch.autograd.grad(out.sum(), (x, y))
    exact = FUNCTIONS["silu"](x) * y
    torch.testing.assert_close(grads, torch.autograd.grad(exact.sum(), (x, y)))


def test_second_derivative_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(activations.fast_gelu_impl(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="activation_fwd has no second derivative"):
        (x.square().sum() + dx.square().sum()).backward()


# ------------------------------------------------------------------------------------------------
# The C interface

_forward = bind("activation_fwd", "x bias y activation out")
_backward = bind("activation_bwd", "dout x bias y activation dx dy dbias")


@pytest.mark.parametrize("bias", [False, True])
def test_results_may_lie_where_inputs_do(bias):
    case = ActivationCase("silu", BF16, bias, True, shape=(6, 100))
    dout, x, bias, y = case.tensors()
    out = activations._forward(x, bias, y, 3)
    given = Guarded(x)
    _forward(given.x, bias, y, 3, given.x)
    assert torch.equal(given.x, out)
    given.assert_untouched()
    dx, dy, _ = activations._backward(dout, x, bias, y, 3, False)
    gradients = Guarded(dout), Guarded(y)
    _backward(gradients[0].x, x, bias, gradients[1].x, 3, *(g.x for g in gradients), None)
    for actual, wanted in zip(gradients, (dx, dy)):
        assert torch.equal(actual.x, wanted)
        actual.assert_untouched()


def test_sums_are_written_alone():
    case = ActivationCase("relu", FP32, True, shape=(70, 37))
    dout, x, bias, _ = case.tensors()
    dbias = Guarded(torch.full((37,), torch.nan))
    _backward(dout, x, bias, None, 1, torch.empty_like(x), None, dbias.x)
    torch.testing.assert_close(dbias.x, activation_cases.expected(case, FP32)[2])
    dbias.assert_untouched()


BAD = {
    "activation must be 0 to 4, got 5": {"activation": 5},
    "bias must have shape": {"bias": torch.zeros(7)},
    r"y must have shape \(rows, cols\)": {"y": torch.zeros(3, 7), "dy": torch.zeros(3, 7)},
    "dy must be given where y is": {"y": torch.zeros(3, 8)},
    "all tensors must have one dtype": {"dx": torch.zeros(3, 8, dtype=BF16)},
    "dx must not overlap itself": {"dx": torch.zeros(1, 8).expand(3, 8)},
    "dbias must have dtype fp32": {"dbias": torch.zeros(8, dtype=BF16)},
    r"dbias must have shape \(cols\) = \(8\)": {"dbias": torch.zeros(9)},
    "dbias must be contiguous": {"dbias": torch.zeros(16)[::2]},
    "x must have contiguous rows|x has stride 2": {"x": torch.zeros(3, 16)[:, ::2]},
    "activations take fp16, bf16 and fp32": {"x": torch.zeros(3, 8, dtype=FP64)},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_arguments_write_nothing(sentence):
    names = "dout x bias y activation dx dy dbias"
    given = dict.fromkeys(names.split()) | {"activation": 1, "dbias": torch.full((8,), 5.0)}
    given |= {name: torch.full((3, 8), 5.0) for name in ("dout", "x", "dx")} | BAD[sentence]
    before = given["dx"].clone()
    with pytest.raises(RuntimeError, match=sentence):
        bind("activation_bwd", names)(*given.values())
    assert torch.equal(given["dx"], before)


def test_views_of_one_memory():
    memory = torch.zeros(3, 20)
    with pytest.raises(RuntimeError, match="out and x must not share memory, or be the same view"):
        _forward(memory[:, :8], None, None, 1, memory[:, 4:12])


def test_bad_arguments_of_functions():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"bias must have the shape \(8,\), got \(7,\)"):
        activations.bias_gelu(x, torch.randn(7))
    with pytest.raises(ValueError, match=r"y must have the shape \(3, 8\), got \(3, 7\)"):
        activations.swiglu(x, torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"activation must be one of gelu_approx, .*, got 'tanh'"):
        activations.gated(x, x, activation="tanh")
    with pytest.raises(TypeError, match=r"^bias must be a torch.Tensor"):
        activations.bias_gelu(x, [0.0])
    with pytest.raises(TypeError, match=r"^x must be a torch.Tensor"):
        activations.gelu_fwd([0.0])
