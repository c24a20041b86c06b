"""Those who are compared: each turns a case and its inputs into a function that runs the operation.

The function returns what it computed, in this package's layout: (out,) or (dq, dk, dv), and both
for ``fwd_bwd``. Every peer gets its tensors in the memory layout that suits it; laying them out is
not timed.
"""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from cases import Case, Inputs
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Run = Callable[[], tuple[Tensor, ...]]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _operation(case: Case, attention: Attention, q, k, v, dout) -> Run:
    """The forward, the backward or both of ``attention``, as the case says."""
    if not case.has_gradient:

        def forward():
            with torch.no_grad():
                return (attention(q, k, v),)

        return forward

    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    if case.op == "fwd_bwd":

        def both():
            out = attention(*leaves)
            return (out, *torch.autograd.grad(out, leaves, dout))

        return both

    out = attention(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _cumulative(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


def flash_attn(case: Case, inputs: Inputs) -> Run:
    """This package."""
    if case.op == "decode":
        cache_seqlens = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32)
        q, k, v = inputs.q, inputs.k, inputs.v
        return lambda: (
            flash_attn_with_kvcache(q, k, v, cache_seqlens=cache_seqlens, causal=case.causal),
        )
    if case.op == "varlen":
        cu_seqlens, longest = _cumulative(case.lengths()), case.seqlen_k

        def packed(q, k, v):
            return flash_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=case.causal
            )

        return _operation(case, packed, inputs.q, inputs.k, inputs.v, inputs.dout)

    def dense(q, k, v):
        return flash_attn_func(q, k, v, causal=case.causal)

    return _operation(case, dense, inputs.q, inputs.k, inputs.v, inputs.dout)


def _heads_first(case: Case, inputs: Inputs, attention: Attention) -> Run:
    """An attention of (batch, nheads, seqlen, headdim) tensors; packed sequences one by one."""
    if case.op == "varlen":
        parts = zip(*(x.split(case.lengths()) for x in (inputs.q, inputs.k, inputs.v)))
        sequences = [tuple(x.transpose(0, 1).contiguous()[None] for x in part) for part in parts]

        def packed():
            with torch.no_grad():
                outs = [attention(*sequence)[0].transpose(0, 1) for sequence in sequences]
            return (torch.cat(outs),)

        return packed
    tensors = (inputs.q, inputs.k, inputs.v, inputs.dout)
    run = _operation(case, attention, *(x.transpose(1, 2).contiguous() for x in tensors))
    return lambda: tuple(x.transpose(1, 2) for x in run())


def sdpa(case: Case, inputs: Inputs) -> Run:
    """torch.nn.functional.scaled_dot_product_attention."""
    is_causal = case.causal and case.op != "decode"
    enable_gqa = case.nheads != case.nheads_k

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)

    return _heads_first(case, inputs, attention)


def plain(case: Case, inputs: Inputs) -> Run:
    """Softmax attention of matrix products, with the matrix of all scores in memory."""
    groups = case.nheads // case.nheads_k

    def attention(q, k, v):
        k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if case.causal and case.op != "decode":
            rows, columns = scores.shape[-2:]
            hidden = torch.ones(rows, columns, dtype=torch.bool).triu_(columns - rows + 1)
            scores = scores.masked_fill_(hidden, -torch.inf)
        return scores.softmax(dim=-1) @ v

    return _heads_first(case, inputs, attention)


PEERS: dict[str, Callable[[Case, Inputs], Run]] = {
    "flash_attn": flash_attn,
    "sdpa": sdpa,
    "plain": plain,
}
