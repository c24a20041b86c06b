"""Cross entropy as a module, and of a linear layer's results without making them.

All arithmetic is fp32, and so are the losses. ``linear_cross_entropy_loss`` and
``LinearCrossEntropyLoss`` are beyond FlashAttention-2.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor, nn

from flash_attn._arguments import as_int64, check_operands, flag, number
from flash_attn._fused import without_derivative
from flash_attn.ops.cross_entropy import Options
from flash_attn.ops.linear_cross_entropy import losses_and_gradients, sums_in_fp32
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.utils.distributed import group_rank, group_size

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss", "linear_cross_entropy_loss"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_REDUCTIONS = ("mean", "none", "sum")


def _check_reduction(reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise NotImplementedError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")


def _reduced(losses: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


class CrossEntropyLoss(nn.Module):
    """Cross entropy of logits against labels; see ``cross_entropy_loss`` for what it computes.

    Args:
        reduction: "mean", over rows whose label is not ignore_index, "sum" or "none".
        return_z_loss: return (loss, z_loss), the second being part of the first, not
            differentiable.
        ignore_index, label_smoothing, logit_scale, lse_square_scale, inplace_backward,
            process_group: as in ``cross_entropy_loss``.

    Raises NotImplementedError for another reduction.
    """

    def __init__(
        self,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        logit_scale=1.0,
        lse_square_scale=0.0,
        inplace_backward=False,
        process_group=None,
        return_z_loss=False,
    ):
        super().__init__()
        _check_reduction(reduction)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(self, input, target, precomputed_lse=None):
        """Return the loss, fp32.

        Args:
            input: logits ``(..., classes)``.
            target: labels ``(...)``.
            precomputed_lse: fp32 ``(...)``, or None.
        """
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        results = (_reduced(x, target, self.ignore_index, self.reduction) for x in losses)
        loss, z_loss = results
        return (loss, z_loss) if self.return_z_loss else loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses of rows; or, given ``shares``, their sum with these weights.

    The gradients of the sum are made with it, but for a factor; those of the losses of rows need
    the logits once more.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, shares, has_backward, *options):
        wants = [has_backward and needs for needs in ctx.needs_input_grad[:3]]
        ctx.wants, ctx.options, ctx.is_sum = wants, options, shares is not None
        ctx.set_materialize_grads(False)
        now = wants if ctx.is_sum else (False,) * 3
        losses, z_losses, *gradients = losses_and_gradients(
            hidden, weight, labels, bias, shares, now, *options
        )
        if not ctx.is_sum:
            ctx.save_for_backward(hidden, weight, bias, labels)
            ctx.mark_non_differentiable(z_losses)
            return losses, z_losses
        ctx.save_for_backward(*gradients)
        z_loss = (z_losses * shares).sum()
        ctx.mark_non_differentiable(z_loss)
        return (losses * shares).sum(), z_loss

    @staticmethod
    def backward(ctx, dloss, _):
        if dloss is None:
            return (None,) * (6 + len(ctx.options))
        if ctx.is_sum:
            gradients = [_scaled(x, dloss) for x in ctx.saved_tensors]
        else:
            hidden, weight, bias, labels = ctx.saved_tensors
            *_, dhidden, dweight, dbias = losses_and_gradients(
                hidden, weight, labels, bias, dloss.contiguous(), ctx.wants, *ctx.options
            )
            gradients = dhidden, dweight, dbias
        wanted = tuple(x if wants else None for x, wants in zip(gradients, ctx.wants))
        wanted = without_derivative("linear_cross_entropy_loss", wanted)
        return *wanted, *(None,) * (3 + len(ctx.options))


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x * factor, in the memory of x: a second backward finds it changed, and raises."""
    return x * factor if torch.compiler.is_compiling() else x.mul_(factor)


def _as_autocast(*tensors: Optional[Tensor]) -> list[Optional[Tensor]]:
    """Return tensors in the dtype that autocast gives a linear layer's arguments."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if x is None else x.to(dtype) for x in tensors]


def _check_dtypes(hidden: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise ValueError(
                f"hidden and {name} must have the same dtype where autocast is off, got "
                f"{hidden.dtype} and {x.dtype}"
            )
    if hidden.dtype not in _DTYPES:
        raise ValueError(f"hidden must be fp16, bf16 or fp32, got {hidden.dtype}")


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Optional[Tensor]) -> None:
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            "hidden and weight must be (..., features) and (classes, features), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of hidden without the last dimension, "
            f"{tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape {tuple(weight.shape[:1])}")


def linear_cross_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional[Tensor] = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    process_group=None,
    return_z_loss: bool = False,
    sum_in_fp32: Optional[bool] = None,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """Return the cross entropy of ``hidden @ weight.T + bias``, which is never made as a whole.

    Memory beside the results is about a 24th of what the logits would take (or that of 32 rows).
    "mean" and "sum" cost the products of a linear layer and its backward, since gradients are made
    with the loss; a second backward raises RuntimeError. "none" makes the logits once more in the
    backward.

    Args:
        hidden: fp16, bf16 or fp32 ``(..., features)``.
        weight: ``(classes, features)``; bias: ``(classes,)``. Of hidden's dtype, or autocast's.
        labels: int32 or int64 ``(...)``: classes, or ignore_index.
        reduction, return_z_loss: as in ``CrossEntropyLoss``.
        ignore_index, label_smoothing, logit_scale, lse_square_scale: as in ``cross_entropy_loss``.
        process_group: whose processes have equal shares of the classes in weight and bias, by rank;
            hidden and labels are the same on all, and so are loss and gradient of hidden.
        sum_in_fp32: whether the gradient of a 16-bit weight is summed over chunks in fp32, which
            takes 4 bytes an element, or in its own dtype; None: where that is at most 5 % of what
            the logits would take.

    Returns:
        the loss, fp32, or (loss, z_loss).

    Raises TypeError, ValueError or NotImplementedError for what it cannot take, and RuntimeError
    for labels out of range as ``cross_entropy_loss`` does.
    """
    check_operands({"bias": bias}, hidden=hidden, weight=weight, labels=labels)
    _check_reduction(reduction)
    _check_shapes(hidden, weight, labels, bias)
    hidden, weight, bias = _as_autocast(hidden, weight, bias)
    _check_dtypes(hidden, weight, bias)
    size, rank = group_size(process_group), group_rank(process_group)
    options = Options(
        number("label_smoothing", label_smoothing),
        number("logit_scale", logit_scale),
        number("lse_square_scale", lse_square_scale),
        as_int64("ignore_index", ignore_index),
        rank * weight.shape[0],
        size * weight.shape[0],
    )
    rows = labels.reshape(-1).contiguous()
    matrix = hidden.reshape(-1, hidden.shape[-1])
    # The gradients of a mean's summands may be too small for fp16: it divides the sum's.
    divides_later = reduction == "mean" and hidden.dtype == torch.float16
    count = (rows != options.ignore_index).sum() if reduction == "mean" else 1
    losses = _LinearCrossEntropy.apply(
        matrix,
        weight,
        bias,
        rows,
        None if reduction == "none" else _shares(rows, 1 if divides_later else count),
        torch.is_grad_enabled(),
        sums_in_fp32(matrix, weight) if sum_in_fp32 is None else flag("sum_in_fp32", sum_in_fp32),
        process_group.group_name if size > 1 else "",
        options,
    )
    if reduction == "none":
        losses = [x.view(labels.shape) for x in losses]
    if divides_later:
        losses = [x / count.clamp(min=1) for x in losses]
    if reduction == "mean":  # of no rows: nan, with gradients of 0
        losses = [x + (count - count) / count for x in losses]
    loss, z_loss = losses
    return (loss, z_loss) if return_z_loss else loss


def _shares(labels: Tensor, count) -> Tensor:
    """Return 1 / count for each row, fp32: the losses' weights in their sum."""
    return torch.ones(labels.shape, dtype=torch.float32, device=labels.device) / count


class LinearCrossEntropyLoss(nn.Module):
    """``linear_cross_entropy_loss`` with its options set; has no parameters of its own."""

    def __init__(
        self,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        logit_scale=1.0,
        lse_square_scale=0.0,
        process_group=None,
        return_z_loss=False,
        sum_in_fp32=None,
    ):
        super().__init__()
        _check_reduction(reduction)
        self.options = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "lse_square_scale": lse_square_scale,
            "process_group": process_group,
            "return_z_loss": return_z_loss,
            "sum_in_fp32": sum_in_fp32,
        }

    def forward(self, hidden, weight, target, bias=None):
        """Return the loss of hidden ``(..., features)`` and a linear layer's weight and bias."""
        return linear_cross_entropy_loss(hidden, weight, target, bias, **self.options)
