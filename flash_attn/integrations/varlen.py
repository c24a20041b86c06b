"""``torch.nn.attention.varlen`` on the CPU by this package.

PyTorch's ``varlen_attn`` ends in the operators ``aten::_flash_attention_forward`` and
``aten::_flash_attention_backward``, which have no kernels for the CPU. ``sdpa.register()`` adds
these.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from flash_attn._buffers import new_gradient
from flash_attn._functions import BACKWARD, FORWARD, VARLEN_BACKWARD, VARLEN_FORWARD

__all__ = ["add_kernels"]


def _numbers(query, dropout_p, is_causal, scale, window_size_left, window_size_right) -> tuple:
    """p_dropout, softmax_scale, causal, window_left, window_right, softcap."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    left = -1 if window_size_left is None else window_size_left
    right = -1 if window_size_right is None else window_size_right
    return dropout_p, scale, is_causal, left, right, 0.0


def _cumulative_keys(cum_seq_k: Optional[Tensor], seqused_k: Optional[Tensor]) -> Tensor:
    """cu_seqlens_k, which a paged cache does without."""
    if cum_seq_k is not None:
        return cum_seq_k
    if seqused_k is None:
        raise ValueError("cum_seq_k may be None only with seqused_k")
    return torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))


def _run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Optional[Tensor],
    cum_seq_k: Optional[Tensor],
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: Optional[float] = None,
    window_size_left: Optional[int] = None,
    window_size_right: Optional[int] = None,
    seqused_k: Optional[Tensor] = None,
    alibi_slopes: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    num_splits: Optional[int] = None,
    out: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of a packed batch, or without cum_seq_q of a dense one."""
    window = (window_size_left, window_size_right)
    numbers = _numbers(query, dropout_p, is_causal, scale, *window)
    numbers_and_slopes = (*numbers, alibi_slopes, return_debug_mask)
    if cum_seq_q is None:
        args = FORWARD.complete((query, key, value, *numbers_and_slopes), {})
        return FORWARD.kernel(args, out=out)
    sequences = (cum_seq_q, _cumulative_keys(cum_seq_k, seqused_k), max_q, max_k)
    given = {"block_table": block_table, "seqused_k": seqused_k, "num_splits": num_splits or 0}
    args = VARLEN_FORWARD.complete((query, key, value, *sequences, *numbers_and_slopes), given)
    return VARLEN_FORWARD.kernel(args, out=out)


def _forward(query, *args, **kwargs):
    out, softmax_lse, s_dmask, rng_state = _run_forward(query, *args, **kwargs)
    return out, softmax_lse, rng_state, query.new_empty(0), s_dmask


def _forward_inplace(out, *args, **kwargs):
    _, softmax_lse, _, _ = _run_forward(*args, out=out, **kwargs)
    return softmax_lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Optional[Tensor],
    cum_seq_k: Optional[Tensor],
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: Optional[float] = None,
    window_size_left: Optional[int] = None,
    window_size_right: Optional[int] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = _numbers(query, dropout_p, is_causal, scale, window_size_left, window_size_right)
    gradients = new_gradient(query), new_gradient(key), new_gradient(value)
    tensors = (grad_out, query, key, value, out, logsumexp, *gradients)
    rng_state = rng_state if dropout_p > 0 else None
    if cum_seq_q is None:
        BACKWARD.kernel(BACKWARD.complete((*tensors, *numbers, None, False, rng_state), {}))
    else:
        args = (*tensors, cum_seq_q, cum_seq_k, max_q, max_k, *numbers, None, False, rng_state)
        VARLEN_BACKWARD.kernel(VARLEN_BACKWARD.complete(args, {}))
    return gradients


_KERNELS = {
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_inplace,
    "_flash_attention_backward": _backward,
}


def add_kernels(library: torch.library.Library) -> None:
    """Give PyTorch's operators of variable-length attention kernels for the CPU.

    Arguments:
        library: of namespace ``aten``; the kernels go when it does.
    """
    for name, kernel in _KERNELS.items():
        if hasattr(torch.ops.aten, name):
            library.impl(name, kernel, "CPU")
