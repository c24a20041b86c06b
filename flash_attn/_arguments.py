"""Arguments as callers give them: tensors and numbers, or an error that names the one at fault.

A torch tensor is not always what its memory holds: a negative view (``torch._neg_view``, ``imag``
of a conjugate) has the sign of its elements in a bit of its own, which DLPack does not pass on.
"""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (int, torch.SymInt)


def wrong_kind(name: str, x: Any, expected: str = "a torch.Tensor") -> TypeError:
    """Return the TypeError of an argument that is not of the expected kind."""
    return TypeError(f"{name} must be {expected}, got {type(x).__name__}")


def check_tensors(**tensors) -> None:
    """Raise TypeError for the first argument that is not a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise wrong_kind(name, x)


def check_optional(**tensors) -> None:
    """Raise TypeError for the first argument that is neither a tensor nor None."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise wrong_kind(name, x)


def number(name: str, x: Any) -> float:
    """Return ``x``, a number or a tensor of one element, as a float."""
    if isinstance(x, (str, bytes, bytearray)):  # float() would read them
        raise wrong_kind(name, x, "a number")
    try:
        return float(x)
    except TypeError:
        raise wrong_kind(name, x, "a number") from None


def flag(name: str, x: Any) -> bool:
    """Return ``x``, a bool of Python, numpy or torch, a number or None, as a bool."""
    if x.__class__ is bool:
        return x
    if x is not None and not hasattr(x, "__bool__"):
        raise wrong_kind(name, x, "a bool")
    return bool(x)


def as_int(name: str, x: Any) -> int:
    """Return ``x``, an integer or a 0-dim tensor, as an int; raise TypeError if it is neither.

    What torch.compile and torch.export trace as a number stays one that they trace.
    """
    if isinstance(x, _INTEGERS):
        return x
    if isinstance(x, Tensor):
        item = x.item()
        return int(item) if isinstance(item, float) else item
    try:
        return index(x)
    except TypeError:
        raise wrong_kind(name, x, "an int or a torch.Tensor") from None


def four_dims(attn_bias: Any) -> Any:
    """Return ``attn_bias``, if it is a tensor, with leading dimensions of size 1 up to four."""
    if attn_bias is None or not isinstance(attn_bias, Tensor) or attn_bias.dim() >= 4:
        return attn_bias
    return attn_bias[(None,) * (4 - attn_bias.dim())]


def without_negation(name: str, x: Tensor, is_written: bool) -> Tensor:
    """Return a copy of ``x``, a negative view, as its elements are; raise if it is written to."""
    if is_written:
        raise RuntimeError(f"{name} must not be a negative view (is_neg()): it is written to")
    return x.resolve_neg()
