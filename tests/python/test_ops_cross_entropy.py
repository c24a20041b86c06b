"""Cross entropy on the CPU: the function, the module, and their operators."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import (
    ALL_OPTIONS,
    BF16,
    DTYPES,
    FP32,
    OPTIONS,
    check,
    cross_entropy,
    logits_and_labels,
)
from torch.utils.checkpoint import checkpoint

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.cross_entropy import Options, gradient, losses_and_state
from flash_attn.ops.triton import cross_entropy as face
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

ONES = Options(0.0, 1.0, 0.0, -100, 0, 0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [1, 7, 8, 1000, 4097])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradient(operator_isa, dtype, classes, options):
    logits, labels = logits_and_labels(13, classes, dtype)
    check(cross_entropy_loss, logits, labels, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_at_a_distance_between_what_must_not_be_read(operator_isa, dtype):
    logits, labels = logits_and_labels(6, 37, dtype)
    buffer = torch.full((6, 64), math.nan, dtype=dtype)
    view = buffer[:, 5:42]
    view.copy_(logits)
    check(lambda x, y, **o: cross_entropy_loss(_in(buffer, x), y, **o), logits, labels)
    assert buffer.isnan().sum() == 6 * (64 - 37)


def _in(buffer, logits):
    """The columns 5, ... of buffer, with the gradient of logits, which they are equal to."""

    class Placed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return buffer[:, 5 : 5 + x.shape[1]]

        @staticmethod
        def backward(ctx, dx):
            return dx

    return Placed.apply(logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_at_a_distance(dtype):
    logits, labels = logits_and_labels(9, 30, dtype)
    check(lambda x, y, **o: cross_entropy_loss(x.t().contiguous().t(), y, **o), logits, labels)


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=str)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_far_from_0(operator_isa, offset, options):
    """As accurate as PyTorch's, which subtracts the maximum first."""
    logits, labels = logits_and_labels(20, 3000)
    options = {**options, "lse_square_scale": 0.0}
    logits, options["logit_scale"] = logits + offset, 1.0
    dlosses = torch.ones(20)
    mine = logits.clone().requires_grad_()
    losses, _ = cross_entropy_loss(mine, labels, **options)
    losses.backward(dlosses)
    exact = logits.double().requires_grad_()
    expected, _ = cross_entropy(exact, labels, **options)
    expected.backward(dlosses.double())
    assert (losses - expected).abs().max() < 1e-5
    assert (mine.grad - exact.grad).abs().max() < 1e-6


@pytest.mark.parametrize("step", [1.0, 200.0])
def test_maximum_that_rises_along_the_row(operator_isa, step):
    """By more than exp has a number for."""
    logits, labels = logits_and_labels(6, 9000)
    check(cross_entropy_loss, logits + step * torch.arange(9000).div(1000).floor(), labels)


def test_infinite_logits_and_nan(operator_isa):
    """As PyTorch has them; classes without a chance have the probability 0."""
    logits, labels = logits_and_labels(8, 3000)
    labels = torch.randint(0, 3000, (8,))
    logits[0, :2500] = -math.inf
    logits[1, labels[1]] = -math.inf
    logits[2] = -math.inf
    logits[3, 7] = math.inf
    logits[4, 2999] = math.nan
    for smoothing in (0.0, 0.1):
        mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        losses, _ = cross_entropy_loss(mine, labels, label_smoothing=smoothing)
        expected = F.cross_entropy(theirs, labels, reduction="none", label_smoothing=smoothing)
        losses.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(losses, expected, equal_nan=True)
        torch.testing.assert_close(mine.grad, theirs.grad, equal_nan=True)


def test_ignored_rows_are_not_read(operator_isa):
    logits, labels = logits_and_labels(9, 100, ignore_index=3)
    logits[labels == 3] = math.nan
    logits.requires_grad_()
    losses, z_losses = cross_entropy_loss(logits, labels, ignore_index=3, lse_square_scale=0.1)
    losses.sum().backward()
    ignored = labels == 3
    assert (losses[ignored] == 0).all()
    assert (z_losses[ignored] == 0).all()
    assert (logits.grad[ignored] == 0).all()
    assert losses.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 3, 7), (4,)])
def test_shapes(shape):
    logits = torch.randn(shape, requires_grad=True)
    labels = torch.full(shape[:-1], 0 if shape[-1] else -100, dtype=torch.int32)
    losses, z_losses = cross_entropy_loss(logits, labels)
    assert losses.shape == z_losses.shape == labels.shape
    losses.sum().backward()
    expected = -logits.log_softmax(-1)[..., 0] if shape[-1] else torch.zeros(shape[:-1])
    torch.testing.assert_close(losses, expected)


def test_labels_of_32_bits_and_at_a_distance():
    logits, labels = logits_and_labels(9, 50)
    expected = cross_entropy_loss(logits, labels)[0]
    assert cross_entropy_loss(logits, labels.int())[0].equal(expected)
    assert cross_entropy_loss(logits, labels.repeat_interleave(2)[::2])[0].equal(expected)


def test_results_do_not_depend_on_the_number_of_threads(operator_isa, restore_threads):
    logits, labels = logits_and_labels(50, 5000, BF16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x = logits.clone().requires_grad_()
        losses, _ = cross_entropy_loss(x, labels, **ALL_OPTIONS)
        losses.sum().backward()
        results.append((losses, x.grad))
    for losses, grad in results[1:]:
        assert losses.equal(results[0][0])
        assert grad.equal(results[0][1])


@pytest.mark.parametrize("cuts", [(0, 100), (0, 1, 100), (0, 30, 31, 77, 100)])
def test_classes_in_chunks(operator_isa, cuts):
    """A state that has seen some classes goes on with the next ones."""
    logits, labels = logits_and_labels(12, 100)
    logits[3] = logits[3].sort().values  # a larger maximum in every chunk
    logits[5, :50] = -math.inf
    options = ONES._replace(num_classes=100, label_smoothing=0.1, lse_square_scale=0.01)
    whole = losses_and_state(logits, labels, options)
    state = None
    for start, end in zip(cuts, cuts[1:]):
        of_chunk = options._replace(class_start=start)
        losses, z_losses, state = losses_and_state(
            logits[:, start:end], labels, of_chunk, before=state, classes_before=start
        )
    torch.testing.assert_close(losses, whole[0])
    torch.testing.assert_close(z_losses, whole[1])
    torch.testing.assert_close(state, whole[2])
    dlosses = torch.randn(12)
    dlogits = [
        gradient(dlosses, logits[:, a:b], labels, state, options._replace(class_start=a))
        for a, b in zip(cuts, cuts[1:])
    ]
    expected = gradient(dlosses, logits, labels, whole[2], options)
    torch.testing.assert_close(torch.cat(dlogits, 1), expected)


def test_precomputed_lse(operator_isa):
    logits, labels = logits_and_labels(9, 300)
    mine, expected = (logits.clone().requires_grad_() for _ in range(2))
    lse = logits.logsumexp(1)
    results = cross_entropy_loss(mine, labels, precomputed_lse=lse, lse_square_scale=0.1)
    wanted = cross_entropy_loss(expected, labels, lse_square_scale=0.1)
    torch.testing.assert_close(results, wanted)
    results[0].sum().backward()
    wanted[0].sum().backward()
    torch.testing.assert_close(mine.grad, expected.grad)
    for options in ({"logit_scale": 2.0}, {"label_smoothing": 0.1}):
        with pytest.raises(RuntimeError, match="precomputed_lse takes logit_scale = 1 and label_s"):
            cross_entropy_loss(logits, labels, precomputed_lse=lse, **options)


# ------------------------------------------------------------------------------------------------
# In place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_over_the_logits(operator_isa, dtype):
    def in_place(logits, labels, **options):
        return cross_entropy_loss(logits * 1, labels, inplace_backward=True, **options)

    logits, labels = logits_and_labels(13, 77, dtype)
    check(in_place, logits, labels, **ALL_OPTIONS)


def test_gradient_is_where_the_logits_were():
    logits, labels = logits_and_labels(4, 50)
    seen = []
    x = logits.requires_grad_() * 1
    x.register_hook(lambda dx: seen.append(dx.data_ptr()))
    losses, _ = cross_entropy_loss(x, labels, inplace_backward=True)
    losses.sum().backward()
    assert seen == [x.data_ptr()]


def test_second_use_after_a_backward_in_place_raises():
    logits, labels = logits_and_labels(4, 50)
    x = logits.requires_grad_() * 1
    losses, _ = cross_entropy_loss(x, labels, inplace_backward=True)
    others, _ = cross_entropy_loss(x, labels)
    losses.sum().backward(retain_graph=True)
    for again in (losses, others):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.sum().backward(retain_graph=True)


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("label", [-1, 50, -101, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_label_out_of_range(label, dtype):
    logits, labels = logits_and_labels(9, 50)
    labels[4] = labels[7] = label
    sentence = f"labels must be 0 to 49 or ignore_index = -100, but that of row 4 is {label}"
    with pytest.raises(RuntimeError, match=sentence):
        cross_entropy_loss(logits, labels.to(dtype))


def test_nothing_is_written_for_a_label_out_of_range():
    logits, labels = logits_and_labels(9, 50)
    options = ONES._replace(num_classes=50)
    state = losses_and_state(logits, labels, options)[2]
    labels[8] = 50
    before = logits.clone()
    with pytest.raises(RuntimeError, match="that of row 8 is 50"):
        gradient(torch.ones(9), logits, labels, state, options, in_place=True)
    assert logits.equal(before)


def test_bad_states():
    logits, labels = logits_and_labels(9, 50)
    options = ONES._replace(num_classes=50)
    state = losses_and_state(logits, labels, options)[2]
    shifted = torch.empty(37)[1:].view(9, 4).copy_(state)
    for wrong, sentence in (
        (shifted, "state must be aligned to 16 bytes"),
        (state[1:], r"state must have shape \(rows, 4\) = \(9, 4\), got \(8, 4\)"),
        (state.t().contiguous().t(), "state must be contiguous"),
        (state.double(), "state must have dtype fp32"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            gradient(torch.ones(9), logits, labels, wrong, options)


def test_classes_outside_of_all():
    logits, labels = logits_and_labels(9, 50)
    for wrong in ({"class_start": 1}, {"class_start": -1}, {"num_classes": 49}):
        options = ONES._replace(num_classes=50)._replace(**wrong)
        with pytest.raises(RuntimeError, match="of logits must be among num_classes = "):
            losses_and_state(logits, labels, options)


BAD_CALLS = {
    "logits must be a torch.Tensor, got list": lambda x, y: ([1.0], y),
    "labels must be a torch.Tensor, got NoneType": lambda x, y: (x, None),
    r"labels must have the shape of logits .*, \(9,\), got \(8,\)": lambda x, y: (x, y[1:]),
    "logits must be fp16, bf16 or fp32: logits has torch.float64": lambda x, y: (x.double(), y),
    "labels must have dtype int32 or int64, got torch.uint8": lambda x, y: (x, y.abs().byte()),
    r"precomputed_lse must have the shape of labels, \(9,\), got \(3,\)": lambda x, y: (
        x, y, x[0, :3]
    ),
    "precomputed_lse must have dtype fp32": lambda x, y: (x, y, x[:, 0].half()),
    "label_smoothing must be 0 to 1, got 1.5": lambda x, y: (x, y, None, 1.5),
    "logit_scale must be a finite number, got inf": lambda x, y: (x, y, None, 0.0, math.inf),
    "lse_square_scale must be a number, got str": lambda x, y: (x, y, None, 0.0, 1.0, "much"),
    "ignore_index must be an int or a torch.Tensor, got float": lambda x, y: (
        x, y, None, 0.0, 1.0, 0.0, 0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD_CALLS)
def test_bad_arguments(sentence):
    logits, labels = logits_and_labels(9, 50)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=sentence):
        cross_entropy_loss(*BAD_CALLS[sentence](logits, labels))


# ------------------------------------------------------------------------------------------------
# PyTorch's modes


def test_operators_by_pytorchs_checks():
    logits, labels = logits_and_labels(5, 40)
    options = ONES._replace(num_classes=40)
    losses, _, state = losses_and_state(logits, labels, options)
    ops = torch.ops.flash_attn
    torch.library.opcheck(ops.cross_entropy_fwd, (logits, labels, None, None, *options, 0))
    torch.library.opcheck(ops.cross_entropy_fwd, (logits[:, :0], labels, None, state, *options, 40))
    arguments = losses, logits, labels, state, *options
    torch.library.opcheck(ops.cross_entropy_bwd, arguments)
    torch.library.opcheck(ops.cross_entropy_bwd_, arguments)


def test_compiled():
    def loss_of(logits, labels):
        return CrossEntropyLoss(**ALL_OPTIONS)(logits * 2, labels)

    logits, labels = logits_and_labels(12, 70, BF16)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    results = []
    for f in (loss_of, compiled):
        x = logits.clone().requires_grad_()
        loss = f(x, labels)
        loss.backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


def test_autocast_and_checkpointing():
    gen = torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(8, 16, generator=gen), torch.randint(0, 50, (8,), generator=gen)
    layer = torch.nn.Linear(16, 50)
    loss_of = CrossEntropyLoss()

    def step(hidden):
        logits = layer(hidden)
        assert logits.dtype == BF16
        return loss_of(logits, labels)

    gradients = []
    for call in (step, lambda x: checkpoint(step, x, use_reentrant=False)):
        x = hidden.clone().requires_grad_()
        with torch.autocast("cpu", BF16):
            loss = call(x)
        assert loss.dtype == FP32
        loss.backward()
        gradients.append(x.grad)
    assert gradients[0].equal(gradients[1])


def test_second_derivative_is_refused():
    logits, labels = logits_and_labels(4, 10)
    x = logits.requires_grad_()
    losses, _ = cross_entropy_loss(x, labels)
    (dlogits,) = torch.autograd.grad(
        losses.square().sum(), x, create_graph=False, retain_graph=True
    )
    assert not dlogits.requires_grad
    (dlogits,) = torch.autograd.grad(losses.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (x.square().sum() + dlogits.square().sum()).backward()


def test_z_losses_have_no_gradient():
    logits, labels = logits_and_labels(4, 10)
    losses, z_losses = face.CrossEntropyLoss.apply(logits.requires_grad_(), labels, None, 0, 1, 0.1)
    assert losses.requires_grad
    assert not z_losses.requires_grad


# ------------------------------------------------------------------------------------------------
# The module


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module(reduction):
    logits, labels = logits_and_labels(20, 60, ignore_index=7)
    module = CrossEntropyLoss(
        ignore_index=7, reduction=reduction, label_smoothing=0.2, return_z_loss=True,
        lse_square_scale=0.1,
    )  # fmt: skip
    loss, z_loss = module(logits, labels)
    expected = F.cross_entropy(
        logits, labels, ignore_index=7, reduction=reduction, label_smoothing=0.2
    )
    torch.testing.assert_close(loss - z_loss, expected)
    module.return_z_loss = False
    assert module(logits, labels).equal(loss)


def test_mean_of_nothing_is_nan():
    logits, labels = torch.randn(3, 5), torch.full((3,), -100)
    assert CrossEntropyLoss()(logits, labels).isnan()


def test_module_refuses_other_reductions():
    with pytest.raises(NotImplementedError, match="reduction must be one of"):
        CrossEntropyLoss(reduction="max")
