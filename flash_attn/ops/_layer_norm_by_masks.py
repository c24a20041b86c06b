"""Forwards and backwards of ``ops.layer_norm`` apart, without autograd: dropout by its masks.

Tensors are taken as matrices of their last dimension, and returned as such. Masks are None without
dropout; ``mu`` is None for RMS norm.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn._fused import as_matrix
from flash_attn.ops._layer_norm import Normed, add_norm, backward


def _matrix(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else as_matrix(x)


def _forward(x0, residual, gamma, beta, epsilon, residual_in_fp32, **options) -> Normed:
    residual_dtype = torch.float32 if residual is None and residual_in_fp32 else None
    with torch.no_grad():
        return add_norm(
            as_matrix(x0),
            gamma,
            beta,
            epsilon,
            residual=_matrix(residual),
            residual_dtype=residual_dtype,
            wants_mask=True,
            **options,
        )


def _kept(x: Optional[Tensor], mask: Optional[Tensor], dropout_p: float) -> Optional[Tensor]:
    """Return what dropout makes of x, or of the gradient of its result."""
    if x is None or mask is None:
        return x
    return x.masked_fill(~mask.bool(), 0.0) / (1.0 - dropout_p)


def _backward(
    dz,
    dx,
    x,
    masks,
    mu,
    rsigma,
    gammas,
    dropout_p,
    has_residual,
    is_rms_norm,
    *,
    dz1=None,
    x0=None,
    rowscale=None,
    colscale=None,
    x0_subset=None,
    out_subset=None,
    rowscale_const=1.0,
    x0_numrows=0,
    has_x1=False,
):
    """Return dx0, dx1, dresidual, and dgamma, dbeta, dgamma1, dbeta1, dcolscale, or None."""
    mask0, mask1 = masks
    kept0 = _kept(_matrix(x0), mask0, dropout_p) if colscale is not None else None
    dx0, dx1, dresidual, *columns, _ = backward(
        as_matrix(x),
        as_matrix(dz),
        _matrix(dz1),
        _matrix(dx),
        kept0,
        rsigma.new_empty(0) if mu is None else mu,
        rsigma,
        torch.zeros(2, dtype=torch.int64),
        rowscale,
        colscale,
        x0_subset,
        out_subset,
        gammas[0],
        gammas[0],  # gradients of biases are wanted, too
        gammas[1],
        gammas[1],
        float(rowscale_const),
        0.0,
        0.0,
        is_rms_norm,
        False,
        x0_numrows,
        dz.dtype,
        has_x1,
        x.dtype if has_residual else None,
        None,
    )
    branches = _kept(dx0, mask0, dropout_p), _kept(dx1 if has_x1 else None, mask1, dropout_p)
    vectors = gammas[0], gammas[0], gammas[1], gammas[1], colscale
    columns = (None if v is None else gradient for gradient, v in zip(columns, vectors))
    return (*branches, dresidual if has_residual else None, *columns)


def _with_dcolscale(gradients, colscale) -> tuple:
    dx0, _, dresidual, dgamma, dbeta, _, _, dcolscale = gradients
    results = dx0, dresidual, dgamma, dbeta
    return results if colscale is None else (*results, dcolscale)


def _dropout_add_layer_norm_forward(
    x0,
    residual,
    gamma,
    beta,
    rowscale,
    colscale,
    dropout_p,
    epsilon,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """Return (out, the sum, dmask, mu, rsigma)."""
    normed = _forward(
        x0,
        residual,
        gamma,
        beta,
        epsilon,
        residual_in_fp32,
        rowscale=rowscale,
        colscale=colscale,
        dropout_p=dropout_p,
        is_rms_norm=is_rms_norm,
    )
    return normed.out, normed.x, normed.dropout_mask, normed.mean, normed.rstd


def _dropout_add_layer_norm_backward(
    dz,
    dx,
    x,
    x0,
    dmask,
    mu,
    rsigma,
    gamma,
    rowscale,
    colscale,
    dropout_p,
    has_residual,
    is_rms_norm=False,
):
    """Return (dx0, dresidual, dgamma, dbeta[, dcolscale]); x0 is needed for dcolscale alone."""
    gradients = _backward(
        dz,
        dx,
        x,
        (dmask, None),
        mu,
        rsigma,
        (gamma, None),
        dropout_p,
        has_residual,
        is_rms_norm,
        x0=x0,
        rowscale=rowscale,
        colscale=colscale,
    )
    return _with_dcolscale(gradients, colscale)


def _dropout_add_layer_norm_subset_forward(
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
    is_rms_norm=False,
):
    """Return (out, the sum, dmask, mu, rsigma)."""
    normed = _forward(
        x0,
        residual,
        gamma,
        beta,
        epsilon,
        residual_in_fp32,
        colscale=colscale,
        x0_subset=x0_subset,
        out_subset=out_subset,
        rowscale_const=rowscale_const,
        out_numrows=out_numrows,
        dropout_p=dropout_p,
        is_rms_norm=is_rms_norm,
    )
    return normed.out, normed.x, normed.dropout_mask, normed.mean, normed.rstd


def _dropout_add_layer_norm_subset_backward(
    dz,
    dx,
    x,
    x0,
    dmask,
    mu,
    rsigma,
    gamma,
    colscale,
    x0_subset,
    out_subset,
    dropout_p,
    rowscale_const,
    x0_numrows,
    has_residual,
    is_rms_norm=False,
):
    """Return (dx0, dresidual, dgamma, dbeta[, dcolscale]); x0 is needed for dcolscale alone."""
    gradients = _backward(
        dz,
        dx,
        x,
        (dmask, None),
        mu,
        rsigma,
        (gamma, None),
        dropout_p,
        has_residual,
        is_rms_norm,
        x0=x0,
        colscale=colscale,
        x0_subset=x0_subset,
        out_subset=out_subset,
        rowscale_const=rowscale_const,
        x0_numrows=x0_numrows,
    )
    return _with_dcolscale(gradients, colscale)


def _dropout_add_layer_norm_parallel_residual_forward(
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
    is_rms_norm=False,
):
    """Return (out0, out1, the sum, dmask0, dmask1, mu, rsigma)."""
    normed = _forward(
        x0,
        residual,
        gamma0,
        beta0,
        epsilon,
        residual_in_fp32,
        x1=_matrix(x1),
        weight1=gamma1,
        bias1=beta1,
        dropout_p=dropout_p,
        is_rms_norm=is_rms_norm,
    )
    masks = normed.dropout_mask, normed.dropout_mask1
    return normed.out, normed.out1, normed.x, *masks, normed.mean, normed.rstd


def _dropout_add_layer_norm_parallel_residual_backward(
    dz0,
    dz1,
    dx,
    x,
    dmask0,
    dmask1,
    mu,
    rsigma,
    gamma0,
    gamma1,
    dropout_p,
    has_x1,
    has_residual,
    is_rms_norm=False,
):
    """Return (dx0, dx1, dresidual, dgamma0, dbeta0, dgamma1, dbeta1)."""
    return _backward(
        dz0,
        dx,
        x,
        (dmask0, dmask1),
        mu,
        rsigma,
        (gamma0, gamma1),
        dropout_p,
        has_residual,
        is_rms_norm,
        dz1=dz1,
        has_x1=has_x1,
    )[:7]
