"""Layer norm of dropout(x0) rowscale layerscale + residual, in one pass over memory.

Tensors are fp16, bf16 or fp32 on the CPU or CUDA, weights of a dtype of their own; arithmetic is
fp32. Functions return out, and after it the sum that was normed (``prenorm``) and the mask of what
dropout kept (``return_dropout_mask``), True where kept. Dropout is seeded by torch's default CPU
generator.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

from flash_attn._arguments import check_operands, flag
from flash_attn.ops._layer_norm import Normed, add_norm
from flash_attn.ops._layer_norm_by_masks import (
    _dropout_add_layer_norm_backward,
    _dropout_add_layer_norm_forward,
    _dropout_add_layer_norm_parallel_residual_backward,
    _dropout_add_layer_norm_parallel_residual_forward,
    _dropout_add_layer_norm_subset_backward,
    _dropout_add_layer_norm_subset_forward,
)

__all__ = [
    "DropoutAddLayerNorm",
    "DropoutAddLayerNormFn",
    "DropoutAddLayerNormParallelResidualFn",
    "DropoutAddLayerNormSubsetFn",
    "_dropout_add_layer_norm_backward",
    "_dropout_add_layer_norm_forward",
    "_dropout_add_layer_norm_parallel_residual_backward",
    "_dropout_add_layer_norm_parallel_residual_forward",
    "_dropout_add_layer_norm_subset_backward",
    "_dropout_add_layer_norm_subset_forward",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_parallel_residual",
    "dropout_add_layer_norm_subset",
    "layer_norm",
    "maybe_align",
]


def maybe_align(x: Tensor, alignment_in_bytes: int = 16) -> Tensor:
    """Return ``x``, copied only if its address is not a multiple of ``alignment_in_bytes``."""
    return x if x.data_ptr() % alignment_in_bytes == 0 else x.clone()


def _residual_dtype(residual: Optional[Tensor], residual_in_fp32: bool) -> Optional[torch.dtype]:
    in_fp32 = flag("residual_in_fp32", residual_in_fp32)
    return torch.float32 if residual is None and in_fp32 else None


def _all_kept(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else torch.ones_like(x, dtype=torch.bool)


def _results(normed: Normed, prenorm: bool, masks: tuple):
    out = (normed.out,) if normed.out1 is None else (normed.out, normed.out1)
    results = (*out, *((normed.x,) if prenorm else ()), *masks)
    return results if len(results) > 1 else results[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Optional[Tensor], epsilon: float) -> Tensor:
    """Return the layer norm of ``x`` (..., n) over its last dimension; weight, bias: (n,)."""
    return DropoutAddLayerNormFn.apply(x, None, weight, bias, None, None, 0.0, epsilon)


def dropout_add_layer_norm(
    x0,
    residual,
    weight,
    bias,
    dropout_p,
    epsilon,
    rowscale=None,
    layerscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """Return the layer norm of dropout(x0) rowscale layerscale + residual.

    Args:
        x0, residual: ``(..., n)``; residual may be None.
        weight, bias, layerscale: ``(n,)``; bias and layerscale may be None.
        rowscale: ``(...)``, or None.
        residual_in_fp32: whether the sum is kept in fp32 where there is no residual.

    Returns:
        out of x0's dtype[, the sum][, the mask].
    """
    return DropoutAddLayerNormFn.apply(
        x0,
        residual,
        weight,
        bias,
        rowscale,
        layerscale,
        dropout_p,
        epsilon,
        residual_in_fp32,
        prenorm,
        False,
        return_dropout_mask,
    )


def dropout_add_layer_norm_subset(
    x0,
    residual,
    weight,
    bias,
    dropout_p,
    epsilon,
    layerscale=None,
    x0_subset=None,
    out_subset=None,
    rowscale_const=1.0,
    out_numrows=0,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """Return the layer norm of a sum in which some rows have no x0, for some of the rows.

    Args:
        x0: ``(x0_numrows, n)``: the rows that ``x0_subset`` names.
        residual: ``(..., n)``, or None.
        x0_subset: integers ``(...)``: for each row of the sum the row of x0, counted from 1; 0:
            none. None: each row has its own.
        out_subset: the same of the output.
        rowscale_const: a factor of x0.
        out_numrows: rows of the output, with ``out_subset``.

    Other arguments and results are those of ``dropout_add_layer_norm``.
    """
    return DropoutAddLayerNormSubsetFn.apply(
        x0,
        residual,
        weight,
        bias,
        layerscale,
        x0_subset,
        out_subset,
        dropout_p,
        epsilon,
        rowscale_const,
        out_numrows,
        residual_in_fp32,
        prenorm,
        False,
        return_dropout_mask,
    )


def dropout_add_layer_norm_parallel_residual(
    x0,
    x1,
    residual,
    weight0,
    bias0,
    weight1,
    bias1,
    dropout_p,
    epsilon,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """Return two layer norms of dropout(x0) + dropout(x1) + residual.

    Args:
        x0, x1, residual: ``(..., n)``; x1 and residual may be None.
        weight0, bias0: ``(n,)``, of the first output.
        weight1, bias1: ``(n,)``, of the second; None: there is none, and None is returned.

    Returns:
        (out0, out1[, the sum][, the masks of x0 and of x1]).
    """
    return DropoutAddLayerNormParallelResidualFn.apply(
        x0,
        x1,
        residual,
        weight0,
        bias0,
        weight1,
        bias1,
        dropout_p,
        epsilon,
        residual_in_fp32,
        prenorm,
        False,
        return_dropout_mask,
    )


class DropoutAddLayerNormFn:
    """``dropout_add_layer_norm``, or of RMS norm, with all arguments by position."""

    @staticmethod
    def apply(
        x0,
        residual,
        gamma,
        beta,
        rowscale,
        colscale,
        dropout_p,
        epsilon,
        residual_in_fp32=False,
        prenorm=False,
        is_rms_norm=False,
        return_dmask=False,
    ):
        """Return out[, the sum][, the mask]."""
        columns = {"weight": gamma, "bias": beta, "layerscale": colscale}
        check_operands({"residual": residual, "rowscale": rowscale, **columns}, x0=x0)
        normed = add_norm(
            x0,
            gamma,
            beta,
            epsilon,
            residual=residual,
            rowscale=rowscale,
            colscale=colscale,
            dropout_p=dropout_p,
            is_rms_norm=is_rms_norm,
            residual_dtype=_residual_dtype(residual, residual_in_fp32),
            wants_x=prenorm,
            wants_mask=return_dmask,
        )
        return _results(normed, prenorm, _masks(normed, return_dmask, x0))


class DropoutAddLayerNormSubsetFn:
    """``dropout_add_layer_norm_subset``, or of RMS norm, with all arguments by position."""

    @staticmethod
    def apply(
        x0,
        residual,
        gamma,
        beta,
        colscale,
        x0_subset,
        out_subset,
        dropout_p,
        epsilon,
        rowscale_const,
        out_numrows,
        residual_in_fp32=False,
        prenorm=False,
        is_rms_norm=False,
        return_dmask=False,
    ):
        """Return out[, the sum][, the mask]."""
        columns = {"weight": gamma, "bias": beta, "layerscale": colscale}
        subsets = {"x0_subset": x0_subset, "out_subset": out_subset}
        check_operands({"residual": residual, **columns, **subsets}, x0=x0)
        normed = add_norm(
            x0,
            gamma,
            beta,
            epsilon,
            residual=residual,
            colscale=colscale,
            x0_subset=x0_subset,
            out_subset=out_subset,
            rowscale_const=rowscale_const,
            out_numrows=out_numrows,
            dropout_p=dropout_p,
            is_rms_norm=is_rms_norm,
            residual_dtype=_residual_dtype(residual, residual_in_fp32),
            wants_x=prenorm,
            wants_mask=return_dmask,
        )
        return _results(normed, prenorm, _masks(normed, return_dmask, x0))


class DropoutAddLayerNormParallelResidualFn:
    """``dropout_add_layer_norm_parallel_residual``, or of RMS norm, by position."""

    @staticmethod
    def apply(
        x0,
        x1,
        residual,
        gamma0,
        beta0,
        gamma1,
        beta1,
        dropout_p,
        epsilon,
        residual_in_fp32=False,
        prenorm=False,
        is_rms_norm=False,
        return_dmask=False,
    ):
        """Return (out0, out1[, the sum][, both masks])."""
        columns = {"weight0": gamma0, "bias0": beta0, "weight1": gamma1, "bias1": beta1}
        check_operands({"x1": x1, "residual": residual, **columns}, x0=x0)
        normed = add_norm(
            x0,
            gamma0,
            beta0,
            epsilon,
            x1=x1,
            residual=residual,
            weight1=gamma1,
            bias1=beta1,
            dropout_p=dropout_p,
            is_rms_norm=is_rms_norm,
            residual_dtype=_residual_dtype(residual, residual_in_fp32),
            wants_x=prenorm,
            wants_mask=return_dmask,
        )
        sums = (normed.x,) if prenorm else ()
        return (normed.out, normed.out1, *sums, *_masks(normed, return_dmask, x0, x1, pair=True))


def _masks(normed: Normed, wanted: bool, x0, x1=None, pair: bool = False) -> tuple:
    """Return the masks that are wanted: of True where there is no dropout."""
    if not wanted:
        return ()
    masks = normed.dropout_mask, normed.dropout_mask1
    if normed.dropout_mask is None:
        masks = _all_kept(x0), _all_kept(x1)
    return masks if pair else masks[:1]


class DropoutAddLayerNorm(nn.Module):
    """``dropout_add_layer_norm`` with a weight and a bias of its own; no dropout in evaluation.

    Args:
        hidden_size: n.
        prenorm: whether the sum is returned too.
        p: probability of dropout.
    """

    def __init__(
        self,
        hidden_size,
        prenorm=False,
        p=0.0,
        eps=1e-5,
        residual_in_fp32=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        """Set the weight to 1 and the bias to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x0, residual=None):
        """Return out[, the sum] of x0 and residual ``(..., hidden_size)``."""
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
