"""Dropout on the emulated GPU: its masks are the CPU's, bit for bit, and so is S_dmask but for
rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import Case, make_tensors
from backends import BF16, CPU, EMULATOR, FP16, FP32, needs_emulator

from flash_attn import flash_attn_func, flash_attn_varlen_func

pytestmark = needs_emulator

P = 0.3


def assert_equal_masks(actual, expected):
    """The same signs, and values within the rounding of their dtype."""
    assert torch.equal(torch.signbit(actual), torch.signbit(expected))
    eps = torch.finfo(actual.dtype).eps
    # Scores reach 40, with errors of 1e-5; the smallest values are subnormal.
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=1e-6)


def s_dmask(call):
    """S_dmask on the emulated GPU and on the CPU."""
    results = []
    for backend in (EMULATOR, CPU):
        torch.manual_seed(3)
        with backend.calls(seed=2):
            results.append(call()[2])
    return results


CASES = [
    Case(batch=2, seqlens=(19, 300), heads=(2, 1), dims=(32, 32)),
    Case(seqlens=(40, 140), heads=(2, 2), dims=(64, 64), causal=True),
    Case(seqlens=(60, 90), heads=(2, 1), dims=(96, 96), window_size=(40, 20), softcap=5.0),
    Case(batch=2, seqlens=(17, 100), heads=(2, 1), dims=(128, 128), alibi="bh"),
    Case(seqlens=(18, 130), heads=(1, 1), dims=(256, 256), causal=True, softmax_scale=-0.1),
    Case(seqlens=(40, 90), heads=(2, 1), dims=(33, 17), bias="bhqk", sinks=FP32),
    Case(seqlens=(20, 90), heads=(2, 1), dims=(160, 160), bias="k", bias_dtype="fp32"),
    Case(seqlens=(20, 90), heads=(3, 1), dims=(400, 300), causal=True),
    Case(seqlens=(1, 1), heads=(1, 1), dims=(1, 1)),
    Case(seqlens=(3, 0), heads=(1, 1), dims=(8, 8)),
]


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_s_dmask(index, dtype):
    tensors, options, *_ = make_tensors(dataclasses.replace(CASES[index], dtype=dtype))
    options |= {"dropout_p": P, "return_attn_probs": True}
    assert_equal_masks(*s_dmask(lambda: flash_attn_func(**tensors, **options)))


@pytest.mark.parametrize("page_size", [0, 16])
def test_s_dmask_of_a_packed_batch(page_size):
    lengths_q, lengths_k = [23, 0, 40], [129, 20, 0]
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths_q), 4, 40, generator=gen).to(FP16)
    k = torch.randn(sum(lengths_k), 2, 40, generator=gen).to(FP16)
    table = None
    if page_size:
        k = torch.randn(30, page_size, 2, 40, generator=gen).to(FP16)
        table = torch.randperm(30, generator=gen)[:27].view(3, 9).int()
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    masks = s_dmask(
        lambda: flash_attn_varlen_func(
            q, k, k, cu_q, cu_k, 40, 129, dropout_p=P, return_attn_probs=True, block_table=table
        )
    )
    assert masks[0].shape == (3, 4, 128, 256)
    assert_equal_masks(*masks)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("headdim", [32, 64, 96, 128, 192, 256, 300])
@pytest.mark.parametrize("seed", range(3))
def test_the_forward_drops_what_s_dmask_says(dtype, headdim, seed):
    """V picks single keys: out is 0 where they are dropped."""
    keys = min(headdim, 70)
    q = torch.zeros(2, 77, 2, headdim, dtype=dtype)
    k = torch.zeros(2, keys, 1, headdim, dtype=dtype)
    v = torch.eye(keys, headdim, dtype=dtype).expand(2, keys, headdim)[:, :, None]
    torch.manual_seed(seed)
    expected = flash_attn_func(q, k, v, dropout_p=P, return_attn_probs=True)[2]
    torch.manual_seed(seed)
    with EMULATOR.calls(seed):
        out = flash_attn_func(q, k, v, dropout_p=P)
    kept = out.transpose(1, 2)[..., :keys] != 0
    assert torch.equal(kept, ~torch.signbit(expected[:, :, :77, :keys]))
