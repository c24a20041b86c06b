"""Layer norm and RMS norm of x + x1 + residual with dropout, in one pass over memory.

Tensors are fp16, bf16 or fp32 on the CPU or CUDA, weights of a dtype of their own; arithmetic is
fp32. Dropout is seeded by torch's default CPU generator. Nothing here needs Triton.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn._arguments import check_operands, flag
from flash_attn._buffers import maybe_contiguous as maybe_contiguous_lastdim
from flash_attn._fused import as_matrix, without_autocast
from flash_attn.ops._layer_norm import DTYPES, Normed, add_norm, add_norm_into, backward

__all__ = [
    "LayerNormFn",
    "LayerNormLinearFn",
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "maybe_contiguous",
    "maybe_contiguous_lastdim",
    "rms_norm_fn",
    "rms_norm_ref",
]


def maybe_contiguous(x: Optional[Tensor]) -> Optional[Tensor]:
    """Return ``x`` contiguous, copied only if it is not; None stays None."""
    return None if x is None else x.contiguous()


# ---------------------------------------------------------------------------- by torch's operations


def _dropped(x: Tensor, p: float, mask: Optional[Tensor]) -> Tensor:
    if p == 0.0:
        return x
    return F.dropout(x, p) if mask is None else x.masked_fill(~mask.bool(), 0.0) / (1.0 - p)


def _norm_ref(
    norm,
    x,
    weight,
    bias,
    residual,
    x1,
    weight1,
    bias1,
    dropout_p,
    rowscale,
    prenorm,
    zero_centered_weight,
    dropout_mask,
    dropout_mask1,
    upcast,
):
    dtype = x.dtype
    tensors = x, weight, bias, residual, x1, weight1, bias1, rowscale
    if upcast:
        tensors = (None if t is None else t.float() for t in tensors)
    x, weight, bias, residual, x1, weight1, bias1, rowscale = tensors
    if zero_centered_weight:
        weight, weight1 = (None if w is None else w + 1.0 for w in (weight, weight1))
    if rowscale is not None:
        x = x * rowscale[..., None]
    x = _dropped(x, dropout_p, dropout_mask)
    if x1 is not None:
        x = x + _dropped(x1, dropout_p, dropout_mask1)
    if residual is not None:
        x = (x + residual).to(x.dtype)
    out = norm(x.to(weight.dtype), weight, bias).to(dtype)
    results = (out,)
    if weight1 is not None:
        results += (norm(x.to(weight1.dtype), weight1, bias1).to(dtype),)
    if prenorm:
        results += (x,)
    return results if len(results) > 1 else out


def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """Return what ``layer_norm_fn`` does, by torch's operations.

    Args:
        dropout_mask, dropout_mask1: what dropout keeps of x and x1; None: drawn.
        upcast: compute in fp32.
    """

    def norm(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    return _norm_ref(
        norm,
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        dropout_p,
        rowscale,
        prenorm,
        zero_centered_weight,
        dropout_mask,
        dropout_mask1,
        upcast,
    )


def rms_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """Return what ``rms_norm_fn`` does, by torch's operations; arguments as ``layer_norm_ref``."""

    def norm(x, weight, bias):
        out = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
        return out if bias is None else out + bias

    return _norm_ref(
        norm,
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        dropout_p,
        rowscale,
        prenorm,
        zero_centered_weight,
        dropout_mask,
        dropout_mask1,
        upcast,
    )


# -------------------------------------------------------------------------------- without gradients


def _layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    dropout_p=0.0,
    rowscale=None,
    out_dtype=None,
    residual_dtype=None,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
    out=None,
    residual_out=None,
):
    """Return (out, out1, mean, rstd, the sum, seeds, dropout_mask, dropout_mask1).

    ``seeds`` is int64 [2] on the CPU, None without dropout, as is all that does not exist. ``out``
    and ``residual_out`` are written to where given.
    """
    normed = _normed(
        x,
        weight,
        bias,
        eps,
        residual,
        x1,
        weight1,
        bias1,
        dropout_p,
        rowscale,
        out_dtype,
        residual_dtype,
        zero_centered_weight,
        is_rms_norm,
        return_dropout_mask,
        out,
        residual_out,
        wants_x=True,
    )
    seeds = normed.rng_state if dropout_p > 0.0 else None
    masks = normed.dropout_mask, normed.dropout_mask1
    return normed.out, normed.out1, normed.mean, normed.rstd, normed.x, seeds, *masks


def _normed(
    x,
    weight,
    bias,
    eps,
    residual,
    x1,
    weight1,
    bias1,
    dropout_p,
    rowscale,
    out_dtype,
    residual_dtype,
    zero_centered_weight,
    is_rms_norm,
    return_dropout_mask,
    out,
    residual_out,
    wants_x,
) -> Normed:
    columns = {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}
    summands = {"residual": residual, "x1": x1, "rowscale": rowscale}
    check_operands({**columns, **summands, "out": out, "residual_out": residual_out}, x=x)
    if out_dtype is None and out is not None:
        out_dtype = out.dtype
    if residual_out is not None:
        wants_x, residual_dtype = True, residual_out.dtype
    options = {
        "residual": residual,
        "x1": x1,
        "weight1": weight1,
        "bias1": bias1,
        "dropout_p": dropout_p,
        "rowscale": rowscale,
        "out_dtype": out_dtype,
        "residual_dtype": residual_dtype,
        "zero_centered_weight": zero_centered_weight,
        "is_rms_norm": is_rms_norm,
        "wants_x": wants_x,
        "wants_mask": return_dropout_mask,
    }
    if out is None and residual_out is None:
        return add_norm(x, weight, bias, eps, **options)
    return add_norm_into(out, residual_out, x, weight, bias, eps, **options)


def _layer_norm_bwd(
    dy,
    x,
    weight,
    bias,
    eps,
    mean,
    rstd,
    dresidual=None,
    dy1=None,
    weight1=None,
    bias1=None,
    seeds=None,
    dropout_p=0.0,
    rowscale=None,
    has_residual=False,
    has_x1=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    x_dtype=None,
    recompute_output=False,
):
    """Return (dx, dweight, dbias, dresidual_in, dx1, dweight1, dbias1[, out]).

    Args:
        dy, dy1: gradients of the outputs.
        x: the sum that was normed, of the residual's dtype; its gradient beside the outputs' is
            ``dresidual``.
        mean, rstd, seeds: of the forward.
        x_dtype: of dx and dx1; None: that of x.
        recompute_output: whether the output is returned once more, of dy's dtype.
    """
    x_dtype = x.dtype if x_dtype is None else x_dtype
    one_gradient = x_dtype == x.dtype and dropout_p == 0.0 and rowscale is None
    dx, dx1, dresidual_in, *columns, out = backward(
        x,
        dy,
        dy1,
        dresidual,
        None,
        x.new_empty(0) if mean is None else mean,
        rstd,
        torch.zeros(2, dtype=torch.int64) if seeds is None else seeds,
        rowscale,
        None,
        None,
        None,
        weight,
        bias,
        weight1,
        bias1,
        1.0,
        float(eps),
        float(dropout_p),
        is_rms_norm,
        zero_centered_weight,
        0,
        x_dtype,
        has_x1,
        x.dtype if has_residual and not one_gradient else None,
        dy.dtype if recompute_output else None,
    )
    if one_gradient:
        dresidual_in = dx
    vectors = weight, bias, weight1, bias1
    dweight, dbias, dweight1, dbias1 = (
        None if v is None else gradient for gradient, v in zip(columns, vectors)
    )
    dresidual_in, dx1 = dresidual_in if has_residual else None, dx1 if has_x1 else None
    results = dx, dweight, dbias, dresidual_in, dx1, dweight1, dbias1
    return (*results, out) if recompute_output else results


# ----------------------------------------------------------------------------------- with gradients


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """Return the layer norm of dropout(x) rowscale + dropout(x1) + residual.

    Args:
        x, x1, residual: ``(..., n)``; x1 and residual may be None.
        weight, bias: ``(n,)`` or None.
        weight1, bias1: ``(n,)`` or None: weight1 makes a second output.
        rowscale: ``(...)`` or None.
        prenorm: whether the sum is returned too.
        residual_in_fp32: whether the sum is kept in fp32 where there is no residual; otherwise it
            has the residual's dtype.
        zero_centered_weight: whether 1 + weight and 1 + weight1 are the factors.
        out_dtype: of the outputs; None: that of x.
        out, residual_out: where to write the first output and the sum; they are what is returned.

    Returns:
        out[, out1][, the sum][, dropout_mask, dropout_mask1]: masks are True where an element was
        kept, and None where there is no dropout or no x1.
    """
    in_fp32 = flag("residual_in_fp32", residual_in_fp32)
    residual_dtype = torch.float32 if residual is None and in_fp32 else None
    normed = _normed(
        x,
        weight,
        bias,
        eps,
        residual,
        x1,
        weight1,
        bias1,
        dropout_p,
        rowscale,
        out_dtype,
        residual_dtype,
        zero_centered_weight,
        is_rms_norm,
        return_dropout_mask,
        out,
        residual_out,
        wants_x=prenorm,
    )
    results = (normed.out,) if normed.out1 is None else (normed.out, normed.out1)
    if prenorm:
        results += (normed.x,)
    if return_dropout_mask:
        results += (normed.dropout_mask, normed.dropout_mask1)
    return results if len(results) > 1 else normed.out


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """Return the RMS norm of a sum, with ``layer_norm_fn``'s arguments and results."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


class LayerNormFn:
    """``layer_norm_fn`` by the name of an autograd function."""

    apply = staticmethod(layer_norm_fn)


class RMSNorm(nn.Module):
    """``rms_norm_fn`` with a weight of its own; no dropout in evaluation."""

    def __init__(
        self,
        hidden_size,
        eps=1e-5,
        dropout_p=0.0,
        zero_centered_weight=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        """Make the factor 1."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        """Return out[, the sum] of x and residual ``(..., hidden_size)``."""
        drops = self.drop is not None and self.training
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if drops else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


# -------------------------------------------------------------------------- a linear layer after it


def _linear_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which autocast wants a linear layer, without it that of x."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


class LayerNormLinearFn(torch.autograd.Function):
    """``layer_norm_linear_fn`` with all arguments by position.

    The output of the norm is not stored: the backward makes it once more, in the pass that it makes
    over the sum anyway.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        norm_weight,
        norm_bias,
        linear_weight,
        linear_bias,
        residual=None,
        eps=1e-6,
        prenorm=False,
        residual_in_fp32=False,
        is_rms_norm=False,
    ):
        """Return out[, the sum]."""
        dtype = _linear_dtype(x)
        normed = add_norm(
            x,
            norm_weight,
            norm_bias,
            eps,
            residual=residual,
            residual_dtype=torch.float32 if residual is None and residual_in_fp32 else None,
            is_rms_norm=is_rms_norm,
            out_dtype=dtype,
        )
        weight = linear_weight.to(dtype)
        bias = None if linear_bias is None else linear_bias.to(dtype)
        with without_autocast(x):
            out = F.linear(normed.out, weight, bias)
        ctx.save_for_backward(
            normed.x, norm_weight, norm_bias, linear_weight, normed.mean, normed.rstd
        )
        ctx.options = eps, prenorm, is_rms_norm, residual is not None, dtype, x.dtype
        ctx.linear_bias_dtype = None if linear_bias is None else linear_bias.dtype
        return (out, normed.x.view_as(normed.x)) if prenorm else out

    @staticmethod
    def backward(ctx, dout, *dresidual):
        """Return the gradients of all arguments."""
        x, norm_weight, norm_bias, linear_weight, mean, rstd = ctx.saved_tensors
        eps, prenorm, is_rms_norm, has_residual, dtype, x_dtype = ctx.options
        dout = as_matrix(dout.to(dtype))
        with without_autocast(x):
            dy = (dout @ linear_weight.to(dtype)).view(x.shape)
            dx, dnorm_weight, dnorm_bias, dresidual_in, _, _, _, y = _layer_norm_bwd(
                dy,
                x,
                norm_weight,
                norm_bias,
                eps,
                mean,
                rstd,
                dresidual=dresidual[0] if prenorm else None,
                has_residual=has_residual,
                is_rms_norm=is_rms_norm,
                x_dtype=x_dtype,
                recompute_output=True,
            )
            dlinear_weight = dout.t() @ as_matrix(y)
        dlinear_bias = None
        if ctx.linear_bias_dtype is not None:
            dlinear_bias = dout.sum(0).to(ctx.linear_bias_dtype)
        return (
            dx,
            dnorm_weight,
            dnorm_bias,
            dlinear_weight.to(linear_weight.dtype),
            dlinear_bias,
            dresidual_in,
            None,
            None,
            None,
            None,
        )


def _check_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be fp16, bf16 or fp32, got {x.dtype}")
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or not weight.is_floating_point():
        raise ValueError(
            f"linear_weight must be floating point (m, n) with x (..., n), got {weight.dtype} "
            f"{tuple(weight.shape)} and {tuple(x.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"linear_bias must be floating point ({weight.shape[0]},), got {bias.dtype} "
            f"{tuple(bias.shape)}"
        )


def layer_norm_linear_fn(
    x,
    norm_weight,
    norm_bias,
    linear_weight,
    linear_bias,
    residual=None,
    eps=1e-6,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """Return linear(norm(x + residual)), of which the norm's output is not kept for the backward.

    Args:
        x, residual: ``(..., n)``; residual may be None.
        norm_weight, norm_bias: ``(n,)``; norm_bias may be None.
        linear_weight: ``(m, n)``; linear_bias: ``(m,)`` or None.
        prenorm, residual_in_fp32: as in ``layer_norm_fn``.

    Returns:
        ``(..., m)``, under autocast of its dtype[, the sum].
    """
    optional = {"norm_bias": norm_bias, "linear_bias": linear_bias, "residual": residual}
    prenorm = flag("prenorm", prenorm)
    residual_in_fp32 = flag("residual_in_fp32", residual_in_fp32)
    check_operands(optional, x=x, norm_weight=norm_weight, linear_weight=linear_weight)
    _check_linear(x, linear_weight, linear_bias)
    return LayerNormLinearFn.apply(
        x,
        norm_weight,
        norm_bias,
        linear_weight,
        linear_bias,
        residual,
        eps,
        prenorm,
        residual_in_fp32,
        is_rms_norm,
    )
