"""Rotary embedding by the library: the torch operators, and what they serve.

``flash_attn.ops.triton.rotary`` and ``flash_attn.layers.rotary`` call these where nothing asks for
more than they do; derivatives of other kinds and other dtypes are compositions of torch's own.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn._arguments import is_plain
from flash_attn._buffers import raise_versions
from flash_attn._fused import Fused
from flash_attn._library import bind, lib

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HAVE_CUDA_KERNELS = "cuda " in str(lib.kernels())
_transforms_active = torch._C._are_functorch_transforms_active

_run = bind(
    "rotary",
    "x out k k_out cos sin cos_k sin_k seqlen_offsets seqlen_offset cu_seqlens max_seqlen "
    "interleaved conjugate",
)


def serves(x: Tensor, *tables: Optional[Tensor], inplace: bool = False) -> bool:
    """Whether ``x`` is one that the operators take, and no derivative is wanted that they lack."""
    if _transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled():
        if any(table is not None and table.requires_grad for table in tables):
            return False
        # Only there the operators are differentiated: once.
        if x.requires_grad and (inplace or not torch.compiler.is_compiling()):
            return False
    if not all(_is_dense(t) for t in (x, *tables) if t is not None) or x.dtype not in _DTYPES:
        return False
    return not inplace or (x.stride(-1) == 1 and not _is_negative(x))


def _is_dense(x: Tensor) -> bool:
    on_device = x.is_cpu or (x.is_cuda and _HAVE_CUDA_KERNELS)
    return (is_plain(x) or _is_exported(x)) and x.layout is torch.strided and on_device


def _is_exported(x: Tensor) -> bool:
    """Whether x is what ``torch.export`` calls a module with."""
    if not torch.compiler.is_compiling():
        return False
    from torch._subclasses.fake_tensor import FakeTensor  # loaded already, but not before

    return isinstance(x, FakeTensor)


def _is_negative(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.is_neg()  # torch.compile resolves them


def _tables(x: Tensor, *tables: Optional[Tensor]) -> list[Optional[Tensor]]:
    """Return tables of one dtype that the library takes beside x, with contiguous rows."""
    dtypes = {table.dtype for table in tables if table is not None}
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"cos and sin must be floating point, got {', '.join(map(str, dtypes))}")
    dtype = x.dtype if dtypes == {x.dtype} else torch.float32
    tables = (None if table is None else table.to(dtype) for table in tables)
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tables]


def _indices(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.contiguous()


def _turn(x, out, k, k_out, tables, offsets, offset, cu_seqlens, max_seqlen, *options) -> None:
    """Call the library. Raises IndexError for a position that the tables do not have."""
    places = (_indices(offsets), offset, _indices(cu_seqlens), max_seqlen)
    try:
        _run(x, out, k, k_out, *_tables(x, *tables), *places, *options)
    except RuntimeError as error:
        if str(error).startswith("seqlen_offsets: "):
            raise IndexError(str(error)) from None
        raise


# ------------------------------------------------------------------------------------------------
# One tensor of heads

_POSITIONS = "Tensor? seqlen_offsets, SymInt seqlen_offset"
_OF_TOKENS = f"{_POSITIONS}, Tensor? cu_seqlens, SymInt max_seqlen, bool interleaved"


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _turned_kernel(x, cos, sin, *rest):
    x = _readable(x)
    out = torch.empty_like(x)
    _turn(x, out, None, None, (cos, sin, None, None), *rest)
    return out


def _save_turned(ctx, args, out) -> None:
    _, cos, sin, offsets, ctx.offset, cu_seqlens, ctx.max_seqlen, ctx.interleaved, conjugate = args
    ctx.conjugate = not conjugate
    ctx.save_for_backward(cos, sin, offsets, cu_seqlens)


def _gradient_of_turned(ctx, dout):
    cos, sin, offsets, cu_seqlens = ctx.saved_tensors
    places = (offsets, ctx.offset, cu_seqlens, ctx.max_seqlen)
    return turned(dout, cos, sin, *places, ctx.interleaved, ctx.conjugate), *(None,) * 8


turned = Fused(
    f"rotary(Tensor x, Tensor cos, Tensor sin, {_OF_TOKENS}, bool conjugate) -> Tensor",
    _turned_kernel,
    lambda x, *_: torch.empty_like(_readable(x)),
    _save_turned,
    _gradient_of_turned,
)


def _turn_in_place_kernel(x, cos, sin, *rest):
    _turn(x, x, None, None, (cos, sin, None, None), *rest)
    raise_versions(x)


turn_in_place = Fused(
    f"rotary_(Tensor(a!) x, Tensor cos, Tensor sin, {_OF_TOKENS}, bool conjugate) -> ()",
    _turn_in_place_kernel,
    lambda *_: None,
)

# ------------------------------------------------------------------------------------------------
# Queries and keys of a packed tensor, in one pass

_OF_QKV = (
    "Tensor cos, Tensor sin, Tensor? cos_k, Tensor? sin_k, "
    f"{_POSITIONS}, bool interleaved, bool conjugate, SymInt num_heads_q"
)


def parts(qkv: Tensor, num_heads_q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views (batch, seqlen, nheads, headdim) of the queries, keys and values.

    Args:
        qkv: ``(batch, seqlen, 3, nheads, headdim)`` or ``(batch, seqlen, nheads, headdim)``.
        num_heads_q: of the latter; ignored for the former.
    """
    if qkv.dim() not in (4, 5) or (qkv.dim() == 5 and qkv.shape[2] != 3):
        raise ValueError(
            "qkv must be (batch, seqlen, 3, nheads, headdim) or (batch, seqlen, nheads, headdim), "
            f"got {tuple(qkv.shape)}"
        )
    if qkv.dim() == 4 and not 0 < num_heads_q < qkv.shape[2]:
        raise ValueError(
            f"num_heads_q must be 1 to {qkv.shape[2] - 1}, fewer than the heads of qkv, got "
            f"{num_heads_q}"
        )
    if qkv.dim() == 5:
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    num_heads_k = (qkv.shape[2] - num_heads_q) // 2
    end = num_heads_q + num_heads_k
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:end], qkv[:, :, end:]


def _turn_packed(qkv, out, tables, offsets, offset, interleaved, conjugate, num_heads_q) -> None:
    (q, k, v), (q_out, k_out, v_out) = parts(qkv, num_heads_q), parts(out, num_heads_q)
    _turn(q, q_out, k, k_out, tables, offsets, offset, None, 0, interleaved, conjugate)
    if out is not qkv:
        v_out.copy_(v)


def _turned_qkv_kernel(qkv, *rest):
    qkv = _readable(qkv)
    out = torch.empty_like(qkv)
    _turn_packed(qkv, out, rest[:4], *rest[4:])
    return out


def _save_turned_qkv(ctx, args, out) -> None:
    _, *tables, offsets, ctx.offset, ctx.interleaved, conjugate, ctx.num_heads_q = args
    ctx.conjugate = not conjugate
    ctx.save_for_backward(*tables, offsets)


def _gradient_of_turned_qkv(ctx, dout):
    *tables, offsets = ctx.saved_tensors
    options = (ctx.interleaved, ctx.conjugate, ctx.num_heads_q)
    return turned_qkv(dout, *tables, offsets, ctx.offset, *options), *(None,) * 9


turned_qkv = Fused(
    f"rotary_qkv(Tensor qkv, {_OF_QKV}) -> Tensor",
    _turned_qkv_kernel,
    lambda qkv, *_: torch.empty_like(_readable(qkv)),
    _save_turned_qkv,
    _gradient_of_turned_qkv,
)


def _turn_qkv_in_place_kernel(qkv, *rest):
    _turn_packed(qkv, qkv, rest[:4], *rest[4:])
    raise_versions(qkv)


turn_qkv_in_place = Fused(
    f"rotary_qkv_(Tensor(a!) qkv, {_OF_QKV}) -> ()", _turn_qkv_in_place_kernel, lambda *_: None
)
