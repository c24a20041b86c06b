"""Ulysses: attention of a shared sequence by sharing heads instead while attention lasts.

Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long
Sequence Transformer Models", 2023 (https://arxiv.org/abs/2309.14509). An all-to-all gives every
process all tokens of some heads; over these it attends alone, and another gives tokens back.
``hybrid_attention`` does so among some processes and ring attention among the others.
"""

from __future__ import annotations

import contextlib
import math
from typing import Callable, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn import _dtensor
from flash_attn._arguments import wrong_kind
from flash_attn.distributed._agreement import agreed, rank_and_size
from flash_attn.distributed._checks import (
    Arguments,
    check_packed_shares,
    checked,
    outside_graphs,
    packed_seqlens,
    told,
)
from flash_attn.distributed._shards import on_local_tokens
from flash_attn.distributed.layout import as_group, check_layout, order_of_packed, order_of_tokens
from flash_attn.distributed.ring import ring_attention
from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["hybrid_attention", "ulysses_attention", "ulysses_attention_varlen"]


def _to_heads(x: Tensor, group, lengths: tuple) -> Tensor:
    """All tokens of this process' heads: (total, batch, h / size, d) of (local, batch, h, d)."""
    size = len(lengths)
    sent = x.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
    received = x.new_empty(sum(lengths), *sent.shape[2:])
    token = math.prod(sent.shape[2:])
    splits = [n * token for n in lengths]
    dist.all_to_all_single(
        received.view(-1), sent.view(-1), splits, [len(x) * token] * size, group=group
    )
    return received


def _to_tokens(x: Tensor, group, lengths: tuple) -> Tensor:
    """The inverse of ``_to_heads``."""
    size, rank = len(lengths), dist.get_rank(group)
    received = x.new_empty(size, lengths[rank], *x.shape[1:])
    token = math.prod(x.shape[1:])
    splits = [n * token for n in lengths]
    dist.all_to_all_single(
        *(received.view(-1), x.contiguous().view(-1)),
        *([lengths[rank] * token] * size, splits),
        group=group,
    )
    return received.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """One of the two functions above, whose gradient is the other one."""

    @staticmethod
    def forward(ctx, x, there: Callable, back: Callable, group, lengths: tuple):
        ctx.settings = back, there, group, lengths
        return there(x, group, lengths)

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, *ctx.settings), None, None, None, None


class _Exchanger(NamedTuple):
    """Tensors (tokens, batch, heads, dim) between processes that share tokens, and heads."""

    group: object
    lengths: tuple  # local tokens of each process
    order: Optional[Tensor] = None  # the place of each of them, process by process, in the whole

    def to_heads(self, x: Tensor) -> Tensor:
        x = _Exchange.apply(x, _to_heads, _to_tokens, self.group, self.lengths)
        return x if self.order is None else x.index_select(0, self.order.argsort())

    def to_tokens(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(0, self.order)
        return _Exchange.apply(x, _to_tokens, _to_heads, self.group, self.lengths)


def _check_heads(arguments: Arguments, size: int) -> None:
    nheads = arguments.q.shape[-2]
    if nheads % size:
        raise ValueError(
            f"q's number of heads ({nheads}) must be a multiple of the {size} processes that share "
            "them; ring_attention has no such limit"
        )


def _enough_heads(x: Tensor, size: int) -> Tensor:
    """Keys or values (..., heads, dim) with heads repeated so that processes can share them."""
    repeats = size // math.gcd(x.shape[-2], size)
    if repeats == 1:
        return x
    return x[..., None, :].expand(*x.shape[:-1], repeats, x.shape[-1]).flatten(-3, -2)


def _own_heads(x: Optional[Tensor], group) -> Optional[Tensor]:
    """This process' part of what has heads in the last dimension."""
    if x is None:
        return None
    rank, size = rank_and_size(group)
    return x.unflatten(-1, (size, -1))[..., rank, :]


@contextlib.contextmanager
def _own_masks(dropout_p: float, group):
    """Let the processes, whose heads have the same numbers, draw dropout's masks differently."""
    if dropout_p == 0.0:
        yield
        return
    generator = torch.default_generator
    seed = torch.randint(0, 2**62, ()).item()  # moves the generator on, as one call does
    state = generator.get_state()
    generator.manual_seed(seed + rank_and_size(group)[0])
    try:
        yield
    finally:
        generator.set_state(state)


def _attend_heads(attention, arguments: Arguments, of_q: _Exchanger, of_k: _Exchanger, **options):
    """(out, softmax_lse) of this process' tokens, by ``attention`` of all tokens of its heads."""
    group, packed = of_q.group, bool(arguments.cu_seqlens)
    size = rank_and_size(group)[1]
    inputs = arguments.q, *(_enough_heads(x, size) for x in arguments[1:3])
    spread = []
    for x, exchanger in zip(inputs, (of_q, of_k, of_k)):
        x = exchanger.to_heads(x[:, None] if packed else x.transpose(0, 1))
        spread.append(x[:, 0] if packed else x.transpose(0, 1))
    options["alibi_slopes"] = _own_heads(arguments.alibi_slopes, group)
    options["s_aux"] = _own_heads(arguments.s_aux, group)
    with _own_masks(arguments.score[0], group):
        out, softmax_lse = attention(*spread, **options)[:2]
    out = of_q.to_tokens(out[:, None] if packed else out.transpose(0, 1))
    if packed:
        softmax_lse = of_q.to_tokens(softmax_lse.t()[:, None, :, None])
        return out[:, 0], softmax_lse[:, 0, :, 0].t()
    softmax_lse = of_q.to_tokens(softmax_lse.permute(2, 0, 1)[..., None])
    return out.transpose(0, 1), softmax_lse[..., 0].permute(1, 2, 0)


def _dense_exchangers(own: list[dict], group, layout: str, device) -> list[_Exchanger]:
    exchangers = []
    for name in "qk":
        lengths = [x[name] for x in own]
        order = order_of_tokens(name, lengths, layout)
        order = None if order is None else order.to(device)
        exchangers.append(_Exchanger(group, tuple(lengths), order))
    return exchangers


@outside_graphs
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_softmax_lse: bool = False,
    *,
    group=None,
    layout: str = "contiguous",
    s_aux: Optional[Tensor] = None,
):
    """Attention of a dense batch whose tokens are shared, by sharing its heads.

    The arguments, results and errors are those of ``ring_attention``; any derivative that
    ``flash_attn_func`` has. The group's processes must divide q's heads. Where they do not divide
    those of k and v, these are sent to every process that needs them.

    Raises, on every process of the group alike:
        ValueError: as ``ring_attention``, and if the processes do not divide q's heads.
    """
    score = {
        "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal,
        "window_size": window_size, "softcap": softcap,
    }  # fmt: skip
    if _dtensor.is_dtensor(q):
        more = {"alibi_slopes": alibi_slopes, "layout": layout, "s_aux": s_aux}
        options = {**score, **more, "return_softmax_lse": return_softmax_lse}
        return on_local_tokens(ulysses_attention, q, k, v, group, options)
    group = as_group(group)
    size = rank_and_size(group)[1]
    options = {**score, "return_attn_probs": True}
    if size == 1:
        check_layout(layout)
        results = flash_attn_func(q, k, v, **options, alibi_slopes=alibi_slopes, s_aux=s_aux)
        return results[:2] if return_softmax_lse else results[0]
    arguments = None

    def call():
        nonlocal arguments
        arguments = checked(q, k, v, tuple(score.values()), alibi_slopes, s_aux, layout)
        _check_heads(arguments, size)
        return told("Ulysses attention", arguments)

    own = agreed(call, group, getattr(q, "device", None))
    exchangers = _dense_exchangers(own, group, layout, q.device)
    results = _attend_heads(flash_attn_func, arguments, *exchangers, **options)
    return results if return_softmax_lse else results[0]


@outside_graphs
def ulysses_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_softmax_lse: bool = False,
    *,
    group=None,
    layout: str = "contiguous",
    s_aux: Optional[Tensor] = None,
):
    """Attention of packed sequences whose tokens are shared, by sharing heads.

    The arguments, results and errors are those of ``ring_attention_varlen`` and
    ``ulysses_attention``.
    """
    group = as_group(group)
    rank, size = rank_and_size(group)
    score = {
        "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal,
        "window_size": window_size, "softcap": softcap,
    }  # fmt: skip
    arguments = None

    def call():
        nonlocal arguments
        sequences = (cu_seqlens_q, cu_seqlens_k)
        arguments = checked(q, k, v, tuple(score.values()), alibi_slopes, s_aux, layout, sequences)
        check_packed_shares(arguments, rank, size)
        _check_heads(arguments, size)
        return told("packed Ulysses attention", arguments)

    if size > 1:
        agreed(call, group, getattr(q, "device", None))
    else:
        call()
    seqlens = packed_seqlens(arguments)
    for name, lengths in zip("qk", seqlens):
        score[f"max_seqlen_{name}"] = max(lengths, default=0)
    options = {
        **score, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "return_attn_probs": True,
    }  # fmt: skip
    if size == 1:
        options.update(alibi_slopes=alibi_slopes, s_aux=s_aux)
        results = flash_attn_varlen_func(q, k, v, **options)[:2]
    else:
        exchangers = []
        for lengths in seqlens:
            places = order_of_packed(lengths, size, layout)
            order = torch.cat(places).to(q.device)
            exchangers.append(_Exchanger(group, tuple(map(len, places)), order))
        results = _attend_heads(flash_attn_varlen_func, arguments, *exchangers, **options)
    return results if return_softmax_lse else results[0]


@outside_graphs
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_softmax_lse: bool = False,
    *,
    mesh,
    layout: str = "contiguous",
    s_aux: Optional[Tensor] = None,
):
    """Attention of a dense batch whose tokens are shared over a mesh of two dimensions.

    Ring attention over the mesh's first dimension, Ulysses over its second one, whose processes
    should be those with the fastest connections: neighbours, where ranks ascend.

    Args:
        q, k, v: as for ``ring_attention``; ``shard_sequence(x, dim, mesh, layout)`` cuts.
        mesh: a DeviceMesh of two dimensions; the second one divides q's heads.
        layout: of the ring's parts, each of which the second dimension shares contiguously.

    The other arguments, the results and errors are those of ``ring_attention``.
    """
    if getattr(mesh, "ndim", None) != 2:
        raise wrong_kind("mesh", mesh, "a DeviceMesh of two dimensions")
    ring, inner = mesh.get_group(0), mesh.get_group(1)
    size, numbers = (
        rank_and_size(inner)[1],
        (dropout_p, softmax_scale, causal, window_size, softcap),
    )
    arguments = failure = None

    def call():
        nonlocal arguments
        arguments = checked(q, k, v, numbers, alibi_slopes, s_aux, layout)
        _check_heads(arguments, size)
        return told("hybrid attention", arguments)

    device = getattr(q, "device", None)
    try:
        own = agreed(call, inner, device)
    except Exception as error:  # raised below, when the ring knows
        failure = error

    def call_or_failure():
        if failure is not None:
            raise failure
        return told("hybrid attention", arguments)

    agreed(call_or_failure, ring, device)
    options = {
        "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal,
        "window_size": window_size, "softcap": softcap, "group": ring, "layout": layout,
        "return_softmax_lse": True,
    }  # fmt: skip
    exchangers = _dense_exchangers(own, inner, "contiguous", q.device)
    results = _attend_heads(ring_attention, arguments, *exchangers, **options)
    return results if return_softmax_lse else results[0]
