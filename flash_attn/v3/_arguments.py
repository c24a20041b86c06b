"""What FlashAttention-3's functions take: scores, switches, and what this package refuses of it."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from flash_attn._arguments import FP8, as_int, flag, is_plain, wrong_kind
from flash_attn.flash_attn_interface import _score

_MOST_SPLITS = 256  # that FlashAttention-3 takes
_MOST_SPLITS_HERE = 128
_OTHER_FP8 = frozenset(
    dtype
    for name, dtype in vars(torch).items()
    if name.startswith("float8") and isinstance(dtype, torch.dtype) and dtype is not FP8
)


_TENSORS = ("q", "k", "v", "k_new", "v_new", "qv")
_DESCALES = ("q_descale", "k_descale", "v_descale")


class Quantization(NamedTuple):
    """Factors of fp8 tensors, (batch, nheads_k) or (batch, nheads_k, blocks of 128 rows).

    ``out_dtype``: of out, where q is in fp8; None: bf16.
    """

    q_descale: Optional[Tensor] = None
    k_descale: Optional[Tensor] = None
    v_descale: Optional[Tensor] = None
    out_dtype: Optional[torch.dtype] = None

    def repeated(self, pieces: int) -> Quantization:
        """Return the factors of as many pieces of each sequence."""
        repeated = (x if x is None else x.repeat_interleave(pieces, 0) for x in self[:3])
        return Quantization(*repeated, self.out_dtype)


class Score(NamedTuple):
    """What becomes of a product of a query and a key.

    ``left``, ``right``: the window, negative: no limit. ``attention_chunk``: 0, or the number of
    positions of a chunk; a query sees the keys of its own chunk alone.
    """

    softmax_scale: float
    causal: bool
    left: int
    right: int
    softcap: float
    attention_chunk: int = 0
    s_aux: Optional[Tensor] = None
    quantization: Optional[Quantization] = None  # None: no tensor is in fp8

    @property
    def operators(self) -> tuple:
        """The operators' arguments from dropout_p to softcap."""
        return (0.0, *self[:5])

    @property
    def last_ahead(self) -> Optional[int]:
        """How far ahead of a query its last key may lie; None: any distance."""
        if self.causal:
            return 0
        return self.right if self.right >= 0 else None

    @property
    def is_by_row(self) -> bool:
        """Whether each query of a sequence is rotated by a position of its own."""
        return self.causal or self.left >= 0 or self.right >= 0


def make_score(q, qv, softmax_scale, causal, window_size, softcap, attention_chunk, s_aux) -> Score:
    """Return the score of public arguments; ``qv`` (..., headdim_v) enters the default scale."""
    if (
        qv is not None
        and softmax_scale is None
        and isinstance(qv, Tensor)
        and isinstance(q, Tensor)
    ):
        softmax_scale = (q.shape[-1] + qv.shape[-1]) ** -0.5
    _, *score = _score(q, 0.0, softmax_scale, causal, window_size, softcap)
    chunk = as_int("attention_chunk", attention_chunk)
    if chunk < 0:
        raise ValueError(f"attention_chunk must not be negative, got {chunk}")
    return Score(*score, chunk, s_aux)


def check_schedule(num_splits, pack_gqa=None, sm_margin=0, scheduler_metadata=None) -> int:
    """Check what decides how a call is computed and not what; return the operators' num_splits."""
    splits = num_splits if num_splits.__class__ is int else as_int("num_splits", num_splits)
    if not 0 <= splits <= _MOST_SPLITS:
        raise ValueError(f"num_splits must be from 0 to {_MOST_SPLITS}, got {splits}")
    if pack_gqa is not None:
        flag("pack_gqa", pack_gqa)
    margin = sm_margin if sm_margin.__class__ is int else as_int("sm_margin", sm_margin)
    if margin < 0:
        raise ValueError(f"sm_margin must not be negative, got {margin}")
    if scheduler_metadata is not None:
        if not isinstance(scheduler_metadata, Tensor):
            raise wrong_kind("scheduler_metadata", scheduler_metadata)
        if scheduler_metadata.dtype != torch.int32:
            raise ValueError(f"scheduler_metadata must be int32, got {scheduler_metadata.dtype}")
    return min(splits, _MOST_SPLITS_HERE)


def is_readable(x: Tensor) -> bool:
    """Whether a tensor's values can be looked at without waiting for a device or breaking a graph.

    Malformed values on a GPU are not reported, as in this package's other functions.
    """
    return x.is_cpu and is_plain(x) and not torch.compiler.is_compiling()


def _check_descale(name: str, x, is_used: bool) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise wrong_kind(name, x)
    if x.dtype != torch.float32:
        raise ValueError(f"{name} must be fp32, got {x.dtype}")
    if not is_used and is_readable(x) and not bool((x == 1.0).all()):
        raise NotImplementedError(
            f"{name} belongs to fp8 tensors: only 1.0 is accepted beside fp16, bf16 and fp32"
        )


def refuse_fp8(names: str, tensors: tuple) -> None:
    """Raise NotImplementedError for a tensor of 8 bits, by its name among ``names``."""
    for place, x in enumerate(tensors):
        if x is not None and isinstance(x, Tensor) and (x.dtype in _OTHER_FP8 or x.dtype is FP8):
            raise NotImplementedError(
                f"{names.split()[place]} has dtype {x.dtype}: the backward computes fp16, bf16 and "
                "fp32 and has no fp8"
            )


def make_quantization(tensors: tuple, descales: tuple, out) -> Optional[Quantization]:
    """Return the factors of a call's tensors in fp8, None if there is no such tensor.

    Args:
        tensors: q, k, v, k_new, v_new and qv.
        descales: of q, k and v. A serving engine passes 1.0 whatever the dtype is: raises
            NotImplementedError for another value beside a wider tensor; a GPU's are not looked at.
        out: the caller's tensor for the result, or None.
    """
    dtypes = [getattr(x, "dtype", None) for x in tensors]  # isinstance takes longer
    for name, dtype in zip(_TENSORS, dtypes):
        if dtype in _OTHER_FP8:
            raise NotImplementedError(
                f"{name} has dtype {dtype}: of the dtypes of 8 bits flash_attn computes {FP8}"
            )
    of_q, of_k = dtypes[0] is FP8 is not None, dtypes[1] is FP8 is not None
    q_descale, k_descale, v_descale = descales
    has_none = q_descale is None and k_descale is None and v_descale is None
    if has_none and not of_q and not of_k:
        return None
    is_used = (of_q, of_k, of_k)
    for name, x, used in zip(_DESCALES, descales, is_used):
        _check_descale(name, x, used)
    if not of_q and not of_k:
        return None
    for name, x in zip(_TENSORS, tensors):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name} requires a gradient: attention with fp8 tensors has none; call it under "
                "torch.no_grad()"
            )
    kept = (x if used else None for x, used in zip(descales, is_used))
    return Quantization(*kept, None if out is None or not of_q else out.dtype)


def check_blocks(quantization: Optional[Quantization]) -> None:
    """Raise NotImplementedError for factors of 128 rows beside attention_chunk."""
    for name, x in () if quantization is None else zip("qkv", quantization):
        if x is not None and x.dim() == 3 and x.shape[2] > 1:
            raise NotImplementedError(
                f"attention_chunk with a {name}_descale for each 128 rows: one for each head is "
                "accepted"
            )


def check_factors_of_values(quantization: Quantization) -> None:
    """Raise NotImplementedError for factors that differ where qv makes one tensor of k and v."""
    k, v = quantization.k_descale, quantization.v_descale
    if k is v or (k is not None and v is not None and _are_equal(k, v)):
        return
    raise NotImplementedError(
        "qv with k_descale and v_descale that differ: with qv k and v are read as one tensor, of "
        "one factor"
    )


def _are_equal(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or torch.compiler.is_compiling() or not (is_plain(x) and is_plain(y)):
        return False
    if x.is_cpu and y.is_cpu:
        return bool((x == y).all())
    return x.data_ptr() == y.data_ptr() and x.stride() == y.stride()  # views of one tensor


def check_int32(name: str, x: Optional[Tensor], length: Optional[int] = None) -> Optional[Tensor]:
    """Return ``x`` if it is None or int32 with one dimension, of the given length; else raise."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise wrong_kind(name, x)
    if x.dtype != torch.int32 or x.dim() != 1 or (length is not None and x.shape[0] != length):
        expected = "" if length is None else f" of {length} elements"
        raise ValueError(
            f"{name} must be int32 with one dimension{expected}, got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    return x


def check_used(name: str, used: Tensor, lengths: Tensor) -> None:
    """Raise ValueError for a sequence of which more is used than there is."""
    if not (is_readable(used) and is_readable(lengths)):
        return
    outside = ((used < 0) | (used > lengths)).nonzero()
    if outside.numel():
        i = int(outside[0])
        raise ValueError(
            f"{name}[{i}] = {int(used[i])} is outside the sequence's {int(lengths[i])} rows"
        )


def check_cumulative(name: str, cu_seqlens: Tensor, max_seqlen: int, rows: int) -> None:
    """Raise ValueError for cu_seqlens that do not describe sequences of a tensor with ``rows``."""
    if not is_readable(cu_seqlens) or not cu_seqlens.shape[0]:
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens_{name} must start at 0, got {values[0]}")
    for i, (before, after) in enumerate(zip(values, values[1:])):
        if after < before:
            raise ValueError(
                f"cu_seqlens_{name} must not decrease: entry {i + 1} is {after} after {before}"
            )
        if after - before > max_seqlen:
            raise ValueError(
                f"max_seqlen_{name} = {max_seqlen} is less than the {after - before} rows of "
                f"sequence {i}"
            )
    if values[-1] > rows:
        raise ValueError(
            f"cu_seqlens_{name} ends at {values[-1]}, beyond the {rows} rows of {name}"
        )
