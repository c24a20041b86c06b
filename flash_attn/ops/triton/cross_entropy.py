"""Cross entropy of rows of logits against labels, in one pass over the logits each way."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn._arguments import as_int, check_operands, flag, number
from flash_attn._fused import as_matrix, without_derivative
from flash_attn.ops.cross_entropy import Options, gather_states, gradient, losses_and_state
from flash_attn.utils.distributed import group_rank, group_size

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]


class CrossEntropyLoss(torch.autograd.Function):
    """``cross_entropy_loss``, with all arguments by position."""

    @staticmethod
    def forward(
        ctx,
        logits,
        labels,
        precomputed_lse=None,
        smoothing=0.0,
        logit_scale=1.0,
        lse_square_scale=0.0,
        ignore_index=-100,
        inplace_backward=False,
        process_group=None,
    ):
        size, rank = group_size(process_group), group_rank(process_group)
        matrix, rows = as_matrix(logits), labels.reshape(-1).contiguous()
        classes = matrix.shape[1]
        ctx.options = Options(
            number("label_smoothing", smoothing),
            number("logit_scale", logit_scale),
            number("lse_square_scale", lse_square_scale),
            as_int("ignore_index", ignore_index),
            rank * classes,
            size * classes,
        )
        if precomputed_lse is not None:
            precomputed_lse = precomputed_lse.reshape(-1).contiguous()
        losses, z_losses, state = losses_and_state(matrix, rows, ctx.options, precomputed_lse)
        if size > 1:
            losses, z_losses, state = gather_states(matrix, rows, state, ctx.options, process_group)
        ctx.in_place = flag("inplace_backward", inplace_backward)
        if torch.compiler.is_compiling():  # which decides by itself what to write over
            ctx.in_place = False
        ctx.shape = logits.shape
        ctx.save_for_backward(logits, rows, state)
        ctx.set_materialize_grads(False)
        z_losses = z_losses.view(labels.shape)
        ctx.mark_non_differentiable(z_losses)
        return losses.view(labels.shape), z_losses

    @staticmethod
    def backward(ctx, dlosses, _):
        if dlosses is None:
            return (None,) * 9
        logits, rows, state = ctx.saved_tensors
        matrix, flat = as_matrix(logits), dlosses.reshape(-1).contiguous()
        dlogits = gradient(flat, matrix, rows, state, ctx.options, ctx.in_place).view(ctx.shape)
        return *without_derivative("cross_entropy_loss", (dlogits,)), *(None,) * 8


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Optional[Tensor] = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group=None,
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of each row, and the part of it that is the z-loss.

    With z = logit_scale * logits the loss is ``lse - (1 - label_smoothing) z[label] -
    label_smoothing mean(z) + lse_square_scale lse^2``, where ``lse = log(sum(exp(z)))``. It is
    differentiable in the logits; the second result is not.

    Args:
        logits: fp16, bf16 or fp32 ``(..., classes)``, at best with last stride 1.
        labels: int32 or int64 ``(...)``: classes, or ignore_index.
        precomputed_lse: fp32 ``(...)``: lse of the logits, where logit_scale is 1 and
            label_smoothing 0; None: it is computed.
        ignore_index: the label of rows whose loss, and gradient, is 0.
        inplace_backward: the gradient is written over the logits. A second backward, and another
            one that needs them, raises RuntimeError.
        process_group: whose processes have equal shares of the classes in their logits, by rank;
            labels are the same on all, and so are the results. None: this process has all classes.

    Returns:
        losses, z_losses: fp32 ``(...)``.

    Raises RuntimeError for a label out of range: on the CPU at once, naming the row; on CUDA the
    row counts as ignored, and the next call on the device raises.
    """
    check_operands({"precomputed_lse": precomputed_lse}, logits=logits, labels=labels)
    if precomputed_lse is not None and precomputed_lse.shape not in (
        labels.shape,
        (labels.numel(),),
    ):
        raise ValueError(
            f"precomputed_lse must have the shape of labels, {tuple(labels.shape)}, got "
            f"{tuple(precomputed_lse.shape)}"
        )
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of logits without the last dimension, "
            f"{tuple(logits.shape[:-1])}, got {tuple(labels.shape)}"
        )
    return CrossEntropyLoss.apply(
        logits,
        labels,
        precomputed_lse,
        label_smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        inplace_backward,
        process_group,
    )
