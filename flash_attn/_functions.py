"""The four operators as functions, with the parameters that callers of FlashAttention-2 know.

window_size comes as two numbers and softmax_scale as a number; extensions are keyword-only.
Everything else is as in ``flash_attn_interface.py``.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn import _autograd  # noqa: F401  (defines the operators and their gradients)
from flash_attn._arguments import as_int, check_optional, check_tensors, flag, number
from flash_attn._eager import refuse_tangents

_forward_op = torch.ops.flash_attn._flash_attn_forward.default
_varlen_forward_op = torch.ops.flash_attn._flash_attn_varlen_forward.default
_backward_op = torch.ops.flash_attn._flash_attn_backward.default
_varlen_backward_op = torch.ops.flash_attn._flash_attn_varlen_backward.default


def score_numbers(
    dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap
) -> tuple:
    """Return the numbers of the operators' arguments, in their order."""
    if (
        dropout_p.__class__ is softmax_scale.__class__ is softcap.__class__ is float
        and causal.__class__ is bool
        and window_size_left.__class__ is window_size_right.__class__ is int
    ):
        return dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap
    return (
        number("dropout_p", dropout_p),
        number("softmax_scale", softmax_scale),
        flag("causal", causal),
        as_int("window_size_left", window_size_left),
        as_int("window_size_right", window_size_right),
        number("softcap", softcap),
    )


def four_dims(attn_bias: Optional[Tensor]) -> Optional[Tensor]:
    """Return ``attn_bias`` with leading dimensions of size 1 up to four."""
    if attn_bias is None or attn_bias.dim() >= 4:
        return attn_bias
    return attn_bias[(None,) * (4 - attn_bias.dim())]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    return_softmax: bool,
    *,
    s_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of a dense batch, as flash_attn_func: (out, softmax_lse, S_dmask, rng_state).

    ``return_softmax`` needs dropout_p > 0 and makes S_dmask non-empty. ``rng_state`` is int64 [2]
    on the CPU.
    """
    check_tensors(q=q, k=k, v=v)
    check_optional(alibi_slopes=alibi_slopes, s_aux=s_aux, attn_bias=attn_bias)
    return _forward_op(
        q,
        k,
        v,
        *score_numbers(
            dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap
        ),
        alibi_slopes,
        flag("return_softmax", return_softmax),
        s_aux=s_aux,
        attn_bias=four_dims(attn_bias),
    )


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    return_softmax: bool = False,
    block_table: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
    *,
    s_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of a packed batch: (out, softmax_lse, S_dmask, rng_state).

    The arguments and results are those of flash_attn_varlen_func.
    ``leftpad_k`` and ``seqused_k``, int32 (batch,): keys skipped at a sequence's start, and keys
    used of it. ``zero_tensors`` is accepted and has no effect: every output element is written.
    ``num_splits``: 0 is a heuristic, n splits the keys n times. There is no backward with
    ``block_table``, ``leftpad_k`` or ``seqused_k``.
    """
    check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_optional(alibi_slopes=alibi_slopes, s_aux=s_aux, attn_bias=attn_bias)
    check_optional(block_table=block_table, leftpad_k=leftpad_k, seqused_k=seqused_k)
    return _varlen_forward_op(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        as_int("max_seqlen_q", max_seqlen_q),
        as_int("max_seqlen_k", max_seqlen_k),
        *score_numbers(
            dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap
        ),
        alibi_slopes,
        flag("return_softmax", return_softmax),
        block_table,
        leftpad_k,
        seqused_k,
        flag("zero_tensors", zero_tensors),
        as_int("num_splits", num_splits),
        s_aux=s_aux,
        attn_bias=four_dims(attn_bias),
    )


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    deterministic: bool,
    rng_state: Optional[Tensor] = None,
    *,
    dlse: Optional[Tensor] = None,
    s_aux: Optional[Tensor] = None,
    ds_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
    dattn_bias: Optional[Tensor] = None,
) -> Tensor:
    """Gradients of ``_flash_attn_forward``: writes dq, dk, dv where given, returns softmax_d.

    ``dlse``: gradient of softmax_lse. ``ds_aux``, fp32 (nheads,), must come with s_aux;
    ``dattn_bias``, fp32 of attn_bias's shape, may. softmax_d, fp32 (batch, nheads, seqlen_q rounded
    up to 128), is rowsum(dout * out) - dlse.
    """
    refuse_tangents("_flash_attn_backward", dout, q, k, v, dlse, s_aux, attn_bias)
    refuse_tangents("_flash_attn_backward", out, softmax_lse, alibi_slopes)
    check_tensors(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=softmax_lse)
    check_optional(dq=dq, dk=dk, dv=dv)
    check_optional(alibi_slopes=alibi_slopes, rng_state=rng_state, dlse=dlse)
    check_optional(s_aux=s_aux, ds_aux=ds_aux, attn_bias=attn_bias, dattn_bias=dattn_bias)
    return _backward_op(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        *score_numbers(
            dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap
        ),
        alibi_slopes,
        flag("deterministic", deterministic),
        rng_state,
        dlse=dlse,
        s_aux=s_aux,
        ds_aux=ds_aux,
        attn_bias=four_dims(attn_bias),
        dattn_bias=four_dims(dattn_bias),
    )


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    deterministic: bool,
    rng_state: Optional[Tensor] = None,
    zero_tensors: bool = False,
    *,
    dlse: Optional[Tensor] = None,
    s_aux: Optional[Tensor] = None,
    ds_aux: Optional[Tensor] = None,
    attn_bias: Optional[Tensor] = None,
    dattn_bias: Optional[Tensor] = None,
) -> Tensor:
    """Gradients of ``_flash_attn_varlen_forward``: as ``_flash_attn_backward`` for a packed batch.

    softmax_d is fp32 (nheads, total_q + 128 * batch); sequence s starts at column ``cu_seqlens_q[s]
    + 128 * s``.
    """
    refuse_tangents("_flash_attn_varlen_backward", dout, q, k, v, dlse, s_aux, attn_bias)
    refuse_tangents("_flash_attn_varlen_backward", out, softmax_lse, alibi_slopes)
    check_tensors(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=softmax_lse)
    check_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_optional(dq=dq, dk=dk, dv=dv)
    check_optional(alibi_slopes=alibi_slopes, rng_state=rng_state, dlse=dlse)
    check_optional(s_aux=s_aux, ds_aux=ds_aux, attn_bias=attn_bias, dattn_bias=dattn_bias)
    return _varlen_backward_op(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        as_int("max_seqlen_q", max_seqlen_q),
        as_int("max_seqlen_k", max_seqlen_k),
        *score_numbers(
            dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap
        ),
        alibi_slopes,
        flag("deterministic", deterministic),
        rng_state,
        flag("zero_tensors", zero_tensors),
        dlse=dlse,
        s_aux=s_aux,
        ds_aux=ds_aux,
        attn_bias=four_dims(attn_bias),
        dattn_bias=four_dims(dattn_bias),
    )
