"""Cross entropy of ``hidden @ weight.T + bias`` without the logits of all rows at a time.

Rows go in chunks: a chunk's logits are made, turned into its losses, then in their own memory into
their gradient, and that into what it adds to the gradients of hidden, weight and bias (Liger,
arXiv:2410.10989; compare Cut Cross-Entropy, arXiv:2411.09009). Chunks follow each other in a fixed
order.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn._fused import Fused
from flash_attn.ops.cross_entropy import (
    SCHEMA_OPTIONS,
    Options,
    gather_states,
    gradient,
    losses_and_state,
)

# Memory is a tenth of the logits' at most, as far as chunks of the least rows allow: a chunk, and
# sums in fp32 of what is 16-bit. Fewer chunks are fewer roundings of sums that are not in fp32.
_CHUNKS, _CHUNKS_BESIDE_FP32, _LEAST_ROWS = 12, 24, 32
_FP32_SHARE = 0.05
_PRODUCT_ELEMENTS = 1 << 20  # of a product that is added to them


def rows_of_chunk(rows: int, in_fp32: bool = False) -> int:
    """Return how many rows a chunk has; the last may have fewer.

    in_fp32: sums in fp32 take memory beside it.
    """
    chunks = _CHUNKS_BESIDE_FP32 if in_fp32 else _CHUNKS
    chunks = max(min(chunks, rows // _LEAST_ROWS), 1)
    return max(-(-rows // chunks), 1)


def sums_in_fp32(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether fp32 sums for the weight's gradient are small beside the logits."""
    logits = hidden.shape[0] * weight.shape[0] * hidden.element_size()
    return 4 * weight.numel() <= _FP32_SHARE * logits


class _WeightGradient:
    """dlogits.T @ hidden of all rows, summed up chunk by chunk."""

    def __init__(self, weight: Tensor, in_fp32: bool):
        self._is_separate = in_fp32 and weight.dtype != torch.float32
        dtype = torch.float32 if self._is_separate else weight.dtype
        self._sum = torch.zeros_like(
            weight, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False
        )
        self._dtype = weight.dtype

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        if not self._is_separate:
            self._sum.addmm_(dlogits.t(), hidden)
            return
        classes = max(_PRODUCT_ELEMENTS // max(hidden.shape[1], 1), 1)
        for part, of_sum in zip(dlogits.split(classes, 1), self._sum.split(classes)):
            of_sum += part.t() @ hidden

    def result(self) -> Tensor:
        return self._sum.to(self._dtype)


def _kernel(hidden, weight, labels, bias, dlosses, wants, in_fp32, group, *numbers):
    wants_hidden, wants_weight, wants_bias = wants
    options, shards = Options(*numbers), _Shards(group, weight)
    losses, z_losses, dhidden, *_ = _fake(hidden, weight, labels, bias, dlosses, wants)
    dweight = _WeightGradient(weight, in_fp32) if wants_weight else None
    dbias = hidden.new_zeros(weight.shape[0] if wants_bias else 0, dtype=torch.float32)
    if labels.is_cpu:  # all, before anything is made of them
        losses_and_state(hidden[:, :0], labels, options._replace(class_start=0))
    size = rows_of_chunk(hidden.shape[0], in_fp32)
    buffer = hidden.new_empty(size, weight.shape[0])
    for first in range(0, hidden.shape[0], size):
        rows = slice(first, first + size)
        logits = _product(hidden[rows], weight, bias, buffer)
        state = shards.losses_and_state(logits, labels[rows], options, losses[rows], z_losses[rows])
        if not any(wants):
            continue
        dlogits = gradient(dlosses[rows], logits, labels[rows], state, options, in_place=True)
        if wants_hidden:
            shards.sum_up(dlogits, weight, dhidden[rows])
        if wants_weight:
            dweight.add(dlogits, hidden[rows])
        if wants_bias:
            dbias += dlogits.sum(0, dtype=torch.float32)
    of_weight = dweight.result() if wants_weight else hidden.new_empty(0)
    return losses, z_losses, dhidden, of_weight, dbias.to(hidden.dtype)


def _product(hidden, weight, bias, buffer):
    out = buffer[: hidden.shape[0]]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


class _Shards:
    """The classes of this process, and the sums over the group that has all of them."""

    def __init__(self, name: str, weight: Tensor):
        self._classes = weight.shape[0]
        self._group = dist.distributed_c10d._resolve_process_group(name) if name else None

    def losses_and_state(self, logits, labels, options, losses, z_losses) -> Tensor:
        """Return the state of all classes; write the losses."""
        of_rows, z_of_rows, state = losses_and_state(logits, labels, options)
        if self._group is not None:
            of_rows, z_of_rows, state = gather_states(logits, labels, state, options, self._group)
        losses.copy_(of_rows)
        z_losses.copy_(z_of_rows)
        return state

    def sum_up(self, dlogits, weight, dhidden) -> None:
        """Write the gradient of a chunk of hidden."""
        if self._group is None:
            torch.mm(dlogits, weight, out=dhidden)
            return
        part = (dlogits @ weight).float()
        dist.all_reduce(part, group=self._group)
        dhidden.copy_(part)


def _fake(hidden, weight, labels, bias, dlosses, wants, *_):
    wants_hidden, wants_weight, wants_bias = wants
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape if wants_hidden else 0)
    dweight = hidden.new_empty(weight.shape if wants_weight else 0)
    dbias = hidden.new_empty(weight.shape[0] if wants_bias else 0)
    return losses, torch.empty_like(losses), dhidden, dweight, dbias


_losses_and_gradients = Fused(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, "
    f"Tensor? dlosses, bool[3] wants, bool in_fp32, str group, {SCHEMA_OPTIONS}) -> "
    "(Tensor losses, Tensor z_losses, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _kernel,
    _fake,
)


def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional[Tensor],
    dlosses: Optional[Tensor],
    wants: tuple[bool, bool, bool],
    in_fp32: bool,
    group: str,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return losses, z_losses, and gradients of hidden, weight and bias.

    Args:
        hidden: ``(rows, features)``.
        weight: ``(classes, features)``; bias: ``(classes,)``.
        labels: ``(rows,)``, contiguous.
        dlosses: fp32 ``(rows,)``, contiguous: gradient of the losses.
        wants: which of the three gradients; others are empty.
        in_fp32: the weight's gradient is summed up in fp32 whatever its dtype.
        group: name of the process group whose members have equal shares of the classes; "": none.
        options: of the classes in weight.
    """
    return _losses_and_gradients(
        hidden, weight, labels, bias, dlosses, list(wants), in_fp32, group, *options
    )
