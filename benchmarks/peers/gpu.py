"""Who is compared on a GPU, by operation; see ``registry``."""

from __future__ import annotations

import torch
from cases.case import Case, Inputs

from peers.registry import Run, cumulative, flash_attn, sdpa, sdpa_cudnn, sdpa_flash
from peers.unsupported import Unsupported


def flash_attn_graph(case: Case, inputs: Inputs) -> Run:
    """This package's call, captured once and replayed."""
    if inputs.q.device.type != "cuda":
        raise Unsupported("has no CUDA graphs here")
    run = flash_attn(case, inputs)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay():
        graph.replay()
        return results

    return replay


def torch_varlen(case: Case, inputs: Inputs) -> Run:
    """torch.nn.attention.varlen, of torch 2.10 and newer."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unsupported("torch has no varlen_attn") from error
    cu_seqlens, longest = cumulative(case.lengths(), inputs.q.device), max(case.lengths())
    window = (-1, 0 if case.causal else -1)

    def run():
        out = varlen_attn(
            *(inputs.q, inputs.k, inputs.v, cu_seqlens, cu_seqlens, longest, longest),
            window_size=window,
        )
        return (out,)

    return run


def copy(case: Case, inputs: Inputs) -> Run:
    """The device copies the keys and values: what reading and writing as many bytes takes."""
    targets = [torch.empty_like(x) for x in (inputs.k, inputs.v)]

    def run():
        for target, x in zip(targets, (inputs.k, inputs.v)):
            target.copy_(x)
        return ()

    return run


SDPA = {"sdpa_flash": sdpa_flash, "sdpa_cudnn": sdpa_cudnn}
PEERS = {
    "fwd": {"flash_attn": flash_attn, **SDPA},
    "fwd_bwd": {"flash_attn": flash_attn, **SDPA},
    "varlen": {"flash_attn": flash_attn, "torch_varlen": torch_varlen},
    "decode": {"flash_attn": flash_attn, "sdpa": sdpa, **SDPA, "copy": copy},
    "latency": {"flash_attn": flash_attn, "flash_attn_graph": flash_attn_graph, "sdpa": sdpa},
}
PEERS["decode_grid"] = PEERS["decode"]
OURS = frozenset(("flash_attn", "flash_attn_graph"))
