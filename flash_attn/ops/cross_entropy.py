"""Operators of cross entropy: rows of logits to losses, and to their gradient.

With z = logit_scale * logits, a row's loss is ``lse(z) - (1 - label_smoothing) z[label] -
label_smoothing mean(z) + lse_square_scale lse(z)^2``, or 0 where the label is ignore_index. The
classes of a row may lie in several tensors. What is known of those seen so far is the row's state,
fp32 ``(rows, 4)``: see flash_attn/xentropy.h. Nothing here has a derivative.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn._buffers import raise_versions
from flash_attn._fused import Fused, new_like
from flash_attn._library import bind

_OPTIONS = "label_smoothing logit_scale lse_square_scale ignore_index class_start num_classes"
_run_forward = bind(
    "xentropy_fwd",
    f"logits labels precomputed_lse {_OPTIONS} classes_before state losses z_losses",
)
_run_backward = bind("xentropy_bwd", f"dlosses logits labels state {_OPTIONS} dlogits")

SCHEMA_OPTIONS = (
    "float label_smoothing, float logit_scale, float lse_square_scale, int ignore_index, "
    "int class_start, int num_classes"
)


class Options(NamedTuple):
    """What operators take beside tensors.

    Columns of the logits are the classes ``class_start``, ... of ``num_classes``.
    """

    label_smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int
    class_start: int
    num_classes: int


def _forward_kernel(logits, labels, precomputed_lse, before, *options_and_count):
    losses, z_losses, state = _fake_forward(logits)
    if before is None and options_and_count[-1] != 0:
        raise ValueError(f"classes_before must be 0 without before, got {options_and_count[-1]}")
    if before is not None:
        if before.shape != state.shape:
            shapes = f"{tuple(state.shape)}, got {tuple(before.shape)}"
            raise ValueError(f"before must have the shape (rows, 4) = {shapes}")
        state.copy_(before)
    results = state, losses, z_losses
    _run_forward(logits, labels, precomputed_lse, *options_and_count, *results)
    return losses, z_losses, state


def _fake_forward(logits, *_):
    rows = logits.shape[0]
    losses = logits.new_empty(rows, dtype=torch.float32)
    return losses, torch.empty_like(losses), losses.new_empty(rows, 4)


def _backward_kernel(dlosses, logits, labels, state, *options):
    dlogits = new_like(logits)
    _run_backward(dlosses, logits, labels, state, *options, dlogits)
    return dlogits


def _in_place_kernel(dlosses, logits, labels, state, *options):
    _run_backward(dlosses, logits, labels, state, *options, logits)


_forward = Fused(
    "cross_entropy_fwd(Tensor logits, Tensor labels, Tensor? precomputed_lse, Tensor? before, "
    f"{SCHEMA_OPTIONS}, int classes_before) -> (Tensor losses, Tensor z_losses, Tensor state)",
    _forward_kernel,
    _fake_forward,
)
_backward = Fused(
    "cross_entropy_bwd(Tensor dlosses, Tensor logits, Tensor labels, Tensor state, "
    f"{SCHEMA_OPTIONS}) -> Tensor dlogits",
    _backward_kernel,
    lambda dlosses, logits, *_: new_like(logits),
)
_backward_in_place = Fused(
    "cross_entropy_bwd_(Tensor dlosses, Tensor(a!) logits, Tensor labels, Tensor state, "
    f"{SCHEMA_OPTIONS}) -> ()",
    _in_place_kernel,
    lambda *_: None,
)


def losses_and_state(
    logits: Tensor,
    labels: Tensor,
    options: Options,
    precomputed_lse: Optional[Tensor] = None,
    before: Optional[Tensor] = None,
    classes_before: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the logits and the classes before them amount to.

    Args:
        logits: fp16, bf16 or fp32 ``(rows, cols)`` with last stride 1; cols may be 0.
        labels: int32 or int64 ``(rows,)``, contiguous.
        precomputed_lse: fp32 ``(rows,)``, contiguous: lse of the logits; None: it is computed.
        before: a state, to which the logits are added; None: there is none.
        classes_before: how many classes that state has seen.

    Returns:
        losses, z_losses: fp32 ``(rows,)``: of use once the state has all classes. The second is the
            part of the first that is ``lse_square_scale lse^2``.
        state: fp32 ``(rows, 4)``.
    """
    return _forward(logits, labels, precomputed_lse, before, *options, classes_before)


def gradient(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    options: Options,
    in_place: bool = False,
) -> Tensor:
    """Return the gradient of the logits, of their shape and dtype.

    Args:
        dlosses: fp32 ``(rows,)``, contiguous: of the losses.
        logits, labels, options: of ``losses_and_state``.
        state: with all classes.
        in_place: the gradient is written over the logits, as their version tells.
    """
    if not in_place:
        return _backward(dlosses, logits, labels, state, *options)
    dlogits = logits.detach()
    _backward_in_place(dlosses, dlogits, labels, state, *options)
    raise_versions(logits)
    return dlogits


def gather_states(
    logits: Tensor, labels: Tensor, state: Tensor, options: Options, process_group
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``losses_and_state`` of the classes of all processes, of those of each.

    Args:
        logits, labels, state, options: this process's; all have equally many classes.
        process_group: any backend; one collective.
    """
    states = state.new_empty(dist.get_world_size(process_group), *state.shape)
    dist.all_gather(list(states.unbind(0)), state, process_group)
    merged = _merge_states(states, logits.shape[1])
    none = logits[:, :0]
    return losses_and_state(
        none, labels, options, before=merged, classes_before=options.num_classes
    )


def _merge_states(states: Tensor, classes: int) -> Tensor:
    """Return the state of all classes, from those of parts of them, ``classes`` each."""
    largest, sums, label, centred = states.unbind(-1)
    highest = largest.amax(0)
    steps = _anchor(largest) - _anchor(highest)
    columns = (
        highest,
        torch.where(sums == 0, 0.0, sums * steps.exp()).sum(0),
        label.sum(0),
        (centred + classes * steps).sum(0),
    )
    return torch.stack(columns, -1)


def _anchor(largest: Tensor) -> Tensor:
    return torch.where(largest == -torch.inf, 0.0, largest)
