"""The CUDA kernels of cross entropy on the emulated GPU."""

from __future__ import annotations

import math

import pytest
import torch
from backends import needs_emulator
from cross_entropy_cases import ALL_OPTIONS, BF16, DTYPES, FP32, check, logits_and_labels

import flash_attn
from flash_attn.losses.cross_entropy import linear_cross_entropy_loss
from flash_attn.ops.cross_entropy import Options, gradient, losses_and_state
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

pytestmark = needs_emulator

OF_1000 = Options(0.1, 0.7, 0.01, -100, 0, 1000)


@pytest.fixture(autouse=True)
def gpu():
    """For the backward, which autograd calls."""
    with flash_attn.emulator():
        yield


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=str)
@pytest.mark.parametrize("classes", [1, 7, 8, 1000, 2053])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradient(dtype, classes, options):
    check(cross_entropy_loss, *logits_and_labels(5, classes, dtype), **options)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_sizes(shape):
    logits = torch.randn(shape, requires_grad=True)
    losses, _ = cross_entropy_loss(logits, torch.full(shape[:1], -100))
    losses.sum().backward()
    assert (losses == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_between_what_must_not_be_touched(dtype):
    """Rows at any alignment, in a tensor whose other elements are NaN."""
    logits, labels = logits_and_labels(4, 1000, dtype)
    labels = labels.clamp(min=0)
    expected = losses_and_state(logits, labels, OF_1000)
    wanted = gradient(torch.ones(4), logits, labels, expected[2], OF_1000)
    buffer = torch.full((4, 1027), math.nan, dtype=dtype)
    view = buffer[:, 3:1003]
    view.copy_(logits)
    results = losses_and_state(view, labels, OF_1000)
    torch.testing.assert_close(results, expected)
    gradient(torch.ones(4), view, labels, results[2], OF_1000, in_place=True)
    torch.testing.assert_close(view.contiguous(), wanted)
    assert buffer.isnan().sum() == 4 * 27


def test_rows_that_lie_differently_in_the_gradient():
    """Logits at one alignment, their gradient at another."""
    logits, labels = logits_and_labels(3, 1000, BF16)
    view = torch.zeros(3, 1009, dtype=BF16)[:, 5:1005]
    view.copy_(logits)
    state = losses_and_state(view, labels, OF_1000)[2]
    dlosses = torch.randn(3)
    expected = gradient(dlosses, logits, labels, state, OF_1000)
    assert gradient(dlosses, view, labels, state, OF_1000).equal(expected)


def test_classes_in_chunks():
    logits, labels = logits_and_labels(6, 1000)
    whole = losses_and_state(logits, labels, OF_1000)
    state = None
    for start, end in ((0, 300), (300, 301), (301, 1000), (1000, 1000)):
        options = OF_1000._replace(class_start=start)
        *losses, state = losses_and_state(
            logits[:, start:end], labels, options, before=state, classes_before=start
        )
    torch.testing.assert_close((*losses, state), whole)


def test_precomputed_lse():
    logits, labels = logits_and_labels(6, 100)
    results = cross_entropy_loss(logits, labels, precomputed_lse=logits.logsumexp(1))
    torch.testing.assert_close(results, cross_entropy_loss(logits, labels))


def test_infinite_logits_and_nan():
    logits, labels = logits_and_labels(5, 2000)
    labels = labels.clamp(min=0)
    logits[0, :1500] = -math.inf
    logits[1] = -math.inf
    logits[2, 3] = math.inf
    logits[3, 1999] = math.nan
    mine = cross_entropy_loss(logits, labels)[0]
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(mine, expected, equal_nan=True)


def test_losses_of_a_linear_layer():
    gen = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=gen).requires_grad_() for s in ((70, 16), (40, 16))]
    labels = logits_and_labels(70, 40)[1]
    loss = linear_cross_entropy_loss(*leaves, labels)
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves), labels)
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(x, leaves) for x in (loss, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("label", [-1, 60, 2**40, -(2**63)])
def test_label_out_of_range_is_ignored_and_reported(label):
    logits, labels = logits_and_labels(6, 60)
    labels[4] = label
    options = OF_1000._replace(num_classes=60)
    losses, _, state = losses_and_state(logits, labels, options)
    with pytest.raises(RuntimeError, match="out of range in labels: "):
        losses_and_state(logits, labels, options)
    dlogits = gradient(torch.ones(6), logits, labels, state, options)
    with pytest.raises(RuntimeError, match="out of range in labels: "):
        losses_and_state(logits, labels, options)
    labels[4] = -100
    expected = losses_and_state(logits, labels, options)
    assert losses.equal(expected[0])
    assert losses[4] == 0
    assert dlogits.equal(gradient(torch.ones(6), logits, labels, state, options))
    assert (dlogits[4] == 0).all()


def results(**options):
    logits, labels = logits_and_labels(6, 1000, BF16)
    with flash_attn.emulator(**options):
        losses, _, state = losses_and_state(logits, labels, OF_1000)
        return losses, state, gradient(torch.ones(6), logits, labels, state, OF_1000)


@pytest.mark.parametrize(("mode", "seed"), [("late", 0), ("random", 1), ("random", 2)])
def test_schedules_do_not_change_results(mode, seed):
    for mine, expected in zip(results(mode=mode, seed=seed), results()):
        assert mine.equal(expected)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_bytes_are_those_that_must_be_moved(dtype):
    """Logits once, and in the backward their gradient once; no sector in vain."""
    rows, classes = 3, 16384
    logits, labels = logits_and_labels(rows, classes, dtype)
    labels = labels.clamp(min=0)
    options = OF_1000._replace(num_classes=classes)
    with flash_attn.emulator(checks="none") as gpu:
        state = losses_and_state(logits, labels, options)[2]
        gradient(torch.ones(rows), logits, labels, state, options)
    size = rows * classes * dtype.itemsize
    for name, kernel in gpu.counters.items():
        ideal = size if "fwd" in name else 2 * size
        moved = kernel["global"]
        assert ideal <= 32 * moved["sectors"] <= 1.02 * ideal
        assert moved["sectors"] == moved["ideal_sectors"] > 0
        assert kernel["shared"]["wavefronts"] == kernel["shared"]["ideal_wavefronts"]
