"""FlashAttention-3's functions on the CUDA kernels: on the emulated GPU, and on one where there is
one."""

from __future__ import annotations

import fa3_cases
import pytest
import test_fa3_kvcache
import torch
from backends import BF16, EMULATOR, FP16, GPU, HOPPER, needs_emulator, needs_kernels
from cache_cases import Case as CacheCase
from cache_cases import sampled_cases
from fa3_cases import Case

from flash_attn import v3

pytestmark = needs_kernels
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_emulator
@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=BF16, causal=True, lengths=((64, 70), (30, 20))),
        Case(dtype=BF16, attention_chunk=32, causal=True, lengths=((70, 70), (20, 50))),
        Case(dtype=FP16, used=True, lengths=((40, 60), (30, 31))),
        Case(dtype=BF16, qv=True, lengths=((40, 60), (30, 31))),
    ],
    ids=str,
)
def test_attention(case):
    fa3_cases.check(case, EMULATOR)
    fa3_cases.check(case, HOPPER)


@needs_emulator
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        CacheCase(dtype=BF16, capacity=70, page_size=16, seqlen_q=3, seqlen_new=3, causal=True),
        CacheCase(dtype=FP16, capacity=60, leftpad=True, batch_idx=True, window_size=(20, 0)),
    ],
    ids=str,
)
def test_cache(case, packed):
    test_fa3_kvcache.check(case, EMULATOR, packed)


@needs_emulator
@pytest.mark.parametrize("page_size", [16, 64])
def test_packed_prefill_over_pages_is_hoppers(page_size):
    """As serving engines call it: nothing keeps it from the kernels of compute capability 9.0."""
    generator = torch.Generator().manual_seed(0)
    k_cache, v_cache = torch.randn(2, 12, page_size, 1, 64, generator=generator).to(BF16)
    table = torch.randperm(12, generator=generator).view(2, 6).to(torch.int32)
    q = torch.randn(200, 2, 64, generator=generator).to(BF16)
    options = {
        "cache_seqlens": torch.tensor([6 * page_size, 70], dtype=torch.int32),
        "page_table": table,
        "cu_seqlens_q": torch.tensor([0, 130, 200], dtype=torch.int32),
        "max_seqlen_q": 130,
        "causal": True,
    }
    expected = v3.flash_attn_with_kvcache(q, k_cache, v_cache, **options)
    with HOPPER.calls() as gpu:
        out = v3.flash_attn_with_kvcache(q, k_cache, v_cache, **options)
    assert [name.rsplit("_", 3)[0] for name in gpu.counters] == ["flash_fwd_sm90"]
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-2)


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": True, "sinks": True},
        {"attention_chunk": 64, "causal": True, "dims": (128, 128)},
        {"used": True, "window_size": (50, 10)},
        {"qv": True, "causal": True},
    ],
    ids=str,
)
def test_attention_on_a_gpu(dtype, fields):
    lengths = ((700, 700), (33, 300), (300, 33), (1, 500))
    fa3_cases.check(Case(dtype=dtype, lengths=lengths, **fields), GPU)


@needs_gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", sampled_cases(20, seed=12, backend=GPU), ids=str)
def test_cache_on_a_gpu(case, packed):
    test_fa3_kvcache.check(case, GPU, packed)


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"attention_chunk": 64}], ids=str)
def test_a_graph_of_packed_decoding(options):
    """Captured once, replayed for other lengths: nothing waits for the GPU."""
    k_cache, v_cache = torch.randn(2, 12, 64, 2, 64, device="cuda").bfloat16()
    table = torch.randperm(12, device="cuda").view(3, 4).to(torch.int32)
    q = torch.randn(3, 8, 64, device="cuda").bfloat16()
    cu_seqlens = torch.arange(4, dtype=torch.int32, device="cuda")
    seqlens = torch.tensor([256, 256, 256], dtype=torch.int32, device="cuda")

    def decode():
        return v3.flash_attn_with_kvcache(
            *(q, k_cache, v_cache),
            page_table=table,
            cache_seqlens=seqlens,
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=1,
            causal=True,
            return_softmax_lse=True,
            **options,
        )[:2]

    decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = decode()
    for lengths in ((1, 130, 256), (64, 0, 65)):
        seqlens.copy_(torch.tensor(lengths))
        graph.replay()
        for actual, expected in zip(results, decode()):
            assert torch.equal(actual, expected)
