"""Calls of fused operators that must raise, or do what they say, rather than give nonsense."""

from __future__ import annotations

import pytest
import torch
from module_decoding import InferenceParams

from flash_attn.losses.cross_entropy import linear_cross_entropy_loss
from flash_attn.modules.block import Block
from flash_attn.modules.embedding import GPT2Embeddings
from flash_attn.modules.mha import MHA
from flash_attn.ops import activations
from flash_attn.ops import layer_norm as by_rows
from flash_attn.ops.fused_dense import fused_mlp_func
from flash_attn.ops.triton import layer_norm as norms
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.linear import triton_linear_act

randn = torch.randn


def of_activation(x):
    return activations.swiglu(x, x)


def of_norm(x):
    return norms.rms_norm_fn(x, None, None)


OPERATORS = [of_activation, of_norm]


@pytest.mark.parametrize("function", OPERATORS)
def test_no_tangent_is_lost(function):
    x = randn(2, 4)
    with pytest.raises(RuntimeError, match=r"no derivative by torch\.func"):
        torch.func.jvp(function, (x,), (randn(2, 4),))
    with pytest.raises(RuntimeError, match=r"no derivative by torch\.func"):
        torch.func.jacfwd(function)(x)


@pytest.mark.parametrize("function", [*OPERATORS, activations.SwiGLUFunction.apply])
def test_gradient_penalty_is_refused(function):
    x = randn(3, 8, requires_grad=True)
    out = function(x, x) if function == activations.SwiGLUFunction.apply else function(x)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (out.sum() + dx.square().sum()).backward()


def test_backward_functions_are_not_constants():
    x = randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="activation_bwd has no second derivative"):
        activations.gelu_bwd(randn(3, 8), x).sum().backward()


def test_linear_of_a_norm_is_refused_a_second_time():
    x, weight = randn(3, 8, requires_grad=True), randn(5, 8, requires_grad=True)
    out = norms.layer_norm_linear_fn(x, torch.ones(8), None, weight, None)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.square().sum().backward()


@pytest.mark.parametrize(
    "buffer",
    [lambda: torch.zeros(4, 6).t(), lambda: torch.zeros(6, 8)[:, :4]],
    ids=["transposed", "strided"],
)
def test_buffers_of_the_caller_are_written_to(buffer):
    x, out, residual_out = randn(6, 4), buffer(), buffer()
    expected = norms.layer_norm_fn(x, None, None, residual=x, prenorm=True)
    options = {"out": out, "residual_out": residual_out}
    actual = norms.layer_norm_fn(x, None, None, residual=x, prenorm=True, **options)
    assert actual[0] is out and actual[1] is residual_out
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a.float(), e)
    with pytest.raises(ValueError, match="out must have the shape"):
        norms.layer_norm_fn(x, None, None, out=torch.zeros(4, 6))


def test_negative_view_into_a_buffer():
    x = torch._neg_view(randn(6, 4))
    out = torch.zeros(6, 4)
    norms.layer_norm_fn(x, None, None, out=out)
    torch.testing.assert_close(out, norms.layer_norm_fn(x.clone(), None, None))


def test_summands_have_one_shape():
    x = randn(2, 3, 4)
    for name in ("residual", "x1"):
        with pytest.raises(ValueError, match=rf"{name} must have the shape \(2, 3, 4\)"):
            norms.layer_norm_fn(x, None, None, **{name: randn(3, 2, 4)})
    with pytest.raises(ValueError, match=r"rowscale must have the shape \(2, 3\)"):
        norms.layer_norm_fn(x, None, None, rowscale=randn(3, 2))


def test_rows_of_a_subset_are_integers_of_any_size():
    options = {"weight": torch.ones(4), "bias": None, "dropout_p": 0.0, "epsilon": 1e-5}

    def norm(subset):
        return by_rows.dropout_add_layer_norm_subset(randn(6, 4), None, **options, x0_subset=subset)

    with pytest.raises(RuntimeError, match="x0_subset"):
        norm(torch.tensor([2**32 + 1, 0]))
    with pytest.raises(TypeError, match="integers"):
        norm(torch.tensor([1.7, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 3])
def test_mean_of_no_losses(dtype, rows):
    hidden, weight = (randn(n, 4).to(dtype).requires_grad_() for n in (rows, 7))
    loss = linear_cross_entropy_loss(hidden, weight, torch.full((rows,), -100))
    assert loss.isnan()
    loss.backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_linear_of_one_normed_row():
    x = randn(4, requires_grad=True)
    weight = randn(3, 4, requires_grad=True)
    out = norms.layer_norm_linear_fn(x, torch.ones(4), None, weight, None)
    grads = torch.autograd.grad(out.sum(), (x, weight))
    expected = torch.nn.functional.layer_norm(x, (4,), eps=1e-6) @ weight.t()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (x, weight)))


def test_a_fused_block_does_not_forget_the_norms_dropout():
    def norm(dim):
        return norms.RMSNorm(dim, dropout_p=0.5)

    with pytest.raises(TypeError, match="without dropout"):
        Block(64, norm_cls=norm, fused_dropout_add_ln=True)


def test_log_sums_are_those_of_the_labels():
    logits, labels = randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    lse = logits.logsumexp(-1)
    expected = cross_entropy_loss(logits, labels)[0]
    for shape in ((2, 3), (6,)):
        actual = cross_entropy_loss(logits, labels, precomputed_lse=lse.reshape(shape))[0]
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="precomputed_lse must have the shape"):
        cross_entropy_loss(logits, labels, precomputed_lse=lse.reshape(3, 2))


def test_linear_loss_on_two_devices():
    weight = randn(7, 5).to("meta")
    with pytest.raises(ValueError, match="weight must be on hidden's device, cpu, got meta"):
        linear_cross_entropy_loss(randn(3, 5), weight, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("norm", [norms.layer_norm_fn, norms.rms_norm_fn])
@pytest.mark.parametrize("scale", [1e30, -3e37, 1e-10, 1.0])
def test_norm_of_rows_whose_squares_overflow(norm, scale, operator_isa):
    x = (torch.randn(3, 37, generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()
    weight, dout = randn(37), randn(3, 37)
    out = norm(x, weight, None)
    (dx,) = torch.autograd.grad(out, x, dout)
    wide = x.detach().double().requires_grad_()
    centred = wide - (wide.mean(-1, keepdim=True) if norm is norms.layer_norm_fn else 0.0)
    expected = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    (expected_dx,) = torch.autograd.grad(expected, wide, dout.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    bound = {"rtol": 1e-5, "atol": 1e-5 * expected_dx.abs().max().item()}
    torch.testing.assert_close(dx.double(), expected_dx, **bound)


def test_norm_of_equal_or_infinite_large_rows(operator_isa):
    assert not norms.layer_norm_fn(torch.full((1, 9), 3e38), None, None).any()
    x = torch.tensor([[torch.inf, 1.0, 2.0], [1.0, 2.0, 4.0]])
    out = norms.layer_norm_fn(x, None, None)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_dropout_of_a_norm_under_vmap_wants_masks_of_its_own():
    def norm(x):
        return norms.rms_norm_fn(x, None, None, dropout_p=0.5)

    x = randn(1, 64).expand(3, 2, 64)
    for randomness in ("error", "same"):
        with pytest.raises(RuntimeError, match=r"a norm with dropout needs .*'different'"):
            torch.vmap(norm, randomness=randomness)(x)
    out = torch.vmap(norm, randomness="different")(x)
    assert not torch.equal(out[0] == 0, out[1] == 0)


def test_cross_entropy_in_place_is_compiled_whole():
    logits, labels = randn(5, 7), torch.arange(5)

    def loss(logits):
        x = logits * 1.0
        return cross_entropy_loss(x, labels, inplace_backward=True)[0].sum()

    def gradient(function):
        x = logits.clone().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(loss))


@pytest.mark.parametrize("activation", [[], {}, None, 3, "tanh"])
def test_activations_are_named(activation):
    x, weight = randn(2, 4), randn(4, 4)
    for call in (
        lambda: activations.gated(x, x, activation=activation),
        lambda: fused_mlp_func(x, weight, weight, activation=activation),
        lambda: triton_linear_act(x, weight, activation=activation),
    ):
        with pytest.raises(ValueError, match=r"^activation must be one of"):
            call()


def test_dtypes_of_results_are_named():
    for out_dtype, error in (("half", TypeError), (torch.int32, ValueError)):
        with pytest.raises(error, match=r"^out_dtype must be"):
            norms.layer_norm_fn(randn(2, 4), None, None, out_dtype=out_dtype)


@pytest.mark.parametrize("subset", [0, None, torch.tensor(1), "last"])
def test_subset_of_tokens_keeps_their_dimension(subset):
    module = MHA(8, 2, cross_attn=True)
    if subset is None:
        assert module(randn(1, 3, 8)).shape == (1, 3, 8)
        return
    with pytest.raises(TypeError, match=r"^mixer_subset must be a slice, a list or a 1-dim tensor"):
        module(randn(1, 3, 8), mixer_subset=subset)


@pytest.mark.parametrize(
    ("name", "ids"), [("input_ids", [[0, 1], [2, 9]]), ("position_ids", [[0, 1], [0, -1]])]
)
def test_ids_out_of_range_are_named(name, ids):
    module = GPT2Embeddings(8, 5, 4)
    arguments = {"input_ids": torch.zeros(2, 2, dtype=torch.int64), name: torch.tensor(ids)}
    with pytest.raises(
        IndexError, match=rf"^{name} must be 0 to .*{name}\[1\]\[1\] is {ids[1][1]}"
    ):
        module(**arguments)


def test_lengths_of_a_cache_are_not_negative():
    module = MHA(8, 2, causal=True, layer_idx=0)
    lengths = torch.tensor([1, -1], dtype=torch.int32)
    params = InferenceParams(4, 2, lengths_per_sample=lengths)
    params.seqlen_offset = 1
    with pytest.raises(ValueError, match=r"lengths_per_sample must not be negative, got -1 for se"):
        module(randn(2, 1, 8), inference_params=params)


@pytest.mark.parametrize("activation", ["gelu_approx", "relu", "sqrelu"])
def test_gradient_of_the_first_bias_is_of_the_pass_of_the_activation(activation, monkeypatch):
    calls = []
    kernel = activations._backward

    def backward(*args):
        calls.append(args[-1])
        return kernel(*args)

    monkeypatch.setattr(activations, "_backward", backward)
    x, weight = randn(6, 4), randn(4, 4)
    bias = randn(4).requires_grad_()
    out = fused_mlp_func(x, weight, weight, bias, activation=activation)
    (actual,) = torch.autograd.grad(out.sum(), bias)
    pre_act = (x @ weight.t() + bias).detach().requires_grad_()
    function = {
        "gelu_approx": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "sqrelu": lambda x: torch.relu(x).square(),
    }[activation]
    (expected,) = torch.autograd.grad((function(pre_act) @ weight.t()).sum(), pre_act)
    torch.testing.assert_close(actual, expected.sum(0))
    assert calls == [True]
