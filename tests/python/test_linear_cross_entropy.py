"""linear_cross_entropy_loss against a linear layer and the cross entropy of its results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import ALL_OPTIONS, BF16, DTYPES, FP16, FP32, cross_entropy
from reference import assert_attention_close

from flash_attn.losses.cross_entropy import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    linear_cross_entropy_loss,
)
from flash_attn.ops.linear_cross_entropy import rows_of_chunk, sums_in_fp32

NAMES = "hidden", "weight", "bias"


def layer(rows=150, features=24, classes=301, dtype=FP32, seed=0):
    """hidden, weight, bias; labels, of which every third is ignored."""
    gen = torch.Generator().manual_seed(seed)
    shapes = (rows, features), (classes, features), (classes,)
    tensors = [torch.randn(s, generator=gen).to(dtype) for s in shapes]
    tensors[1] *= 0.3
    labels = torch.randint(0, classes, (rows,), generator=gen)
    labels[1::3] = -100
    return tensors, labels


def unfused(dtype, reduction, **options):
    """The loss by plain PyTorch, logits in ``dtype``, the rest in fp32 at least."""

    def loss_of(hidden, weight, labels, bias=None):
        logits = F.linear(hidden, weight, bias)
        losses, _ = cross_entropy(logits if dtype == torch.float64 else logits.float(), labels,
                                  **options)  # fmt: skip
        if reduction == "none":
            return losses
        return losses.sum() / ((labels != -100).sum() if reduction == "mean" else 1)

    return loss_of


def loss_and_gradients(function, tensors, labels, dtype):
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    loss = function(leaves[0], leaves[1], labels, *leaves[2:])
    dloss = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss.dtype)
    gradients = torch.autograd.grad(loss, leaves, dloss)
    return {"loss": loss.detach(), **dict(zip(NAMES, gradients))}


def check(tensors, labels, reduction="mean", factor=2, sum_in_fp32=None, **options):
    dtype = tensors[0].dtype

    def fused(*arguments):
        return linear_cross_entropy_loss(
            *arguments, reduction=reduction, sum_in_fp32=sum_in_fp32, **options
        )

    actual = loss_and_gradients(fused, tensors, labels, dtype)
    exact, plain = (
        loss_and_gradients(unfused(d, reduction, **options), tensors, labels, d)
        for d in (torch.float64, dtype)
    )
    assert actual["loss"].dtype == FP32
    for name in exact:
        of_name = factor if name == "weight" else 2
        assert_attention_close(actual[name], exact[name], plain[name], name, factor=of_name)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(operator_isa, dtype, reduction, with_bias):
    tensors, labels = layer(dtype=dtype)
    options = {} if with_bias else ALL_OPTIONS
    check(tensors[: 2 + with_bias], labels, reduction, sum_in_fp32=True, **options)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_sums_in_the_weights_dtype(dtype):
    """Twelve chunks, each a rounding: 1.8 times the error on average, 3 times at most."""
    tensors, labels = layer(rows=12 * 32, dtype=dtype)
    check(tensors, labels, factor=4, sum_in_fp32=False)


@pytest.mark.parametrize("rows", [0, 1, 31, 65])
def test_rows(rows):
    tensors, labels = layer(rows=rows)
    check(tensors, labels, "sum")


def test_chunks():
    for rows in (1, 31, 32, 64, 100, 1000, 8192):
        for in_fp32 in (False, True):
            size = rows_of_chunk(rows, in_fp32)
            assert 1 <= size <= max(rows, 1)
            if rows >= 1000:
                assert size <= (0.05 if in_fp32 else 0.1) * rows


def peak_without_scratch(changes):
    """The most bytes allocated at once. What is freed before anything else is allocated is not
    counted: with AMX, oneDNN's products of bf16 take such scratch, up to 150 KB here."""
    peak = allocated = 0
    for size, after in zip(changes, [*changes[1:], 0]):
        allocated += size
        if size + after != 0:
            peak = max(peak, allocated)
    return peak


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1024, 4096])
def test_memory(dtype, rows):
    """Beside the results, a tenth of what the logits would take."""
    features, classes = 32, 512
    tensors, labels = layer(rows, features, classes, dtype)
    leaves = [x.requires_grad_() for x in tensors[:2]]
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy_loss(*leaves, labels).backward()
    events = profile.profiler.kineto_results.events()
    peak = peak_without_scratch([e.nbytes() for e in events if e.name() == "[memory]"])
    gradients = sum(x.numel() for x in leaves) * dtype.itemsize
    of_rows = 4 * rows * 20  # losses, their weights, states and the like
    assert peak <= gradients + of_rows + 0.1 * rows * classes * dtype.itemsize
    assert peak >= gradients


def test_fp32_sums_where_they_are_small():
    hidden, weight = torch.empty(0, 64, dtype=BF16), torch.empty(100, 64, dtype=BF16)
    assert not sums_in_fp32(hidden.new_empty(2559, 64), weight)
    assert sums_in_fp32(hidden.new_empty(2560, 64), weight)


@pytest.mark.parametrize("frozen", NAMES)
def test_what_needs_no_gradient_has_none(frozen):
    tensors, labels = layer()
    leaves = dict(zip(NAMES, tensors))
    for name, x in leaves.items():
        x.requires_grad_(name != frozen)
    linear_cross_entropy_loss(labels=labels, **leaves).backward()
    expected = {n: x.detach().clone().requires_grad_() for n, x in leaves.items()}
    unfused(FP32, "mean")(labels=labels, **expected).backward()
    for name, x in leaves.items():
        assert (x.grad is None) == (name == frozen)
        if name != frozen:
            torch.testing.assert_close(x.grad, expected[name].grad)


def test_without_gradients():
    tensors, labels = layer()
    expected = unfused(FP32, "mean")(*tensors[:2], labels)
    tensors[1].requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy_loss(*tensors[:2], labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_small_gradients_in_fp16():
    """The mean's are scaled up only after the loss, as GradScaler does."""
    tensors, labels = layer(rows=64, classes=2000, dtype=FP16)
    scale = 2.0**12
    leaves = [x.requires_grad_() for x in tensors[:2]]
    (linear_cross_entropy_loss(*leaves, labels) * scale).backward()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    (unfused(torch.float64, "mean")(*exact, labels) * scale).backward()
    for x, y in zip(leaves, exact):
        assert (x.grad - y.grad).abs().max() < 4e-3 * y.grad.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(reduction):
    """Raises, or gives the same gradient; never another one."""
    tensors, labels = layer()
    hidden = tensors[0].requires_grad_()
    loss = linear_cross_entropy_loss(hidden, tensors[1], labels, reduction=reduction).sum() * 3
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    if reduction == "mean":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, hidden)
    else:
        assert torch.autograd.grad(loss, hidden)[0].equal(first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction):
    tensors, labels = layer()

    def loss_of(hidden, weight, bias):
        return linear_cross_entropy_loss(hidden * 2, weight, labels, bias, reduction=reduction)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    results = []
    for f in (loss_of, compiled):
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss = f(*leaves)
        loss.sum().backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(results[0], results[1])


def test_operator_by_pytorchs_checks():
    tensors, labels = layer(rows=40)
    numbers = (0.1, 0.7, 0.01, -100, 0, 301)
    arguments = *tensors[:2], labels, tensors[2], torch.ones(40), [True, False, True], False, ""
    torch.library.opcheck(torch.ops.flash_attn.linear_cross_entropy, (*arguments, *numbers))


def test_autocast():
    tensors, labels = layer()
    leaves = [x.requires_grad_() for x in tensors[:2]]
    with torch.autocast("cpu", BF16):
        loss = linear_cross_entropy_loss(*leaves, labels)
        expected = CrossEntropyLoss()(F.linear(*leaves), labels)
    loss.backward()
    assert loss.dtype == leaves[0].grad.dtype == leaves[1].grad.dtype == FP32
    torch.testing.assert_close(loss, expected)


def test_module():
    tensors, labels = layer(rows=6)
    hidden = tensors[0].view(2, 3, -1)
    module = LinearCrossEntropyLoss(reduction="none", lse_square_scale=0.1, return_z_loss=True)
    losses, z_losses = module(hidden, tensors[1], labels.view(2, 3), tensors[2])
    logits = F.linear(tensors[0], tensors[1], tensors[2])
    expected = cross_entropy(logits, labels, lse_square_scale=0.1)
    torch.testing.assert_close((losses, z_losses), tuple(x.view(2, 3) for x in expected))


BAD_CALLS = {
    "hidden must be a torch.Tensor, got NoneType": lambda h, w, y, b: (None, w, y),
    r"\(classes, features\), got \(150, 24\) and \(301, 23\)": lambda h, w, y, b: (h, w[:, 1:], y),
    r"labels must have the shape of .* \(150,\), got \(149,\)": lambda h, w, y, b: (h, w, y[1:]),
    r"bias must have the shape \(301,\)": lambda h, w, y, b: (h, w, y, b[1:]),
    "that of row 0 is 301": lambda h, w, y, b: (h, w, y.masked_fill(y >= 0, 301)),
}


@pytest.mark.parametrize("sentence", BAD_CALLS)
def test_bad_arguments(sentence):
    tensors, labels = layer()
    labels[0] = 1
    with pytest.raises((TypeError, ValueError, RuntimeError), match=sentence):
        linear_cross_entropy_loss(*BAD_CALLS[sentence](*tensors[:2], labels, tensors[2]))


def test_labels_are_checked_before_any_product():
    tensors, labels = layer()
    labels[149] = 301
    with pytest.raises(RuntimeError, match="that of row 149 is 301"):
        linear_cross_entropy_loss(*tensors[:2], labels)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(reduction):
    hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (3, 6))
    loss = linear_cross_entropy_loss(hidden, weight, torch.tensor([0, 5, 1]), reduction=reduction)
    (dhidden,) = torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (hidden.square().sum() + dhidden.square().sum()).backward()
