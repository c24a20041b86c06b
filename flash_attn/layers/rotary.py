"""Rotary position embedding: functions with gradients, and the module that keeps cos and sin.

``flash_attn.ops.triton.rotary`` says what a rotation does. Everything here is differentiable in the
tokens; functions are so in ``cos`` and ``sin``, too, while the ``torch.autograd.Function`` classes
are not.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn import _rotary
from flash_attn._arguments import as_int, check_operands, check_optional, check_tensors, flag
from flash_attn.ops.triton.rotary import apply_rotary, check, check_written, offsets_of_operator

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]

_transforms_active = torch._C._are_functorch_transforms_active


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Turn every pair (x1, x2) of the last dimension into (-x2, x1)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The rotation by plain operations in the dtype of the arguments, to compare with.

    Args:
        x: ``(batch, seqlen, nheads, headdim)``.
        cos, sin: ``(seqlen, rotary_dim / 2)`` or ``(batch, seqlen, rotary_dim / 2)``.

    Returns:
        ``(batch, seqlen, nheads, headdim)``.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"rotary_dim {rotary_dim} exceeds the head dim {x.shape[-1]}")

    def of_pairs(table: Tensor) -> Tensor:
        both = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
        return both.unsqueeze(-2)

    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turned * of_pairs(cos) + rotate_half(turned, interleaved) * of_pairs(sin)
    return torch.cat((turned, rest), dim=-1)


def _save(ctx, seqlen_offsets: Union[int, Tensor], *tensors: Optional[Tensor]) -> None:
    """Keep the tensors and the offsets, which are a number or a tensor, for the backward."""
    is_tensor = isinstance(seqlen_offsets, Tensor)
    ctx.seqlen_offsets = None if is_tensor else seqlen_offsets
    ctx.save_for_backward(seqlen_offsets if is_tensor else None, *tensors)
    ctx.save_for_forward(seqlen_offsets if is_tensor else None, *tensors)


def _saved(ctx) -> tuple:
    offsets, *tensors = ctx.saved_tensors
    return (ctx.seqlen_offsets if offsets is None else offsets, *tensors)


def _is_for_autograd(*tables: Optional[Tensor]) -> bool:
    """Whether torch is to derive the gradient: the classes know none of cos and sin, and nothing of
    vmap, and torch.compile does not trace functions with a ``jvp``."""
    if torch.compiler.is_compiling() or _transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tables)


def _is_compiled_without_gradient(x: Tensor, *tables: Optional[Tensor]) -> bool:
    """Whether ``torch.compile`` may write to ``x`` by an operator, which has no gradient."""
    return torch.compiler.is_compiling() and _rotary.serves(x, *tables, inplace=True)


class ApplyRotaryEmb(torch.autograd.Function):
    """``apply_rotary_emb``, differentiable in x alone."""

    @staticmethod
    def forward(
        x,
        cos,
        sin,
        interleaved=False,
        inplace=False,
        seqlen_offsets=0,
        cu_seqlens=None,
        max_seqlen=None,
    ):
        return apply_rotary(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, cos, sin, ctx.interleaved, ctx.inplace, offsets, cu_seqlens, ctx.max_seqlen = inputs
        _save(ctx, offsets, cos, sin, cu_seqlens)
        if ctx.inplace:
            ctx.mark_dirty(x)

    @staticmethod
    def _turn(ctx, x, inplace, conjugate):
        offsets, cos, sin, cu_seqlens = _saved(ctx)
        return apply_rotary(
            x, cos, sin, offsets, cu_seqlens, ctx.max_seqlen, ctx.interleaved, inplace, conjugate
        )

    @staticmethod
    def backward(ctx, dout):
        return ApplyRotaryEmb._turn(ctx, dout, False, True), *(None,) * 7

    @staticmethod
    def jvp(ctx, dx, *_):
        return ApplyRotaryEmb._turn(ctx, dx, ctx.inplace, False)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Union[int, Tensor] = 0,
    cu_seqlens: Optional[Tensor] = None,
    max_seqlen: Optional[int] = None,
) -> Tensor:
    """Turn the pairs of every head; the arguments are those of ``apply_rotary``."""
    check_operands(x=x, cos=cos, sin=sin)
    if not _is_for_autograd(cos, sin):
        return ApplyRotaryEmb.apply(
            x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen
        )
    places = (seqlen_offsets, cu_seqlens, max_seqlen, interleaved)
    inplace = flag("inplace", inplace)
    if not inplace or _is_compiled_without_gradient(x, cos, sin):
        return apply_rotary(x, cos, sin, *places, inplace)
    return x.copy_(apply_rotary(x.clone(), cos, sin, *places))


apply_rotary_emb_func = apply_rotary_emb


def _queries_and_keys(qkv: Tensor, num_heads_q: Optional[int]) -> tuple[Tensor, Tensor]:
    """Views (batch, seqlen, nheads, headdim) of the queries and keys of packed qkv."""
    if num_heads_q is not None:
        num_heads_q = as_int("num_heads_q", num_heads_q)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return qkv[:, :, 0], qkv[:, :, 1]
    if qkv.dim() != 4 or num_heads_q is None:
        raise ValueError(
            "qkv must be (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * "
            f"num_heads_k, headdim) with num_heads_q given; got {tuple(qkv.shape)}"
        )
    num_heads_k = (qkv.shape[2] - num_heads_q) // 2
    if num_heads_q < 1 or num_heads_k < 1 or num_heads_q + 2 * num_heads_k != qkv.shape[2]:
        raise ValueError(
            f"{qkv.shape[2]} heads are not {num_heads_q} + 2 * num_heads_k, where num_heads_q is "
            f"{num_heads_q}"
        )
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]


def _apply_rotary_emb_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Optional[Tensor] = None,
    sin_k: Optional[Tensor] = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
    seqlen_offsets: Union[int, Tensor] = 0,
    num_heads_q: Optional[int] = None,
) -> Tensor:
    """Turn the queries and keys of packed qkv, without gradient of its own."""
    interleaved = flag("interleaved", interleaved)
    q, k = _queries_and_keys(qkv, num_heads_q)
    if inplace:
        check_written("qkv", qkv)
    tables = ((cos, sin), (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k))
    _check_pair(q, *tables[0], *tables[1], seqlen_offsets)
    if _rotary.serves(qkv, *tables[0], *tables[1], inplace=inplace):
        operator = _rotary.turn_qkv_in_place if inplace else _rotary.turned_qkv
        options = (interleaved, conjugate, q.shape[2] if qkv.dim() == 4 else 0)
        places = offsets_of_operator(seqlen_offsets)
        out = operator(qkv, cos, sin, cos_k, sin_k, *places, *options)
        return qkv if inplace else out
    if not inplace:
        qkv = qkv.clone()
        q, k = _queries_and_keys(qkv, num_heads_q)
    options = {"interleaved": interleaved, "inplace": True, "conjugate": conjugate}
    for x, own in ((q, tables[0]), (k, tables[1])):
        apply_rotary(x, *own, seqlen_offsets, **options)
    return qkv


def _check_pair(q: Tensor, cos, sin, cos_k, sin_k, offsets) -> None:
    """Raise for what cannot turn the queries or the keys, before either is."""
    check(q, cos, sin, offsets, None, None, name="qkv")
    for name, table in (("cos_k", cos_k), ("sin_k", sin_k)):
        if table.shape != cos.shape or not table.is_floating_point():
            raise ValueError(
                f"{name} must be floating point and have the shape of cos, {tuple(cos.shape)}, got "
                f"{table.dtype} {tuple(table.shape)}"
            )


class ApplyRotaryEmbQKV_(torch.autograd.Function):
    """``apply_rotary_emb_qkv_``, differentiable in qkv alone."""

    @staticmethod
    def forward(
        qkv,
        cos,
        sin,
        cos_k=None,
        sin_k=None,
        interleaved=False,
        seqlen_offsets=0,
        num_heads_q=None,
    ):
        return _apply_rotary_emb_qkv(
            qkv, cos, sin, cos_k, sin_k, interleaved, True, False, seqlen_offsets, num_heads_q
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, cos, sin, cos_k, sin_k, ctx.interleaved, offsets, ctx.num_heads_q = inputs
        _save(ctx, offsets, cos, sin, cos_k, sin_k)
        ctx.mark_dirty(qkv)

    @staticmethod
    def _turn(ctx, qkv, inplace, conjugate):
        offsets, *tables = _saved(ctx)
        return _apply_rotary_emb_qkv(
            qkv, *tables, ctx.interleaved, inplace, conjugate, offsets, ctx.num_heads_q
        )

    @staticmethod
    def backward(ctx, dqkv):
        return ApplyRotaryEmbQKV_._turn(ctx, dqkv, False, True), *(None,) * 7

    @staticmethod
    def jvp(ctx, dqkv, *_):
        return ApplyRotaryEmbQKV_._turn(ctx, dqkv, True, False)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Optional[Tensor] = None,
    sin_k: Optional[Tensor] = None,
    interleaved: bool = False,
    seqlen_offsets: Union[int, Tensor] = 0,
    num_heads_q: Optional[int] = None,
) -> Tensor:
    """Turn the queries and keys of packed qkv in place.

    Args:
        qkv: ``(batch, seqlen, 3, nheads, headdim)``, or ``(batch, seqlen, num_heads_q + 2 *
            num_heads_k, headdim)`` with ``num_heads_q``.
        cos, sin: ``(seqlen_ro, rotary_dim / 2)``.
        cos_k, sin_k: of their own for the keys (xPos); None: the same.
        interleaved, seqlen_offsets: as for ``apply_rotary``.

    Returns:
        ``qkv``.
    """
    check_operands({"cos_k": cos_k, "sin_k": sin_k}, qkv=qkv, cos=cos, sin=sin)
    if not isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = as_int("seqlen_offsets", seqlen_offsets)
    options = (interleaved, seqlen_offsets, num_heads_q)
    if not _is_for_autograd(cos, sin, cos_k, sin_k):
        return ApplyRotaryEmbQKV_.apply(qkv, cos, sin, cos_k, sin_k, *options)
    tables = (cos, sin, cos_k, sin_k)
    places = (seqlen_offsets, num_heads_q)
    if _is_compiled_without_gradient(qkv, *tables):
        return _apply_rotary_emb_qkv(qkv, *tables, interleaved, True, False, *places)
    if torch.compiler.is_compiling() and _rotary.serves(qkv, *tables):
        turned = _apply_rotary_emb_qkv(qkv, *tables, interleaved, False, False, *places)
        return qkv.copy_(turned)
    q, k = _queries_and_keys(qkv, num_heads_q)
    cos_k = cos if cos_k is None else cos_k
    sin_k = sin if sin_k is None else sin_k
    _check_pair(q, cos, sin, cos_k, sin_k, seqlen_offsets)
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets)
    return qkv


def _keys(kv: Tensor) -> Tensor:
    """View (batch, seqlen, nheads, headdim) of the keys of packed kv."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must be (batch, seqlen, 2, nheads, headdim), got {tuple(kv.shape)}")
    check_written("kv", kv)
    return kv[:, :, 0]


class ApplyRotaryEmbKV_(torch.autograd.Function):
    """``apply_rotary_emb_kv_``, differentiable in kv alone."""

    @staticmethod
    def forward(kv, cos, sin, interleaved=False, seqlen_offsets=0):
        keys = _keys(kv)
        if not isinstance(seqlen_offsets, Tensor):
            seqlen_offsets = as_int("seqlen_offsets", seqlen_offsets)
        check(keys, cos, sin, seqlen_offsets, None, None, name="kv")
        apply_rotary(keys, cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
        return kv

    @staticmethod
    def setup_context(ctx, inputs, output):
        kv, cos, sin, ctx.interleaved, offsets = inputs
        _save(ctx, offsets, cos, sin)
        ctx.mark_dirty(kv)

    @staticmethod
    def _turn(ctx, kv, conjugate):
        offsets, cos, sin = _saved(ctx)
        options = {"interleaved": ctx.interleaved, "inplace": True, "conjugate": conjugate}
        apply_rotary(_keys(kv), cos, sin, offsets, **options)
        return kv

    @staticmethod
    def backward(ctx, dkv):
        return ApplyRotaryEmbKV_._turn(ctx, dkv.clone(), True), *(None,) * 4

    @staticmethod
    def jvp(ctx, dkv, *_):
        return ApplyRotaryEmbKV_._turn(ctx, dkv, False)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: Union[int, Tensor] = 0,
) -> Tensor:
    """Turn the keys of packed kv ``(batch, seqlen, 2, nheads, headdim)`` in place; return kv."""
    check_operands(kv=kv, cos=cos, sin=sin)
    if not _is_for_autograd(cos, sin):
        return ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, seqlen_offsets)
    apply_rotary_emb(_keys(kv), cos, sin, interleaved, True, seqlen_offsets)
    return kv


class _Tables(NamedTuple):
    """Tables ``(seqlen, dim / 2)`` of cos and sin, the keys' own with xPos, and their use.

    length: that the frequencies are for, where they depend on it.
    is_without_grad: made while gradients were off. Tables of inference mode cannot be saved for a
        backward; torch.compile traces whether gradients are on, but not ``is_inference()``.
    """

    cos: Tensor
    sin: Tensor
    cos_k: Optional[Tensor]
    sin_k: Optional[Tensor]
    length: Optional[int]
    is_without_grad: bool


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with tables of cos and sin that grow as needed.

    Pair i turns by t * base ** (-2i / dim) at position t. With ``scale_base`` this is xPos
    (https://arxiv.org/abs/2212.10554): queries are multiplied, keys divided, by ``scale ** ((t -
    seqlen // 2) / scale_base)``.
    """

    depends_on_length = False  # whether the frequencies depend on the sequence's length

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: Optional[float] = None,
        device=None,
    ):
        """Make the module.

        Args:
            dim: rotary_dim, the number of a head's elements that are turned.
            base: of the geometric series of frequencies.
            interleaved: whether a pair's elements are neighbours.
            scale_base: of xPos; None: no scale.
            device: of ``inv_freq``.
        """
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device).float() + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        # Tables, and what they are for, are one object: threads may make others at any time.
        self._tables: Optional[_Tables] = None

    @property
    def _seq_len_cached(self) -> int:
        return 0 if self._tables is None else self._tables.cos.shape[0]

    @property
    def _cos_cached(self) -> Optional[Tensor]:
        return None if self._tables is None else self._tables.cos

    @property
    def _sin_cached(self) -> Optional[Tensor]:
        return None if self._tables is None else self._tables.sin

    @property
    def _cos_k_cached(self) -> Optional[Tensor]:
        return None if self._tables is None else self._tables.cos_k

    @property
    def _sin_k_cached(self) -> Optional[Tensor]:
        return None if self._tables is None else self._tables.sin_k

    def _compute_inv_freq(self, device=None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.base**exponents

    def _cos_sin(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fp32 tables of fp32 angles ``(seqlen, dim / 2)``."""
        return angles.cos(), angles.sin()

    def _counted(self, seqlen: int) -> Optional[int]:
        """The part of a sequence's length that the frequencies depend on."""
        return None

    def _frequencies(self, length: Optional[int], device) -> Tensor:
        """Return fp32 ``(dim / 2,)`` on ``device`` for sequences of ``_counted`` length."""
        # A model cast to half precision has its buffers rounded: positions need fp32.
        if self.inv_freq.dtype != torch.float32:
            return self._compute_inv_freq(device)
        return self.inv_freq.to(device)

    def _cached(self, seqlen: int, device, dtype) -> Optional[_Tables]:
        """Return the tables there are, if they serve."""
        tables = self._tables
        if (
            tables is not None
            and seqlen <= tables.cos.shape[0]
            and tables.cos.device == device
            and tables.cos.dtype == dtype
            and tables.length == self._counted(seqlen)
            and not (torch.is_grad_enabled() and tables.is_without_grad)
        ):
            return tables
        return None

    def _update_cos_sin_cache(self, seqlen: int, device=None, dtype=None) -> _Tables:
        """Return tables at least ``seqlen`` long, on ``device``, of ``dtype``, and keep them.

        Readers take what this returns: another thread may replace what is kept.
        """
        tables = self._cached(seqlen, device, dtype)
        if tables is not None:
            return tables
        tables = self._new_tables(seqlen, device, dtype)
        kept = self._cached(seqlen, device, dtype)  # another thread's, meanwhile
        if kept is not None:
            return kept
        self._tables = tables
        return tables

    def _new_tables(self, seqlen: int, device, dtype) -> _Tables:
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        length, is_without_grad = self._counted(seqlen), not torch.is_grad_enabled()
        angles = torch.outer(positions, self._frequencies(length, positions.device))
        cos, sin = self._cos_sin(angles)
        if self.scale is None:
            return _Tables(cos.to(dtype), sin.to(dtype), None, None, length, is_without_grad)
        power = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=positions.device, dtype=torch.float32) ** power[:, None]
        tables = (cos * scale, sin * scale, cos / scale, sin / scale)
        return _Tables(*(x.to(dtype) for x in tables), length, is_without_grad)

    def forward(
        self,
        qkv: Tensor,
        kv: Optional[Tensor] = None,
        seqlen_offset: Union[int, Tensor] = 0,
        max_seqlen: Optional[int] = None,
        num_heads_q: Optional[int] = None,
    ) -> Union[Tensor, tuple[Tensor, Tensor]]:
        """Turn queries and keys in place.

        Args:
            qkv: with ``kv`` None ``(batch, seqlen, 3, nheads, headdim)``, or ``(batch, seqlen,
                num_heads_q + 2 * num_heads_k, headdim)`` with ``num_heads_q``; otherwise the
                queries alone, ``(batch, seqlen, nheads, headdim)``.
            kv: ``(batch, seqlen, 2, nheads_k, headdim)``.
            seqlen_offset: position of the first token: an int, or int32 or int64 ``(batch,)``.
            max_seqlen: makes the tables this long; a tensor ``seqlen_offset`` is read for it
                otherwise.

        Returns:
            ``qkv``, or ``(qkv, kv)``.
        """
        check_tensors(qkv=qkv)
        check_optional(kv=kv)
        is_tensor = isinstance(seqlen_offset, Tensor)
        if not is_tensor:
            seqlen_offset = as_int("seqlen_offset", seqlen_offset)
        if max_seqlen is None:
            max_seqlen = qkv.shape[1] + (int(seqlen_offset.max()) if is_tensor else seqlen_offset)
        cos, sin, cos_k, sin_k, *_ = self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        options = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, num_heads_q=num_heads_q, **options
            )
        q = apply_rotary_emb(qkv, cos, sin, inplace=True, **options)
        tables = (cos, sin) if self.scale is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, *tables, **options)
