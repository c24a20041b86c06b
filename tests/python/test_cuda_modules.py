"""Attention modules on the CUDA kernels, emulated: as on the CPU backend."""

from __future__ import annotations

import pytest
import torch
from backends import needs_emulator
from module_decoding import decode
from small_cases import int32, randn

import flash_attn
from flash_attn.modules.mha import MHA

pytestmark = needs_emulator

DIM, HEADS = 128, 4
OPTIONS = {
    "rotary, grouped, window": {"num_heads_kv": 2, "rotary_emb_dim": 16, "window_size": (40, 0)},
    "alibi": {"use_alibi": True},
}


def make(**options):
    torch.manual_seed(0)
    module = MHA(DIM, HEADS, layer_idx=3, causal=True, use_flash_attn=True, **options)
    return module.half().eval()


def both(call):
    """``call()`` on the CPU backend and on the emulated GPU, and the kernels that ran there."""
    expected = call()
    with flash_attn.emulator(mode="random", seed=1) as gpu:
        actual = call()
    return expected, actual, {name.split("_")[1] for name in gpu.counters}


def assert_close(actual, expected):
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients(name):
    module, x = make(**OPTIONS[name]), randn(1, 70, DIM, dtype=torch.float16, grad=True)

    def call():
        out = module(x)
        return out, *torch.autograd.grad(out.float().sum(), (x, module.Wqkv.bias))

    expected, actual, kinds = both(call)
    assert {"fwd", "bwd"} <= kinds
    assert_close(actual[:2], expected[:2])
    # A sum over 70 tokens in fp16.
    torch.testing.assert_close(actual[2], expected[2], atol=0.05, rtol=0.01)


def test_packed_sequences():
    module, x = make(**OPTIONS["rotary, grouped, window"]), randn(80, DIM, dtype=torch.float16)

    def call():
        with torch.no_grad():
            return (module(x, cu_seqlens=int32([0, 30, 30, 80]), max_seqlen=50),)

    expected, actual, kinds = both(call)
    assert kinds == {"fwd", "rotary"}
    assert_close(actual, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_decoding(name):
    module, x = make(**OPTIONS[name]), randn(2, 12, DIM, dtype=torch.float16)

    def call():
        with torch.no_grad():
            return (decode(module, x, (9, 1, 1, 1)),)

    expected, actual, kinds = both(call)
    assert "decode" in kinds
    assert_close(actual, expected)
    with torch.no_grad():
        assert_close(actual, (module(x),))
