"""Rotary position embedding of queries or keys.

A head's first ``rotary_dim`` elements form pairs, the other elements stay as they are. Pair i of a
token at position t is turned: (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin), with ``cos[t,
i]`` and ``sin[t, i]``. Interleaved pairs are neighbours (0, 1), (2, 3), ...; otherwise element i
goes with element i + rotary_dim / 2.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from flash_attn import _rotary
from flash_attn._arguments import as_int, check_operands, flag, is_plain

__all__ = ["apply_rotary"]

_INTEGERS = (torch.int32, torch.int64)
_transforms_active = torch._C._are_functorch_transforms_active


def check(x: Tensor, cos: Tensor, sin: Tensor, offsets, cu_seqlens, max_seqlen, name="x") -> None:
    """Raise TypeError or ValueError for arguments that do not fit each other.

    ``name``: of what ``x`` is, or is a part of.
    """
    _check_tables(name, x, cos, sin)
    if cu_seqlens is None and x.dim() != 4:
        raise ValueError(f"x must be (batch, seqlen, nheads, headdim), got {tuple(x.shape)}")
    if cu_seqlens is not None:
        _check_packed(x, cu_seqlens, max_seqlen)
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(offsets, Tensor):
        if offsets.shape != (batch,) or offsets.dtype not in _INTEGERS:
            raise ValueError(
                f"seqlen_offsets must be an int or int32 or int64 ({batch},), got {offsets.dtype} "
                f"{tuple(offsets.shape)}"
            )
        offsets = 0
    seqlen = x.shape[1] if cu_seqlens is None else max_seqlen
    if offsets < 0 or offsets + seqlen > cos.shape[0]:
        raise ValueError(
            f"positions {offsets} to {offsets + seqlen - 1} exceed cos and sin, which have "
            f"{cos.shape[0]} rows"
        )


def check_written(name: str, x: Tensor) -> None:
    """Raise ValueError for a tensor that is expanded: elements of it are one in memory."""
    if any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride())):
        raise ValueError(f"{name} must not overlap itself: it is written to")


def _check_tables(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    for each, tensor in ((name, x), ("cos", cos), ("sin", sin)):
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise ValueError(
                f"{each} must be floating point, of 16 bits or more, got {tensor.dtype}"
            )
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must be (seqlen_ro, rotary_dim / 2), got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if x.dim() == 0 or 2 * cos.shape[1] > x.shape[-1]:
        headdim = x.shape[-1] if x.dim() else None
        raise ValueError(
            f"rotary_dim {2 * cos.shape[1]} exceeds the head dim {headdim}: it is twice the "
            "columns of cos and sin"
        )


def _check_packed(x: Tensor, cu_seqlens: Tensor, max_seqlen) -> None:
    if x.dim() != 3:
        raise ValueError(
            f"x with cu_seqlens must be (total, nheads, headdim), got {tuple(x.shape)}"
        )
    if max_seqlen is None:
        raise ValueError("cu_seqlens needs max_seqlen")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in _INTEGERS or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens must be int32 (batch + 1,), got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if torch.compiler.is_compiling() or _transforms_active():
        return
    if not (is_plain(cu_seqlens) and cu_seqlens.is_cpu):
        return
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or sorted(starts) != starts or starts[-1] > x.shape[0]:
        raise ValueError(f"cu_seqlens must ascend from 0 to at most the {x.shape[0]} tokens of x")
    longest = max((b - a for a, b in zip(starts, starts[1:])), default=0)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but cu_seqlens has a sequence of {longest}")


def _rows_at(table: Tensor, positions: Tensor) -> Tensor:
    """``table[positions]``; positions outside the table are an error."""
    try:
        return table.index_select(0, positions.flatten()).unflatten(0, positions.shape)
    except IndexError:
        raise IndexError(
            f"seqlen_offsets: a position is out of range of cos and sin, which have "
            f"{table.shape[0]} rows"
        ) from None


def _packed_rows(cos: Tensor, sin: Tensor, offsets, cu_seqlens: Tensor, total: int):
    """Rows of cos and sin for packed tokens; those after the last sequence are not turned."""
    if cu_seqlens.shape[0] == 1:
        rows = cos.new_empty(total, cos.shape[1])
        return torch.ones_like(rows), torch.zeros_like(rows)
    token = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    is_used = sequence < cu_seqlens.shape[0] - 1
    sequence = torch.where(is_used, sequence, 0)
    offset = offsets[sequence] if isinstance(offsets, Tensor) else offsets
    positions = torch.where(is_used, token - cu_seqlens[sequence] + offset, 0)
    is_used = is_used[:, None]
    return (
        torch.where(is_used, _rows_at(cos, positions), 1.0),
        torch.where(is_used, _rows_at(sin, positions), 0.0),
    )


def _rows(x: Tensor, cos: Tensor, sin: Tensor, offsets, cu_seqlens: Optional[Tensor]):
    """Rows of cos and sin for the tokens of x: (..., seqlen, 1, rotary_dim / 2)."""
    if cu_seqlens is not None:
        cos, sin = _packed_rows(cos, sin, offsets, cu_seqlens, x.shape[0])
    elif isinstance(offsets, Tensor):
        positions = offsets[:, None] + torch.arange(x.shape[1], device=offsets.device)
        cos, sin = _rows_at(cos, positions), _rows_at(sin, positions)
    else:
        cos, sin = cos[offsets : offsets + x.shape[1]], sin[offsets : offsets + x.shape[1]]
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def _pairs(x: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second elements of x's pairs."""
    if interleaved:
        return x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
    return x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]


def _joined(parts: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Undo ``_pairs``."""
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Union[int, Tensor] = 0,
    cu_seqlens: Optional[Tensor] = None,
    max_seqlen: Optional[int] = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turn the pairs of every head.

    Computed in fp32, or fp64 for fp64.

    Args:
        x: ``(batch, seqlen, nheads, headdim)``, or packed ``(total, nheads, headdim)`` with
            ``cu_seqlens`` and ``max_seqlen``.
        cos, sin: ``(seqlen_ro, rotary_dim / 2)``, of any floating dtype; rotary_dim <= headdim.
        seqlen_offsets: position of each sequence's first token: an int, or int32 or int64
            ``(batch,)``.
        cu_seqlens: int32 ``(batch + 1,)``, where the packed sequences start and end. Tokens after
            the last one stay as they are.
        max_seqlen: longest packed sequence or more.
        interleaved: whether a pair's elements are neighbours.
        inplace: whether to write the result into ``x``.
        conjugate: whether to turn the other way, which undoes it.

    Returns:
        Of ``x``'s shape and dtype; ``x`` itself if ``inplace``.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: shapes do not fit, a position exceeds ``cos`` and ``sin``, or ``cu_seqlens``,
            where it is on the CPU, does not ascend from 0 or has a sequence beyond ``x`` or
            ``max_seqlen``.
        IndexError: a position by a tensor ``seqlen_offsets`` exceeds them.
    """
    optional = {"cu_seqlens": cu_seqlens}
    if isinstance(seqlen_offsets, Tensor):
        optional["seqlen_offsets"] = seqlen_offsets
    else:
        seqlen_offsets = as_int("seqlen_offsets", seqlen_offsets)
    check_operands(optional, x=x, cos=cos, sin=sin)
    if max_seqlen is not None:
        max_seqlen = as_int("max_seqlen", max_seqlen)
    interleaved, inplace = flag("interleaved", interleaved), flag("inplace", inplace)
    conjugate = flag("conjugate", conjugate)
    check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    places = (seqlen_offsets, cu_seqlens, max_seqlen)
    if _rotary.serves(x, cos, sin, inplace=inplace):
        return _turn_by_operator(x, cos, sin, *places, interleaved, inplace, conjugate)
    return _turn_by_composition(x, cos, sin, *places[:2], interleaved, inplace, conjugate)


def offsets_of_operator(seqlen_offsets: Union[int, Tensor]) -> tuple[Optional[Tensor], int]:
    """Return the offsets as a tensor or None, and as a number."""
    return (seqlen_offsets, 0) if isinstance(seqlen_offsets, Tensor) else (None, seqlen_offsets)


def _turn_by_operator(
    x, cos, sin, offsets, cu_seqlens, max_seqlen, interleaved, inplace, conjugate
):
    operator = _rotary.turn_in_place if inplace else _rotary.turned
    places = (*offsets_of_operator(offsets), cu_seqlens, 0 if max_seqlen is None else max_seqlen)
    out = operator(x, cos, sin, *places, interleaved, conjugate)
    return x if inplace else out


def _turn_by_composition(x, cos, sin, offsets, cu_seqlens, interleaved, inplace, conjugate):
    rotary_dim = 2 * cos.shape[1]
    if inplace:
        check_written("x", x)
    cos, sin = _rows(x, cos, sin, offsets, cu_seqlens)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    if conjugate:
        sin = -sin
    first, second = (part.to(dtype) for part in _pairs(x, rotary_dim, interleaved))
    turned = (first * cos - second * sin, second * cos + first * sin)
    if _transforms_active() and not inplace:  # vmap may map cos alone
        rest = x[..., rotary_dim:].expand(*turned[0].shape[:-1], -1)
        return torch.cat((_joined(turned, interleaved).to(x.dtype), rest), -1)
    out = x if inplace else x.clone()
    for target, part in zip(_pairs(out, rotary_dim, interleaved), turned):
        target.copy_(part.to(x.dtype))  # torch loses the sign of a negative view as it casts
    return out
