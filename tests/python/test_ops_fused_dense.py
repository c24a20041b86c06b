"""Fused dense layers and MLPs on one process, against plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense_reference import (
    DTYPES,
    assert_as_exact_as,
    outputs_and_gradients,
    randn,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from flash_attn.ops import _dense
from flash_attn.ops.fused_dense import (
    ColumnParallelLinear,
    FusedDense,
    FusedDenseFunc,
    FusedMLP,
    FusedMLPFunc,
    ParallelFusedMLP,
    RowParallelLinear,
    fused_dense_func,
    fused_mlp_func,
)
from flash_attn.ops.triton.linear import (
    get_configs_io_bound,
    init_to_zero,
    triton_dgrad_act,
    triton_linear_act,
)
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense, fused_dense_sqrelu_dense_function

FUNCTIONS = {
    "gelu_approx": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sqrelu": lambda x: F.relu(x) ** 2,
}
SHAPES = [(5, 16), (2, 3, 16), (16,), (0, 16)]


class PlainMlp(nn.Module):
    """What the fused MLPs are to be."""

    def __init__(self, activation, has_residual=False, sizes=(16, 24, 12), **options):
        super().__init__()
        bias1, bias2 = options.pop("bias1", True), options.pop("bias2", True)
        self.fc1 = nn.Linear(sizes[0], sizes[1], bias=bias1, **options)
        self.fc2 = nn.Linear(sizes[1], sizes[2], bias=bias2, **options)
        self.function, self.has_residual = FUNCTIONS[activation], has_residual

    def forward(self, x):
        y = self.fc2(self.function(self.fc1(x)))
        return (y, x) if self.has_residual else y


class PlainDense(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("bias", [True, False])
def test_dense(dtype, shape, bias):
    x = randn(*shape, dtype=dtype)
    plain = nn.Linear(16, 12, bias=bias, dtype=dtype)
    assert_as_exact_as(FusedDense(16, 12, bias=bias, dtype=dtype), plain, x)
    with_residual = FusedDense(16, 12, bias=bias, return_residual=True, dtype=dtype)
    assert_as_exact_as(with_residual, PlainDense(16, 12, bias=bias, dtype=dtype), x)
    for layer in (ColumnParallelLinear, RowParallelLinear):
        assert_as_exact_as(layer(16, 12, None, bias=bias, dtype=dtype), plain, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("checkpoint_lvl", [0, 1, 2])
def test_mlp(dtype, activation, checkpoint_lvl):
    x = randn(2, 5, 16, dtype=dtype)
    options = {"activation": activation, "checkpoint_lvl": checkpoint_lvl, "dtype": dtype}
    for residual in (False, True):
        module = FusedMLP(16, 24, 12, return_residual=residual, **options)
        plain = PlainMlp(activation, residual, dtype=dtype)
        assert_as_exact_as(module, plain, x)
        assert_as_exact_as(module.eval(), plain, x)
    assert_as_exact_as(
        ParallelFusedMLP(16, 24, 12, **options), PlainMlp(activation, dtype=dtype), x
    )


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)])
def test_mlp_without_bias(activation, biases):
    options = dict(zip(("bias1", "bias2"), biases))
    for level in (0, 2):
        module = FusedMLP(16, 24, 12, activation=activation, checkpoint_lvl=level, **options)
        assert_as_exact_as(module, PlainMlp(activation, **options), randn(5, 16))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_x(shape):
    x = randn(*shape)
    assert_as_exact_as(FusedMLP(16, 24, 12, return_residual=True), PlainMlp("gelu_approx", True), x)
    strided = randn(16, *shape[:-1]).movedim(0, -1)
    assert_as_exact_as(FusedMLP(16, 24, 12), PlainMlp("gelu_approx"), strided)


def test_state_dict():
    linear = ["weight", "bias"]
    assert list(FusedDense(4, 3).state_dict()) == linear
    assert list(ColumnParallelLinear(4, 3, None).state_dict()) == linear
    assert list(RowParallelLinear(4, 3, None, bias=False).state_dict()) == ["weight"]
    names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    for module in (FusedMLP(4), ParallelFusedMLP(4), FusedDenseSqreluDense(4)):
        assert list(module.state_dict()) == names
        assert module.fc1.weight.shape == (16, 4) and module.fc2.weight.shape == (4, 16)
    module = FusedMLP(4, 5, 6, device="meta", dtype=torch.bfloat16)
    assert module.fc2.weight.shape == (6, 5)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def parameters(*sizes):
    """weight1, bias1, weight2, bias2 in fp64, with values on both sides of 0."""
    shapes = (sizes[1], sizes[0]), (sizes[1],), (sizes[2], sizes[1]), (sizes[2],)
    return [randn(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("checkpoint_lvl", [0, 1, 2])
def test_first_and_second_derivatives(activation, checkpoint_lvl):
    x = randn(3, 4, dtype=torch.float64).requires_grad_()
    for residual in (False, True):

        def mlp(x, w1, b1, w2, b2, residual=residual):
            return FusedMLPFunc.apply(x, w1, b1, w2, b2, activation, True, residual, checkpoint_lvl)

        assert gradcheck(mlp, (x, *parameters(4, 5, 3)), fast_mode=True)
        assert gradgradcheck(mlp, (x, *parameters(4, 5, 3)), fast_mode=True)

        def dense(x, weight, bias, residual=residual):
            return FusedDenseFunc.apply(x, weight, bias, residual)

        assert gradcheck(dense, (x, *parameters(4, 5, 3)[:2]), fast_mode=True)
        assert gradgradcheck(dense, (x, *parameters(4, 5, 3)[:2]), fast_mode=True)


@pytest.mark.parametrize(
    ("activation", "checkpoint_lvl", "count"),
    [("gelu_approx", 0, 2), ("gelu_approx", 1, 1), ("gelu_approx", 2, 0), ("sqrelu", 0, 2),
     ("sqrelu", 1, 1), ("sqrelu", 2, 0), ("relu", 0, 1), ("relu", 1, 1), ("relu", 2, 0)],
)  # fmt: skip
def test_checkpoint_level_is_what_is_kept(activation, checkpoint_lvl, count):
    """Of the tensors with hidden features."""
    w1, b1, w2, b2 = parameters(4, 7, 3)
    x = randn(11, 4, dtype=torch.float64).requires_grad_()

    def kept(frozen=False, **options):
        shapes = []
        second = (w2.detach(), b2.detach()) if frozen else (w2, b2)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)), lambda _: None
        ):
            fused_mlp_func(
                x, w1, second[0], b1, second[1], activation, checkpoint_lvl=checkpoint_lvl,
                **options,
            )  # fmt: skip
        return shapes.count((11, 7))

    assert kept() == count
    assert kept(frozen=True) == min(count, 1)
    assert kept(save_pre_act=False) == 0


@pytest.mark.parametrize("frozen", ["fc1", "fc2", "fc1.weight", "x", "all but x"])
def test_only_what_is_asked_for_has_a_gradient(frozen):
    module = FusedMLP(16, 24, 12)
    plain = PlainMlp("gelu_approx")
    plain.load_state_dict(module.state_dict())
    x = randn(5, 16)
    grads = []
    for m in (module, plain):
        for name, p in m.named_parameters():
            p.requires_grad_(not (name.startswith(frozen) or frozen == "all but x"))
        y = x.clone().requires_grad_(frozen != "x")
        m(y).square().sum().backward()
        grads.append({"x": y.grad, **{name: p.grad for name, p in m.named_parameters()}})
    for name, expected in grads[1].items():
        assert (grads[0][name] is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(grads[0][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
def test_autocast(dtype, residual):
    """As plain torch under autocast; the backward need not be under it, nor does it change it."""
    x = randn(5, 16)
    plain_dense = PlainDense(16, 12) if residual else nn.Linear(16, 12)
    pairs = [
        (FusedMLP(16, 24, 12, return_residual=residual), PlainMlp("gelu_approx", residual)),
        (FusedDense(16, 12, return_residual=residual), plain_dense),
    ]
    for module, plain in pairs:
        plain.load_state_dict(module.state_dict())
        found = {}
        for name, m in (("fused", module), ("plain", plain)):
            for backward_under_autocast in (False, True):
                y = x.clone().requires_grad_()
                m.zero_grad()
                with torch.autocast("cpu", dtype):
                    out = m(y)
                    first = out[0] if residual else out
                    assert first.dtype == dtype
                    assert not residual or out[1].dtype == torch.float32
                    loss = first.float().square().sum() + (out[1].sin().sum() if residual else 0)
                    if backward_under_autocast:
                        loss.backward()
                if not backward_under_autocast:
                    loss.backward()
                assert y.grad.dtype == torch.float32
                values = [first.detach(), y.grad, *(p.grad for p in m.parameters())]
                found[name, backward_under_autocast] = values
        for under in (False, True):
            for a, b in zip(found["fused", under], found["plain", under]):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_backward_of_fp32_under_autocast_is_fp32():
    module, x = FusedMLP(16, 24, 12, return_residual=True), randn(5, 16)
    expected = outputs_and_gradients(module, (x,))
    y = x.clone().requires_grad_()
    module.zero_grad()
    results = module(y)
    weights = [randn(*r.shape, seed=100 + i) for i, r in enumerate(results)]
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.backward(results, weights)
    assert torch.equal(y.grad, expected["input 0"])
    assert torch.equal(module.fc1.weight.grad, expected["fc1.weight"])


def test_autocast_leaves_fp64():
    module = FusedMLP(16, 24, 12, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(randn(5, 16, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    module, x = FusedMLP(16, 24, 12, return_residual=True), randn(5, 16)
    expected = outputs_and_gradients(module, (x,))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    actual = outputs_and_gradients(Checkpointed(), (x,))
    for name, wanted in expected.items():
        prefix = "" if " " in name else "inner."
        assert torch.equal(actual[prefix + name], wanted), name


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_compiled_and_transformed(activation):
    torch._dynamo.reset()
    module = FusedMLP(16, 24, 12, activation=activation, return_residual=True)
    x = randn(5, 16)
    expected = outputs_and_gradients(module, (x,))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for name, wanted in outputs_and_gradients(compiled, (x,)).items():
        torch.testing.assert_close(wanted, expected[name.removeprefix("_orig_mod.")])

    tangent = randn(5, 16, seed=1)
    out, jvp = torch.func.jvp(lambda x: module(x)[0], (x,), (tangent,))
    plain = PlainMlp(activation)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(jvp, torch.func.jvp(plain, (x,), (tangent,))[1])
    with forward_ad.dual_level():
        dual = module(forward_ad.make_dual(x, tangent))[0]
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, jvp)
    torch.testing.assert_close(torch.vmap(lambda row: module(row)[0])(x), out)
    per_sample = torch.vmap(torch.func.grad(lambda row: module(row)[0].sum()))(x)
    y = x.clone().requires_grad_()
    plain(y).sum().backward()
    torch.testing.assert_close(per_sample, y.grad)


@pytest.mark.parametrize("module", [FusedDense, FusedMLP])
def test_residual_needs_a_gradient_as_x_does(module):
    layer, x = module(16, 16, return_residual=True), randn(5, 16)
    assert layer(x)[0].requires_grad and not layer(x)[1].requires_grad
    assert layer(x.requires_grad_())[1].requires_grad


def test_inference():
    module, x = FusedMLP(16, 24, 12, activation="relu"), randn(5, 16)
    expected = module(x)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected)
    assert not module.requires_grad_(False)(x).requires_grad


def test_without_values():
    """On the meta device, with fake tensors, and exported."""
    module = FusedMLP(16, 24, 12, return_residual=True, device="meta")
    x = torch.empty(5, 16, device="meta", requires_grad=True)
    out, _ = module(x)
    out.sum().backward()
    assert out.shape == (5, 12) and x.grad.shape == (5, 16)
    with FakeTensorMode():
        assert FusedMLP(16, 24, 12)(torch.empty(5, 16)).shape == (5, 12)
    module, x = FusedMLP(16, 24, 12), randn(5, 16)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


def test_in_place_change_of_what_is_kept_is_found():
    module, x = FusedDense(16, 12, return_residual=True), randn(5, 16).requires_grad_()
    y = x * 1
    out, residual = module(y)
    with torch.no_grad():
        residual.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gelu_of_a_product_on_a_gpu():
    """torch's fused GELU is taken there alone: on the CPU it is not the tanh approximation."""
    gelu = _dense.ACTIVATIONS["gelu_approx"]
    x, weight, bias = randn(64, 16), randn(24, 16), randn(24)
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    torch.testing.assert_close(gelu.of_product(x, weight, bias), expected)
    erf = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    assert (erf - expected).abs().max() > 1e-4
    if torch.cuda.is_available():
        x, weight, bias = x.cuda(), weight.cuda(), bias.cuda()
        torch.testing.assert_close(gelu.of_product(x, weight, bias).cpu(), expected)


@pytest.mark.parametrize("heuristic", ["auto", -1, 0, 4])
def test_heuristic_changes_nothing(heuristic):
    w1, b1, w2, b2 = parameters(4, 5, 3)
    x = randn(3, 4, dtype=torch.float64)
    expected = fused_mlp_func(x, w1, w2, b1, b2)
    assert torch.equal(fused_mlp_func(x, w1, w2, b1, b2, heuristic=heuristic), expected)


def test_squared_relu_mlp():
    module = FusedDenseSqreluDense(16, 24, 12, checkpoint_lvl=1)
    assert_as_exact_as(module, PlainMlp("sqrelu"), randn(5, 16))
    w1, b1, w2, b2 = parameters(4, 5, 3)
    x = randn(3, 4, dtype=torch.float64).requires_grad_()
    for level in (0, 1, 2):
        assert gradcheck(
            lambda *args, level=level: fused_dense_sqrelu_dense_function(*args, level),
            (x, w1, b1, w2, b2), fast_mode=True,
        )  # fmt: skip


NAMES_OF_LINEAR = {
    "id": lambda x: x,
    "gelu": F.gelu,
    "gelu_approx": FUNCTIONS["gelu_approx"],
    "squared_relu": FUNCTIONS["sqrelu"],
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
}


@pytest.mark.parametrize("activation", NAMES_OF_LINEAR)
def test_linear_with_activation(activation):
    w1, b1, w2, _ = (p.detach() for p in parameters(4, 5, 3))
    x = randn(2, 3, 4, dtype=torch.float64)
    out, act_input = triton_linear_act(x, w1, b1, activation, save_act_input=True)
    torch.testing.assert_close(act_input, F.linear(x, w1, b1))
    torch.testing.assert_close(out, NAMES_OF_LINEAR[activation](act_input))
    assert torch.equal(triton_linear_act(x, w1, b1, activation), out)
    a = act_input.clone().requires_grad_()
    result = F.linear(NAMES_OF_LINEAR[activation](a), w2)
    grad = randn(2, 3, 3, seed=5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(result, a, grad)
    torch.testing.assert_close(triton_dgrad_act(grad, w2, activation, act_input), expected)
    operands = [t.requires_grad_() for t in (x, w1, b1)]
    assert gradcheck(lambda *args: triton_linear_act(*args, activation), operands, fast_mode=True)


def test_names_of_the_autotuner():
    buffers = {"out": torch.ones(3), "other": torch.ones(2)}
    init_to_zero("out")(buffers)
    assert buffers["out"].sum() == 0 and buffers["other"].sum() == 2
    assert get_configs_io_bound() == []


X, W1, W2, B1, B2 = randn(3, 4), randn(5, 4), randn(2, 5), randn(5), randn(2)
BAD_CALLS = {
    "x must be a torch.Tensor, got list": lambda: fused_dense_func([1.0], W1),
    "weight must be a torch.Tensor": lambda: fused_dense_func(X, None),
    "bias must be a torch.Tensor": lambda: fused_dense_func(X, W1, 1.0),
    r"x must be floating point \(..., in_features\), got torch.int64": lambda: fused_dense_func(
        X.long(), W1
    ),
    r"weight must be .* with 4 in_features, got \(2, 5\)": lambda: fused_dense_func(X, W2),
    r"weight must be .* with 4 in_features, got \(5,\)": lambda: fused_dense_func(X, B1),
    r"bias must be \(5,\) as weight is \(5, 4\), got \(2,\)": lambda: fused_dense_func(X, W1, B2),
    "x and weight must have the same dtype where autocast is off": lambda: fused_dense_func(
        X, W1.half()
    ),
    r"weight2 must be .* with 5 in_features": lambda: fused_mlp_func(X, W1, W1),
    r"bias2 must be \(2,\)": lambda: fused_mlp_func(X, W1, W2, B1, B1),
    "x and bias2 must have the same dtype": lambda: fused_mlp_func(X, W1, W2, B1, B2.bfloat16()),
    "activation must be one of 'gelu_approx', 'relu', 'sqrelu', got 'gelu'": lambda: FusedMLP(
        4, activation="gelu"
    ),
    "activation must be one of .* got None": lambda: fused_mlp_func(X, W1, W2, activation=None),
    "checkpoint_lvl must be one of 0, 1, 2, got 3": lambda: ParallelFusedMLP(4, checkpoint_lvl=3),
    "heuristic must be one of 'auto', -1, 0, .*, got 'best'": lambda: FusedMLP(4, heuristic="best"),
    "activation must be one of 'id', .* got 'silu'": lambda: triton_linear_act(
        X, W1, activation="silu"
    ),
    r"weight must be .* with grad_output": lambda: triton_dgrad_act(X, W1),
    r"activation 'relu' needs act_input \(3, 4\), got None": lambda: triton_dgrad_act(
        randn(3, 5), W1, "relu"
    ),
    r"out_features \(5\) must be a multiple of 2": lambda: ColumnParallelLinear(
        4, 5, None, multiple_of=2
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD_CALLS[message]()


def test_modules_are_copied():
    module = FusedMLP(16, 24, 12)
    x = randn(5, 16)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
