"""Arguments as callers give them: tensors and numbers, or an error that names the one at fault.

A torch tensor is not always what its memory holds: a negative view (``torch._neg_view``, ``imag``
of a conjugate) has the sign of its elements in a bit of its own, which DLPack does not pass on.
"""

from __future__ import annotations

import re
from operator import index
from typing import Any, Optional

import torch
from torch import Tensor

_INTEGERS = (int, torch.SymInt)
_PLAIN = (Tensor, torch.nn.Parameter)
_INT64 = range(-(2**63), 2**63)
FP8 = getattr(torch, "float8_e4m3fn", None)  # with factors, which most operators do not take

# What torch and the library raise for arguments that they cannot take.
ERRORS = (BufferError, NotImplementedError, OverflowError, RuntimeError, TypeError, ValueError)


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


def check_operands(optional: Optional[dict] = None, /, **tensors) -> None:
    """Raise for the first argument that an operator cannot read beside the first one.

    Args:
        optional: tensors that may be None, by their names.
        tensors: those that may not.

    Raises TypeError for what is no tensor, RuntimeError for a tensor that is not dense, and
    ValueError for one on another device than the first tensor.
    """
    first = None
    for name, x in (*tensors.items(), *(optional or {}).items()):
        if x is None and name not in tensors:
            continue
        if not isinstance(x, Tensor):
            raise wrong_kind(name, x)
        if x.layout is not torch.strided or x.is_nested or x.is_quantized:
            raise not_dense(name, x)
        if first is None:
            first = name, x.device
        elif x.device != first[1]:
            raise ValueError(f"{name} must be on {first[0]}'s device, {first[1]}, got {x.device}")


def check_subset(name: str, subset: Any) -> None:
    """Raise TypeError for an index of tokens that would drop their dimension, or is none."""
    if isinstance(subset, Tensor) and subset.dim() == 1:
        return
    if subset is not None and not isinstance(subset, (slice, list, range)):
        got = f"a {subset.dim()}-dim tensor" if isinstance(subset, Tensor) else f"{subset!r:.80}"
        raise TypeError(f"{name} must be a slice, a list or a 1-dim tensor, got {got}")


def check_dtype(name: str, dtype: Any, choices: tuple) -> None:
    """Raise for a dtype that is none, or not one of ``choices``."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {dtype!r:.80}")
    if dtype not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {dtype}")


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
    if x.__class__ is bool:
        return x
    if x is not None and not hasattr(x, "__bool__"):
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


def as_int64(name: str, x: Any) -> int:
    """Return ``as_int`` of what 64 bits hold; raise ValueError for other integers."""
    x = as_int(name, x)
    if isinstance(x, int) and x not in _INT64:
        raise _no_int64(name, x)
    return x


def _no_int64(name: str, x: int) -> ValueError:
    return ValueError(f"{name} must be an integer of 64 bits, got {x}")


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


def four_dims(attn_bias: Any) -> Any:
    """Return ``attn_bias``, if it is a tensor, with leading dimensions of size 1 up to four."""
    if attn_bias is None or not isinstance(attn_bias, Tensor) or attn_bias.dim() >= 4:
        return attn_bias
    return attn_bias[(None,) * (4 - attn_bias.dim())]


def refuse_fp8_keys(name: str, k: Tensor) -> None:
    """Raise RuntimeError for keys in fp8, of an operator that takes no factors of them."""
    if k.dtype is FP8 is not None:
        raise RuntimeError(
            f"{name} has dtype {FP8}: these functions take fp16, bf16 and fp32; those of "
            "flash_attn.v3 take fp8, with q_descale, k_descale and v_descale"
        )


def without_negation(name: str, x: Tensor, is_written: bool) -> Tensor:
    """Return a copy of ``x``, a negative view, as its elements are; raise if it is written to."""
    if is_written:
        raise RuntimeError(f"{name} must not be a negative view (is_neg()): it is written to")
    return x.resolve_neg()


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
        if isinstance(x, Tensor):
            found = not_dense(name, x)
            if found is not None:
                return found
        if isinstance(x, int) and x not in _INT64:
            return _no_int64(name, x)
    return _with_dtype(error, arguments)


def _with_dtype(error: Exception, arguments: dict) -> Exception:
    """Return an error about a dtype that the library has no name for with torch's name of it."""
    found = re.search(r"(\w+) has another dtype|(\w+) must have .*, got another dtype", str(error))
    x = arguments.get(found[1] or found[2]) if found else None
    if not isinstance(x, Tensor):
        return error
    text = str(error).replace("another dtype", str(x.dtype))
    if found[1] == "attn_bias" and x.dtype == torch.bool:
        text += "; it is added to the scores: torch.where(mask, 0.0, -torch.inf) hides as a mask"
    return type(error)(text)
