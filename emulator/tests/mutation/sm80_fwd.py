"""The forward attention kernel of csrc/flash_attn/src/sm80, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/sm80_fwd.py

Four blocks of keys, so that every slot of the ring is filled again, and rows beyond the end.
"""

import os

import torch

import flash_attn

SEQLEN, HEADS, HEAD_DIM = 200, 1, 64


def _inputs():
    generator = torch.Generator().manual_seed(1)
    shape = (1, SEQLEN, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(3)]


def _reference(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
    mask = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


# Entered for good: the tool sets the options that change.
flash_attn.emulator("sm_80", library=os.environ.get("GPU_EMULATOR_LIBRARY"), threads=1).__enter__()
_Q, _K, _V = _inputs()
_EXPECTED = _reference(_Q, _K, _V)


def run() -> bool:
    out = flash_attn.flash_attn_func(_Q, _K, _V, causal=True)
    return bool((out.double() - _EXPECTED).abs().max() < 0.02)
