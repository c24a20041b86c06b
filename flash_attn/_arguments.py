"""Arguments as callers give them: tensors and numbers, or an error that names the one at fault.

A torch tensor is not always what its memory holds: a negative view (``torch._neg_view``, ``imag``
of a conjugate) has the sign of its elements in a bit of its own, which DLPack does not pass on.
"""

from __future__ import annotations

from operator import index
from typing import Any, Callable, Optional

import torch
from torch import Tensor

_INTEGERS = (int, torch.SymInt)
_PLAIN = (Tensor, torch.nn.Parameter)


def wrong_kind(name: str, x: Any, expected: str = "a torch.Tensor") -> TypeError:
    """Return the TypeError of an argument that is not of the expected kind."""
    return TypeError(f"{name} must be {expected}, got {type(x).__name__}")


def wrong_pair(name: str, x: Any) -> TypeError:
    """Return the TypeError of an argument that is not a pair of ints."""
    return TypeError(f"{name} must be two ints, got {x!r:.80}")


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is a tensor of no subclass."""
    return x.__class__ in _PLAIN


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


def _is_symbolic(x: Any) -> bool:
    """Whether x is a tensor whose value torch traces or maps over: its own error says more."""
    return isinstance(x, Tensor) and (
        not is_plain(x) or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _not_one(name: str, x: Any, kind: str) -> TypeError:
    """Return the TypeError of what is not one number or bool."""
    if isinstance(x, Tensor):
        kind += " or a tensor of one element"
    return wrong_kind(name, x, kind)


def number(name: str, x: Any) -> float:
    """Return ``x``, a number or a tensor of one element, as a float."""
    if isinstance(x, (str, bytes, bytearray)):  # float() would read them
        raise wrong_kind(name, x, "a number")
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float holds") from None
    except (TypeError, ValueError, RuntimeError):
        if _is_symbolic(x):
            raise
        raise _not_one(name, x, "a number") from None


def flag(name: str, x: Any) -> bool:
    """Return ``x``, a bool of Python, numpy or torch, a number or None, as a bool."""
    if x.__class__ is not bool and x is not None and not hasattr(x, "__bool__"):
        raise wrong_kind(name, x, "a bool")
    try:
        return bool(x)
    except (TypeError, ValueError, RuntimeError):
        if _is_symbolic(x):
            raise
        raise _not_one(name, x, "a bool") from None


def as_int(name: str, x: Any) -> int:
    """Return ``x``, an integer or a 0-dim tensor, as an int; raise TypeError if it is neither.

    What torch.compile and torch.export trace as a number stays one that they trace.
    """
    if isinstance(x, _INTEGERS):
        return x
    if isinstance(x, Tensor):
        return _item(name, x)
    try:
        return index(x)
    except TypeError:
        raise wrong_kind(name, x, "an int or a torch.Tensor") from None


def _item(name: str, x: Tensor) -> int:
    try:
        item = x.item()
    except RuntimeError:
        if _is_symbolic(x):
            raise
        raise wrong_kind(name, x, "an int or a tensor of one element") from None
    if not isinstance(item, (float, complex)):
        return item
    if isinstance(item, float) and item.is_integer():
        return int(item)
    raise TypeError(f"{name} must be an integer, got {item}")


# ------------------------------------------------------------------------------------------------
# Tensors on their way to the library

_NAMES = """
q k v out dout dq dk dv softmax_lse dlse s_dmask rng_state alibi_slopes s_aux ds_aux attn_bias
dattn_bias cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table k_cache v_cache cache_seqlens
rotary_cos rotary_sin cache_batch_idx cache_leftpad
"""
_TENSORS = frozenset(_NAMES.split())


def are_plain(required: tuple, *optional) -> bool:
    """Whether all are tensors, or None among ``optional``, and hold their elements as they are."""
    try:
        for x in required:
            if x.is_neg():
                return False
        for x in optional:
            if x is not None and x.is_neg():
                return False
    except AttributeError:
        return False
    return True


def call_plain(function: Callable, arguments: dict, required: str, written: str = ""):
    """Return ``function(**arguments)`` with copies of the negative views among the arguments.

    ``required``: the names of tensors that must not be None; ``written``: those of tensors that the
    function writes to. Raises TypeError for what is not a tensor, RuntimeError for a negative view
    that would be written to.
    """
    plain = dict(arguments)
    for name in _TENSORS.intersection(arguments):
        x = arguments[name]
        if x is None and name not in required.split():
            continue
        check_tensors(**{name: x})
        if x.is_neg() and name in written.split():
            raise RuntimeError(f"{name} must not be a negative view (is_neg()): it is written to")
        plain[name] = x.resolve_neg()
    return function(**plain)


# What torch and the library raise for arguments that they cannot take.
ERRORS = (BufferError, NotImplementedError, OverflowError, RuntimeError, TypeError, ValueError)
_INT64 = range(-(2**63), 2**63)


def not_dense(name: str, x: Tensor) -> Optional[RuntimeError]:
    """Return the error of a tensor that no backend reads, None for one that is as it should be."""
    kind = None
    if x.is_nested:
        kind = "a nested tensor"
    elif x.is_quantized:
        kind = "a quantized tensor"
    elif x.layout != torch.strided:
        kind = f"layout {x.layout}"
    elif not (x.is_cpu or x.is_cuda):
        kind = f"one on {x.device}"
    if kind is None:
        return None
    return RuntimeError(f"{name} must be a dense (strided) tensor on CPU or CUDA, got {kind}")


def explained(error: Exception, arguments: dict) -> Exception:
    """Return an error that names the argument that made a call fail, or ``error`` itself."""
    for name, x in arguments.items():
        if isinstance(x, Tensor) and name in _TENSORS:
            found = not_dense(name, x)
            if found is not None:
                return found
        if isinstance(x, int) and x not in _INT64:
            return ValueError(f"{name} must be an integer of 64 bits, got {x}")
    return error
