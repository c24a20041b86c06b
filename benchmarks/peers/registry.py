"""Those who are compared: each turns a case and its inputs into a function that runs the operation.

The function returns what it computed, in this package's layout: (out,) or (dq, dk, dv), and both
for ``fwd_bwd``. Every peer gets its tensors in the memory layout that suits it; laying them out is
not timed. A peer that cannot run a case raises ``Unsupported``.
"""

from __future__ import annotations

import dataclasses
from typing import Callable

import torch
import torch.nn.functional as F
from cases.case import Case, Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from peers.ggml import ggml
from peers.onednn import onednn
from peers.openvino import openvino
from peers.unsupported import Unsupported

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


def cumulative(lengths: list[int], device: torch.device) -> Tensor:
    """(batch + 1,) offsets of packed sequences."""
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _paged(cache: Tensor, page_size: int) -> Tensor:
    """The cache's memory as pages (pages, page_size, nheads_k, headdim)."""
    return cache.view(-1, page_size, *cache.shape[2:])


def _decode(case: Case, inputs: Inputs) -> Run:
    """One query a sequence; the pages of each sequence lie in random order."""
    device = inputs.q.device
    cache_seqlens = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=device)
    q, k, v, block_table = inputs.q, inputs.k, inputs.v, None
    if case.page_size:
        k, v = _paged(k, case.page_size), _paged(v, case.page_size)
        generator, pages = torch.Generator().manual_seed(0), k.shape[0] // case.batch
        orders = [torch.randperm(pages, generator=generator) + i * pages for i in range(case.batch)]
        block_table = torch.stack(orders).int().to(device)
    return lambda: (
        flash_attn_with_kvcache(q, k, v, cache_seqlens=cache_seqlens, block_table=block_table),
    )


def flash_attn(case: Case, inputs: Inputs) -> Run:
    """This package."""
    if case.op == "decode":
        return _decode(case, inputs)
    window = (case.window, 0) if case.window else (-1, -1)
    masks = {"causal": case.causal, "window_size": window}
    if case.op == "varlen":
        cu_seqlens = cumulative(case.lengths(), inputs.q.device)
        longest = max(case.lengths())

        def packed(q, k, v):
            return flash_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, longest, longest, **masks
            )

        return _operation(case, packed, inputs.q, inputs.k, inputs.v, inputs.dout)

    def dense(q, k, v):
        return flash_attn_func(q, k, v, **masks)

    return _operation(case, dense, inputs.q, inputs.k, inputs.v, inputs.dout)


def no_window(case: Case, inputs: Inputs) -> Run:
    """This package without the case's window: what a window saves."""
    if not case.window:
        raise Unsupported("the case has no window")
    return flash_attn(dataclasses.replace(case, window=0), inputs)


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


def _sdpa(case: Case, inputs: Inputs, backends: tuple[SDPBackend, ...]) -> Run:
    if case.window:
        raise Unsupported("has no window")
    is_causal, enable_gqa = case.is_masked, case.nheads != case.nheads_k

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)

    if not backends:
        return _heads_first(case, inputs, attention)

    def restricted(q, k, v):
        with sdpa_kernel(list(backends)):
            return attention(q, k, v)

    return _heads_first(case, inputs, restricted)


def sdpa(case: Case, inputs: Inputs) -> Run:
    """torch.nn.functional.scaled_dot_product_attention, its choice of backend."""
    return _sdpa(case, inputs, ())


def sdpa_flash(case: Case, inputs: Inputs) -> Run:
    """The same with torch's flash backend, on CPUs the only fused one."""
    return _sdpa(case, inputs, (SDPBackend.FLASH_ATTENTION,))


def sdpa_cudnn(case: Case, inputs: Inputs) -> Run:
    """The same with cuDNN, on GPUs."""
    return _sdpa(case, inputs, (SDPBackend.CUDNN_ATTENTION,))


def sdpa_math(case: Case, inputs: Inputs) -> Run:
    """The same with torch's math backend: all scores in memory."""
    return _sdpa(case, inputs, (SDPBackend.MATH,))


def plain(case: Case, inputs: Inputs) -> Run:
    """Softmax attention of matrix products, with the matrix of all scores in memory."""
    if case.window:
        raise Unsupported("has no window")
    groups = case.nheads // case.nheads_k

    def attention(q, k, v):
        k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if case.is_masked:
            rows, columns = scores.shape[-2:]
            hidden = torch.ones(rows, columns, dtype=torch.bool).triu_(columns - rows + 1)
            scores = scores.masked_fill_(hidden, -torch.inf)
        return scores.softmax(dim=-1) @ v

    return _heads_first(case, inputs, attention)


PEERS: dict[str, Callable[[Case, Inputs], Run]] = {
    "flash_attn": flash_attn,
    "no_window": no_window,
    "sdpa": sdpa,
    "sdpa_flash": sdpa_flash,
    "sdpa_math": sdpa_math,
    "plain": plain,
    "onednn": onednn,
    "openvino": openvino,
    "ggml": ggml,
}
# Those that keep the scores of all heads in memory.
HOLDS_SCORES = frozenset(("sdpa_math", "plain"))
