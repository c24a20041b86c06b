"""The operators, each declared once: as a function with the parameters that callers know.

The functions of the four operators that FlashAttention-2 has take its parameters, too: window_size
comes as two numbers and softmax_scale as a number; extensions are keyword-only. Everything else is
as in ``flash_attn_interface.py``. ``declare`` makes the operator's schema of the signature, and the
function's body: it converts the arguments and calls the operator.

- ``_flash_attn_forward``, ``_flash_attn_varlen_forward``: (out, softmax_lse, S_dmask, rng_state);
  differentiable in q, k, v, s_aux, attn_bias and alibi_slopes through both out and softmax_lse
  (``_autograd.py``).
- ``_flash_attn_backward``, ``_flash_attn_varlen_backward``: write dq, dk, dv (and ds_aux,
  dattn_bias), return softmax_d.
- ``_flash_attn_kvcache_forward``, ``_flash_attn_kvcache_append_forward``: (out, softmax_lse); the
  second first appends k and v to the cache in place. Without gradient.
- ``_flash_attn_fp8_*``: (out, softmax_lse) of tensors in fp8, which come with factors. Without
  gradient.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn._schema import Operator, declare

_RESULTS = "(Tensor out, Tensor softmax_lse, Tensor S_dmask, Tensor rng_state)"
_CACHE_RESULTS = "(Tensor out, Tensor softmax_lse)"
_INPUTS = "q k v s_aux attn_bias alibi_slopes"
_GRADIENTS = "dq dk dv ds_aux dattn_bias"


@declare(_RESULTS, differentiable=_INPUTS)
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


@declare(_RESULTS, differentiable=_INPUTS)
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


@declare("Tensor", written=_GRADIENTS)
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


@declare("Tensor", written=_GRADIENTS)
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


@declare(_CACHE_RESULTS)
def _flash_attn_kvcache_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Optional[Tensor],
    rotary_cos: Optional[Tensor],
    rotary_sin: Optional[Tensor],
    cache_batch_idx: Optional[Tensor],
    cache_leftpad: Optional[Tensor],
    block_table: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
    *,
    s_aux: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache that stays as it is: (out, softmax_lse)."""


@declare(_CACHE_RESULTS, written="k_cache v_cache")
def _flash_attn_kvcache_append_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor],
    v: Optional[Tensor],
    cache_seqlens: Optional[Tensor],
    rotary_cos: Optional[Tensor],
    rotary_sin: Optional[Tensor],
    cache_batch_idx: Optional[Tensor],
    cache_leftpad: Optional[Tensor],
    block_table: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
    *,
    s_aux: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """Append k and v to the cache in place and attend over it: (out, softmax_lse)."""


@declare(_CACHE_RESULTS)
def _flash_attn_fp8_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    *,
    s_aux: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a dense batch with k and v, or q as well, in float8_e4m3fn: (out, softmax_lse).

    They stand for ``q * q_descale``, ``k * k_descale``, ``v * v_descale``: fp32 (batch, nheads_k),
    or (batch, nheads_k, ceil(seqlen / 128)) with a factor for each 128 rows. out has the dtype of
    q; of q in fp8 ``out_dtype``, default bf16.
    """


@declare(_CACHE_RESULTS)
def _flash_attn_fp8_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    block_table: Optional[Tensor],
    leftpad_k: Optional[Tensor],
    seqused_k: Optional[Tensor],
    num_splits: int,
    *,
    s_aux: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """The same of a packed batch, whose rows count from their sequence's own start."""


@declare(_CACHE_RESULTS)
def _flash_attn_fp8_kvcache_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Optional[Tensor],
    cache_batch_idx: Optional[Tensor],
    cache_leftpad: Optional[Tensor],
    block_table: Optional[Tensor],
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    num_splits: int,
    *,
    s_aux: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """The same over a cache that stays as it is, whose rows count from a sequence's first."""


@declare(_CACHE_RESULTS, written="k_cache v_cache")
def _flash_attn_fp8_kvcache_append_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor],
    v: Optional[Tensor],
    cache_seqlens: Optional[Tensor],
    cache_batch_idx: Optional[Tensor],
    cache_leftpad: Optional[Tensor],
    block_table: Optional[Tensor],
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    num_splits: int,
    *,
    s_aux: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """The same after k and v, in the cache's dtype, are appended to it in place."""


FORWARD: Operator = _flash_attn_forward.operator
VARLEN_FORWARD: Operator = _flash_attn_varlen_forward.operator
BACKWARD: Operator = _flash_attn_backward.operator
VARLEN_BACKWARD: Operator = _flash_attn_varlen_backward.operator
KVCACHE: Operator = _flash_attn_kvcache_forward.operator
KVCACHE_APPEND: Operator = _flash_attn_kvcache_append_forward.operator
FP8_FORWARD: Operator = _flash_attn_fp8_forward.operator
FP8_VARLEN_FORWARD: Operator = _flash_attn_fp8_varlen_forward.operator
FP8_KVCACHE: Operator = _flash_attn_fp8_kvcache_forward.operator
FP8_KVCACHE_APPEND: Operator = _flash_attn_fp8_kvcache_append_forward.operator

FP8_OPERATORS = (FP8_FORWARD, FP8_VARLEN_FORWARD, FP8_KVCACHE, FP8_KVCACHE_APPEND)
OPERATORS = (
    *(FORWARD, VARLEN_FORWARD, BACKWARD, VARLEN_BACKWARD, KVCACHE, KVCACHE_APPEND),
    *FP8_OPERATORS,
)
