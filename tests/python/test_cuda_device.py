"""The CUDA kernels on a GPU: results, streams, graphs. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from attention_cases import check, cuda_case, qkv, sampled_cases
from backends import GPU, needs_kernels

from flash_attn import flash_attn_func

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("case", sampled_cases(150, seed=3, backend=GPU), ids=str)
def test_feature_product(case):
    check(case, backend=GPU)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(dims, causal):
    check(cuda_case(seqlens=(1500, 2000), heads=(8, 2), dims=dims, causal=causal), backend=GPU)


def _tensors():
    return [x.cuda() for x in qkv(cuda_case(seqlens=(700, 700), heads=(4, 4)))]


def test_results_are_bitwise_reproducible():
    leaves = [x.requires_grad_() for x in _tensors()]

    def results():
        out = flash_attn_func(*leaves, causal=True)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    first = results()
    for _ in range(10):
        assert all(map(torch.equal, results(), first))


def test_runs_on_the_current_stream():
    """On a side stream the call is ordered after that stream's work."""
    q, k, v = _tensors()
    expected = flash_attn_func(q, k, v)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(q)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = flash_attn_func(late, k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_can_be_captured():
    q, k, v = _tensors()
    expected = flash_attn_func(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, causal=True)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
