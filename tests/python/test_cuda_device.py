"""The CUDA kernels on a GPU: results, streams, graphs. Skipped where there is none."""

from __future__ import annotations

import dataclasses

import cache_cases
import pytest
import test_varlen
import torch
from attention_cases import check, cuda_case, qkv, sampled_cases
from backends import GPU, needs_kernels
from decode_step import DecodeStep
from test_cuda_boards import CALLS, CALLS_OF_BF16, assert_results_are_the_cpus, launches
from test_cuda_decode import CHOICES as FEW_QUERIES

from flash_attn import flash_attn_func, flash_attn_with_kvcache

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DECODE = dataclasses.replace(GPU, choices=FEW_QUERIES)


@pytest.mark.parametrize("case", sampled_cases(100, seed=3, backend=GPU), ids=str)
def test_feature_product(case):
    check(case, backend=GPU)


@pytest.mark.parametrize("case", sampled_cases(40, seed=3, backend=DECODE), ids=str)
def test_few_queries(case):
    check(case, backend=DECODE)


@pytest.mark.parametrize("case", test_varlen.varlen_cases(30, seed=7, backend=GPU), ids=str)
def test_packed(case):
    test_varlen.check(case, backend=GPU)


@pytest.mark.parametrize("case", cache_cases.sampled_cases(50, seed=3, backend=GPU), ids=str)
def test_cache(case):
    cache_cases.check(case, GPU)


@CALLS
def test_every_kernel(dtype, name):
    assert_results_are_the_cpus(launches.calls(dtype, "cuda")[name](), dtype, name)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(dims, causal):
    check(cuda_case(seqlens=(1500, 2000), heads=(8, 2), dims=dims, causal=causal), backend=GPU)


def _tensors():
    return [x.cuda() for x in qkv(cuda_case(seqlens=(700, 700), heads=(4, 4)))]


@CALLS_OF_BF16
def test_results_are_bitwise_reproducible(name):
    call = launches.calls("bf16", "cuda")[name]
    first = call()
    for _ in range(5):
        for x, y in zip(call(), first):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_long_cache():
    """Keys that many CTAs share."""
    q, k, v = (x.cuda() for x in qkv(cuda_case(seqlens=(1, 100_000), heads=(8, 2))))
    used = torch.tensor([99_000], dtype=torch.int32, device="cuda")
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=used)
    expected = flash_attn_func(q.float().cpu(), *(x[:, :99_000].float().cpu() for x in (k, v)))
    torch.testing.assert_close(out.cpu().float(), expected, rtol=0, atol=2e-4)


def test_gradients_are_bitwise_reproducible():
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


def test_captured_decode_follows_lengths_and_pages():
    step = DecodeStep("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for i, lengths in enumerate([(100, 1500, 0, 700), (1599, 3, 900, 0), (0, 0, 0, 0)]):
        step.set(lengths, seed=i)
        graph.replay()
        replayed, caches = out.clone(), [x.clone() for x in step.caches]
        assert torch.equal(replayed, step())
        assert all(torch.equal(x, y) for x, y in zip(caches, step.caches))


def test_streams_do_not_share_workspaces():
    """Decode steps with tiles that several CTAs share, at once on three streams."""
    steps = [DecodeStep("cuda", seed=i) for i in range(3)]
    expected = [step() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    outs = []
    for _ in range(20):
        for step, stream, alone in zip(steps, streams, expected):
            with torch.cuda.stream(stream):
                outs.append((step(), alone))
    torch.cuda.synchronize()
    assert all(torch.equal(out, alone) for out, alone in outs)
