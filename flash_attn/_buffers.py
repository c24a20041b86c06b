"""Buffers that the operators hand to the library: shapes, dtypes, and the dropout's random state.

Arguments are checked in the library alone, so the shapes made here from malformed tensors are a
best effort: no error is raised, and the library rejects the call before it reads or writes
anything.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

_FP32 = torch.empty(0, dtype=torch.float32, device="cpu")


def maybe_contiguous(x: Optional[Tensor]) -> Optional[Tensor]:
    """Return ``x``, copied only if its last dimension lacks unit stride. None stays None."""
    if x is None or x.is_contiguous() or x.stride(-1) == 1:
        return x
    return x.contiguous()


def round_multiple(x: int, m: int) -> int:
    """Return the smallest multiple of ``m`` that is at least ``x``."""
    return (x + m - 1) // m * m


def new_rng_state(dropout_p: float) -> Tensor:
    """Return int64 [2] = {seed, offset} on the CPU.

    With dropout both are drawn from torch's default CPU generator, without they are zeros.
    """
    if dropout_p > 0.0:
        return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device="cpu")
    return torch.zeros(2, dtype=torch.int64, device="cpu")


def raise_versions(*written: Optional[Tensor]) -> None:
    """Tell autograd that a caller's tensors were written to; None and inference tensors aside."""
    for x in written:
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)


def dense_out(q: Tensor, v: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Return an uninitialised out, (batch, seqlen_q, nheads, headdim_v), default dtype of q."""
    shape, shape_v = q.shape, v.shape
    if len(shape) != 4 or len(shape_v) != 4:
        return torch.empty(0)
    if q.__class__ is Tensor and shape[3] == shape_v[3] and q.is_contiguous():
        return torch.empty_like(q, dtype=dtype)  # the quickest
    return q.new_empty((*shape[:3], shape_v[3]), dtype=dtype)


def dense_lse(q: Tensor) -> Tensor:
    """Return an uninitialised softmax_lse, fp32 (batch, nheads, seqlen_q)."""
    if q.dim() != 4:
        return torch.empty(0)
    batch, seqlen_q, nheads, _ = q.shape
    if q.is_cpu and q.__class__ is Tensor:
        return _FP32.new_empty(batch, nheads, seqlen_q)  # the quickest
    return q.new_empty((batch, nheads, seqlen_q), dtype=torch.float32)


def dense_s_dmask(q: Tensor, k: Tensor) -> Tensor:
    """Return an uninitialised S_dmask, (batch, nheads, ceil128(seqlen_q), ceil128(seqlen_k))."""
    if q.dim() != 4 or k.dim() != 4:
        return torch.empty(0)
    batch, seqlen_q, nheads, _ = q.shape
    rows, cols = round_multiple(seqlen_q, 128), round_multiple(k.shape[1], 128)
    return q.new_empty((batch, nheads, rows, cols))


def dense_softmax_d(q: Tensor) -> Tensor:
    """Return an uninitialised softmax_d, fp32 (batch, nheads, ceil128(seqlen_q))."""
    if q.dim() != 4:
        return torch.empty(0)
    batch, seqlen_q, nheads, _ = q.shape
    return q.new_empty((batch, nheads, round_multiple(seqlen_q, 128)), dtype=torch.float32)


def varlen_out(q: Tensor, v: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Return an uninitialised out, (total_q, nheads, headdim_v), default dtype of q.

    v may be paged.
    """
    shape, shape_v = q.shape, v.shape
    if len(shape) != 3 or not shape_v:
        return torch.empty(0)
    if q.__class__ is Tensor and shape[2] == shape_v[-1] and q.is_contiguous():
        return torch.empty_like(q, dtype=dtype)  # the quickest
    return q.new_empty((*shape[:2], shape_v[-1]), dtype=dtype)


def varlen_lse(q: Tensor) -> Tensor:
    """Return an uninitialised softmax_lse, fp32 (nheads, total_q)."""
    if q.dim() != 3:
        return torch.empty(0)
    return q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def varlen_s_dmask(q: Tensor, k: Tensor, cu_seqlens_q, cu_seqlens_k, *max_seqlens) -> Tensor:
    """Return an uninitialised S_dmask, (b, nheads, ceil128(max_seqlen_q), ceil128(max_seqlen_k)).

    ceil128 rounds up to a multiple of 128.
    """
    if q.dim() != 3 or cu_seqlens_q.dim() != 1:
        return torch.empty(0)
    batch = max(cu_seqlens_q.shape[0] - 1, 0)
    rows, cols = (round_multiple(torch.sym_max(n, 0), 128) for n in max_seqlens)
    return q.new_empty((batch, q.shape[1], rows, cols))


def varlen_softmax_d(q: Tensor, cu_seqlens_q: Tensor, *sequences) -> Tensor:
    """Return an uninitialised softmax_d, fp32 (nheads, total_q + 128 * batch)."""
    if q.dim() != 3 or cu_seqlens_q.dim() != 1:
        return torch.empty(0)
    columns = q.shape[0] + 128 * max(cu_seqlens_q.shape[0] - 1, 0)
    return q.new_empty((q.shape[1], columns), dtype=torch.float32)


def new_gradient(x: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Return an uninitialised contiguous tensor with the shape, device and dtype of ``x``."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


class Layout(NamedTuple):
    """How a batch lies in memory: what makes the buffers of its results.

    ``sequences``: nothing, or cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k.
    """

    out: Callable[..., Tensor]  # (q, v, dtype=None)
    lse: Callable[..., Tensor]  # (q)
    s_dmask: Callable[..., Tensor]  # (q, k, *sequences)
    softmax_d: Callable[..., Tensor]  # (q, *sequences)


DENSE = Layout(dense_out, dense_lse, dense_s_dmask, dense_softmax_d)
PACKED = Layout(varlen_out, varlen_lse, varlen_s_dmask, varlen_softmax_d)
