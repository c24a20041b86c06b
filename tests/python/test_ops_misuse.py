"""Calls of fused operators that must raise, or do what they say, rather than give nonsense."""

from __future__ import annotations

import pytest
import torch

from flash_attn.losses.cross_entropy import linear_cross_entropy_loss
from flash_attn.modules.block import Block
from flash_attn.ops import activations
from flash_attn.ops import layer_norm as by_rows
from flash_attn.ops.triton import layer_norm as norms
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

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
