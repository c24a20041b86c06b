"""Ring attention: exact attention of a sequence that the processes of a group share.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023
(https://arxiv.org/abs/2310.01889). Every process keeps its queries, and keys and values travel from
process to process while attention over those that have arrived is computed; parts are merged by
their softmax_lse. The backward passes keys and values round once more and with them the gradient,
each block differentiated with the softmax_lse of all keys, so that nothing of other processes is
kept: memory per process falls as one over their number.

Blocks that a mask hides are not computed, and keys travel no further than they are seen.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_attn import _dtensor
from flash_attn._buffers import maybe_contiguous, new_rng_state
from flash_attn.distributed import _calls
from flash_attn.distributed._agreement import agreed, rank_and_size
from flash_attn.distributed._blocks import plan_hops, visible_blocks
from flash_attn.distributed._calls import Merged, Scores, Sum
from flash_attn.distributed._checks import (
    Arguments,
    check_packed_shares,
    checked,
    outside_graphs,
    packed_seqlens,
    told,
)
from flash_attn.distributed._shards import on_local_tokens
from flash_attn.distributed._transfers import Ring, make_ready
from flash_attn.distributed.layout import (
    Segments,
    as_group,
    check_layout,
    count,
    dense_segments,
    shares,
)
from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["ring_attention", "ring_attention_varlen"]

_CALLS_OF_A_SOURCE = 1 << 16  # at most: seeds of dropout are numbered so


class _Plan(NamedTuple):
    """What a process does in a call."""

    ring: Ring
    scores: Scores
    calls: dict  # process -> calls over its keys; those without any are not needed
    tokens: list  # of keys, of each process
    token_dim: int


def _shifted(segments: Segments, by: int) -> Segments:
    return tuple(s._replace(position=s.position + by) for s in segments)


def _visible(q: list[Segments], k: list[Segments], window: tuple, with_distances: bool):
    """The blocks of each of several sequences, of which processes hold these segments."""
    return [visible_blocks(a, b, *window, with_distances) for a, b in zip(q, k)]


def _needs(q: list[list[Segments]], k: list[list[Segments]], window: tuple) -> list[set[int]]:
    """For each process the processes whose keys its queries see; by process, then by sequence."""
    return [
        {
            source
            for source, held in enumerate(k)
            if any(visible_blocks(a, b, *window) for a, b in zip(queries, held))
        }
        for queries in q
    ]


@functools.lru_cache(maxsize=256)
def _dense_plan(q: tuple, k: tuple, window: tuple, with_distances: bool, rank: int):
    """(hops, blocks of each process that ``rank`` needs) of a dense batch."""
    needs = _needs([[s] for s in q], [[s] for s in k], window)
    blocks = {s: visible_blocks(q[rank], k[s], *window, with_distances) for s in needs[rank]}
    return plan_hops(needs), blocks


def _plan_dense(arguments: Arguments, own: list[dict], group) -> _Plan:
    rank, size = rank_and_size(group)
    lengths_q, lengths_k = ([x[name] for x in own] for name in "qk")
    q = dense_segments("q", lengths_q, arguments.layout)
    k = dense_segments("k", lengths_k, arguments.layout)
    behind = sum(lengths_k) - sum(lengths_q)  # masks are aligned to the bottom right corner
    q = [_shifted(segments, behind) for segments in q]
    with_distances = arguments.alibi_slopes is not None
    hops, blocks = _dense_plan(tuple(q), tuple(k), arguments.window, with_distances, rank)
    calls = {source: _calls.dense_calls(some) for source, some in blocks.items()}
    return _Plan(Ring(group, rank, size, hops), arguments.scores, calls, lengths_k, 1)


@functools.lru_cache(maxsize=32)  # every layer of a model attends over the same sequences
def _packed_plan(
    seqlens_q: tuple, seqlens_k: tuple, layout: str, window: tuple, with_distances: bool, of: tuple
):
    """(hops, calls over each process' keys, tokens of keys of each process) of packed sequences.

    ``of``: rank, size, device.
    """
    rank, size, device = of
    by_sequence_q = [shares(n, size, layout) for n in seqlens_q]
    by_sequence_k = [shares(n, size, layout) for n in seqlens_k]
    k = [[held[r] for held in by_sequence_k] for r in range(size)]
    behind = [b - a for a, b in zip(seqlens_q, seqlens_k)]
    q = [[_shifted(held[r], by) for held, by in zip(by_sequence_q, behind)] for r in range(size)]
    needs = _needs(q, k, window)
    q_lengths = [count(s) for s in q[rank]]
    calls = {}
    for source in needs[rank]:
        blocks = _visible(q[rank], k[source], window, with_distances)
        k_lengths = [count(s) for s in k[source]]
        calls[source] = _calls.packed_calls(blocks, q_lengths, k_lengths, device)
    return plan_hops(needs), calls, [sum(count(s) for s in held) for held in k]


def _plan_packed(arguments: Arguments, group) -> _Plan:
    rank, size = rank_and_size(group)
    seqlens = map(tuple, packed_seqlens(arguments))
    mask = (arguments.layout, arguments.window, arguments.alibi_slopes is not None)
    hops, calls, tokens = _packed_plan(*seqlens, *mask, (rank, size, arguments.q.device))
    return _Plan(Ring(group, rank, size, hops), arguments.scores, calls, tokens, 0)


def _like(x: Tensor, token_dim: int, tokens: int, dtype=None) -> Tensor:
    """An uninitialised contiguous tensor of ``x``'s shape with another number of tokens."""
    shape = list(x.shape)
    shape[token_dim] = tokens
    return x.new_empty(shape, dtype=dtype)


def _rng_state(base: Optional[Tensor], plan: _Plan, source: int, call: int) -> Optional[Tensor]:
    """The random state of one call: every block of the scores draws a mask of its own."""
    if base is None:
        return None
    block = (plan.ring.rank * plan.ring.size + source) * _CALLS_OF_A_SOURCE + call
    return base + torch.tensor([block, 0])


def _lse_shape(q: Tensor, token_dim: int) -> tuple:
    heads, tokens = q.shape[-2], q.shape[token_dim]
    return (q.shape[0], heads, tokens) if token_dim else (heads, tokens)


def _attend(plan: _Plan, q: Tensor, k: Tensor, v: Tensor, s_aux: Optional[Tensor], base):
    """(out, softmax_lse) of this process' queries over the keys of all."""
    ring, dim = plan.ring, plan.token_dim
    merged = Merged(dim, (*q.shape[:-1], v.shape[-1]), _lse_shape(q, dim), q.device)

    def new_keys(source):
        return [_like(x, dim, plan.tokens[source]) for x in (k, v)]

    held = [k.contiguous(), v.contiguous()]
    for stage in range(ring.stages):
        batch, coming = ring.pass_keys(stage, held, new_keys)
        source = ring.source(stage)
        for number, call in enumerate(plan.calls.get(source, ())):
            rng_state = _rng_state(base, plan, source, number)
            merged.add(call.rows, *call.forward(plan.scores, q, *held, rng_state))
        batch.wait()
        held = coming
    return merged.result(q.dtype, s_aux)


class _Backward:
    """The gradients of a call: the second journey of the keys."""

    def __init__(self, plan: _Plan, saved: dict, k: Tensor, v: Tensor, base):
        self._plan, self._saved, self._base = plan, saved, base
        self._inputs = (k, v)
        self._dq = self._sum(saved["q"])

    def _sum(self, x: Tensor, tokens: Optional[int] = None) -> Sum:
        shape, dim = list(x.shape), self._plan.token_dim
        shape[dim] = shape[dim] if tokens is None else tokens
        return Sum(dim, torch.Size(shape), x.device)

    def _new_keys(self, source: int) -> list[Tensor]:
        plan = self._plan
        return [_like(x, plan.token_dim, plan.tokens[source]) for x in self._inputs]

    def _new_gradients(self, source: int, contributions: int) -> list[Tensor]:
        plan, dtype = self._plan, self._dtype(contributions)
        return [_like(x, plan.token_dim, plan.tokens[source], dtype) for x in self._inputs]

    def _dtype(self, contributions: int) -> torch.dtype:
        """Of a travelling gradient: what one process computed is not more exact in fp32."""
        return self._inputs[0].dtype if contributions == 1 else torch.float32

    def _add_blocks(self, source: int, held: list[Tensor], sums: list[Sum]) -> None:
        plan = self._plan
        for number, call in enumerate(plan.calls.get(source, ())):
            rng_state = _rng_state(self._base, plan, source, number)
            dq, dk, dv = call.backward(plan.scores, self._saved, *held, rng_state)
            self._dq.add(dq, call.rows)
            for total, part in zip(sums, (dk, dv)):
                total.add(part, call.keys)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv of this process' tokens."""
        ring = self._plan.ring
        own = [self._sum(x) for x in self._inputs]
        held = [x.contiguous() for x in self._inputs]
        travelling, coming, home, sums = None, [], [], own
        for stage in range(ring.stages):
            keys, next_held = ring.pass_keys(stage, held, self._new_keys)
            source = ring.source(stage)
            sums = own
            if stage:
                sums = [self._sum(x, self._plan.tokens[source]) for x in self._inputs]
            self._add_blocks(source, held, sums)
            if travelling is not None:
                travelling.wait()
                while coming:
                    sums[len(coming) - 1].join(coming.pop())
            travelling, coming, arriving = ring.pass_gradients(
                stage, functools.partial(self._results, sums), self._new_gradients
            )
            home = arriving or home
            keys.wait()
            held = next_held
        travelling.wait()
        del held, keys, sums, travelling
        dq = self._dq.result(self._saved["q"].dtype)
        self._dq = None
        return dq, *(self._finished(own, home, x) for x in self._inputs)

    def _finished(self, own: list[Sum], home: list[Tensor], x: Tensor) -> Tensor:
        """The gradient of k, then that of v: one after the other, to be done with their parts."""
        total = own.pop(0)
        if home:
            total.join(home.pop(0))
        return total.result(x.dtype)

    def _results(self, sums: list[Sum], contributions: int) -> list[Tensor]:
        dtype = self._dtype(contributions)
        return [total.result(dtype).contiguous() for total in sums]


def _gradient_of_sinks(saved: dict, s_aux: Tensor) -> Tensor:
    """What this process' queries add to it: a sink has weight, and no value to gain from."""
    delta = (saved["dout"].float() * saved["out"].float()).sum(-1).transpose(-1, -2)
    if saved["dlse"] is not None:
        delta = delta - saved["dlse"]
    lse = saved["softmax_lse"]
    weight = torch.exp(s_aux.float()[:, None] - lse)
    rows = -(weight * delta)
    return rows.sum(-1).reshape(-1, len(s_aux)).sum(0).to(s_aux.dtype)


class _RingAttention(torch.autograd.Function):
    """(out, softmax_lse) of ring attention."""

    @staticmethod
    def forward(ctx, plan: _Plan, q, k, v, s_aux):
        base = new_rng_state(plan.scores.dropout_p) if plan.scores.dropout_p > 0.0 else None
        out, softmax_lse = _attend(plan, q, k, v, s_aux, base)
        ctx.save_for_backward(q, k, v, s_aux, out, softmax_lse)
        ctx.plan, ctx.base = plan, base
        ctx.set_materialize_grads(False)
        return out, softmax_lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, s_aux, out, softmax_lse = ctx.saved_tensors
        # A process whose results nobody used still passes on what the others need.
        dout = torch.zeros_like(out) if dout is None else maybe_contiguous(dout)
        dlse = None if dlse is None else dlse.contiguous()
        saved = {"dout": dout, "q": q, "out": out, "softmax_lse": softmax_lse, "dlse": dlse}
        gradients = _Backward(ctx.plan, saved, k, v, ctx.base).run()
        wants_sinks = s_aux is not None and ctx.needs_input_grad[4]
        return None, *gradients, _gradient_of_sinks(saved, s_aux) if wants_sinks else None


def _run(plan: _Plan, arguments: Arguments, return_softmax_lse: bool):
    make_ready(plan.ring.group, arguments.q.device)
    q, k, v, s_aux = *arguments[:3], arguments.s_aux
    out, softmax_lse = _RingAttention.apply(plan, *map(maybe_contiguous, (q, k, v)), s_aux)
    return (out, softmax_lse) if return_softmax_lse else out


@outside_graphs
def ring_attention(
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
    """Attention of a dense batch whose tokens are shared by the processes of a group.

    ``flash_attn_func`` of the whole sequences, of which each process has the part that ``layout``
    says and gets that part of the result (``shard_sequence`` cuts, ``unshard_sequence`` joins).

    Args:
        q: this process' part of the queries, ``(batch, local seqlen_q, nheads, headdim)``; or a
            DTensor sharded over its tokens, which then says the group: so are k, v and the result.
        k: of the keys, ``(batch, local seqlen_k, nheads_k, headdim)``.
        v: of the values, ``(batch, local seqlen_k, nheads_k, headdim_v)``.
        dropout_p: the masks are others than those of one process.
        alibi_slopes: fp32 ``(nheads,)`` or ``(batch, nheads)``, the same on every process; without
            gradient.
        deterministic: accepted for compatibility; forward and backward are always deterministic.
        return_softmax_lse: whether to return softmax_lse, too. It is differentiable.
        group: a process group, a DeviceMesh of one dimension, or None: torch's default group.
        layout: "contiguous", where processes may have any number of tokens, none even; or
            "zigzag", under a causal mask with the same work for every process.
        s_aux: sinks, ``(nheads,)``, the same on every process. Its gradient is that of this
            process' queries: those of all processes are to be added, as of any parameter.

    What is not named here is that of ``flash_attn_func``.

    Returns:
        out, ``(batch, local seqlen_q, nheads, headdim_v)``, dtype of q; with
        ``return_softmax_lse`` (out, softmax_lse), softmax_lse fp32 ``(batch, nheads, local
        seqlen_q)``.

    Raises, on every process of the group alike:
        ValueError: an argument is invalid here or on another process, or differs between them.
        RuntimeError, TypeError: an argument is invalid here.
    """
    options = {
        "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal,
        "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    if _dtensor.is_dtensor(q):
        options.update(return_softmax_lse=return_softmax_lse, layout=layout, s_aux=s_aux)
        return on_local_tokens(ring_attention, q, k, v, group, options)
    group = as_group(group)
    if rank_and_size(group)[1] == 1:
        check_layout(layout)
        results = flash_attn_func(q, k, v, **options, return_attn_probs=True, s_aux=s_aux)
        return results[:2] if return_softmax_lse else results[0]
    numbers = (dropout_p, softmax_scale, causal, window_size, softcap)
    arguments = None

    def call():
        nonlocal arguments
        arguments = checked(q, k, v, numbers, alibi_slopes, s_aux, layout)
        return told("ring attention", arguments)

    own = agreed(call, group, getattr(q, "device", None))
    return _run(_plan_dense(arguments, own, group), arguments, return_softmax_lse)


@outside_graphs
def ring_attention_varlen(
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
    """Attention of packed sequences, each of which is shared by the processes of a group.

    Args:
        q: this process' part of the queries, ``(local total_q, nheads, headdim)``: the parts of
            every sequence one after the other (``shard_varlen``).
        k: of the keys, ``(local total_k, nheads_k, headdim)``.
        v: of the values, ``(local total_k, nheads_k, headdim_v)``.
        cu_seqlens_q: int32 ``(batch + 1,)``, where the *whole* sequences of queries start and end;
            the same on every process.
        cu_seqlens_k: the same for keys.

    The other arguments and the errors are those of ``ring_attention``.

    Returns:
        out, ``(local total_q, nheads, headdim_v)``, dtype of q; with ``return_softmax_lse``
        (out, softmax_lse), softmax_lse fp32 ``(nheads, local total_q)``.
    """
    group = as_group(group)
    rank, size = rank_and_size(group)
    numbers = (dropout_p, softmax_scale, causal, window_size, softcap)
    arguments = None

    def call():
        nonlocal arguments
        sequences = (cu_seqlens_q, cu_seqlens_k)
        arguments = checked(q, k, v, numbers, alibi_slopes, s_aux, layout, sequences)
        check_packed_shares(arguments, rank, size)
        return told("packed ring attention", arguments)

    if size == 1:
        call()
        longest = (max(seqlens, default=0) for seqlens in packed_seqlens(arguments))
        results = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, *numbers, alibi_slopes,
            return_attn_probs=True, s_aux=s_aux,
        )  # fmt: skip
        return results[:2] if return_softmax_lse else results[0]
    agreed(call, group, getattr(q, "device", None))
    return _run(_plan_packed(arguments, group), arguments, return_softmax_lse)
