"""Inputs of cross entropy, and its definition by plain PyTorch operations."""

from __future__ import annotations

import torch
from reference import assert_attention_close

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FP32, FP16, BF16]

# label_smoothing, logit_scale, lse_square_scale
PLAIN = {}
ALL_OPTIONS = {"label_smoothing": 0.1, "logit_scale": 0.7, "lse_square_scale": 1e-2}
OPTIONS = [PLAIN, {"lse_square_scale": 0.1, "logit_scale": -1.5}, ALL_OPTIONS]


def logits_and_labels(rows, classes, dtype=FP32, ignore_index=-100, seed=0):
    """Every third label is ignored."""
    gen = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, classes, generator=gen)).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=gen)
    labels[1::3] = ignore_index
    return logits, labels


def cross_entropy(
    logits, labels, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, ignore_index=-100
):
    """``(losses, z_losses)`` in the dtype of the logits, ``(rows,)``."""
    z = logits * logit_scale
    ignored = labels == ignore_index
    of_label = z.gather(1, labels.long().masked_fill(ignored, 0)[:, None])[:, 0]
    lse = z.logsumexp(1)
    z_losses = lse_square_scale * lse.square()
    smoothed = (lse - z.mean(1)) * label_smoothing if label_smoothing else 0.0
    losses = (1 - label_smoothing) * (lse - of_label) + smoothed + z_losses
    return losses.masked_fill(ignored, 0.0), z_losses.masked_fill(ignored, 0.0)


def losses_and_gradient(function, logits, labels, dlosses, **options):
    """``{losses, z_losses, dlogits}`` of a function like ``cross_entropy``."""
    logits = logits.detach().clone().requires_grad_()
    losses, z_losses = function(logits, labels, **options)
    (dlogits,) = torch.autograd.grad(losses, logits, dlosses.to(losses.dtype))
    return {"losses": losses.detach(), "z_losses": z_losses.detach(), "dlogits": dlogits}


def plain(logits, labels, **options):
    """What a careful user of PyTorch computes: fp32 from logits of any dtype."""
    return cross_entropy(logits.float(), labels, **options)


def check(function, logits, labels, **options):
    """A function like ``cross_entropy`` is as good as plain PyTorch."""
    dlosses = torch.randn(len(labels), generator=torch.Generator().manual_seed(1))
    arguments = labels, dlosses
    actual = losses_and_gradient(function, logits, *arguments, **options)
    exact = losses_and_gradient(cross_entropy, logits.double(), *arguments, **options)
    in_dtype = losses_and_gradient(plain, logits, *arguments, **options)
    assert actual["losses"].dtype == actual["z_losses"].dtype == FP32
    assert actual["dlogits"].dtype == logits.dtype
    for name in exact:
        assert_attention_close(actual[name], exact[name], in_dtype[name], name)
