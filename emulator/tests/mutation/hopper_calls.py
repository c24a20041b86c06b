"""Cases of tools/mutate.py on the emulated H100, made as few multiprocessors as a case wants."""

from __future__ import annotations

import ctypes
import os
from typing import Callable

import torch

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func

DEVICE = 1
TOLERANCE = 0.03


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _dense(seqlens, heads, head_dim, bad=(), **options):
    """``bad``: keys whose V is NaN in one column."""
    q = _normal(1, seqlens[0], heads, head_dim)
    k, v = _normal(2, 1, seqlens[1], 1, head_dim).unbind(0)
    for key in bad:
        v[0, key, 0, 3] = float("nan")

    def call(dtype):
        torch.manual_seed(1)  # of dropout
        return flash_attn_func(
            *(x.bfloat16().to(dtype) for x in (q, k, v)), **options, return_attn_probs=True
        )[:2]

    return call


def _packed(lengths_q, lengths_k, head_dim, rest=5, **options):
    """``rest`` rows of no sequence; rows of K and V behind the last key are NaN."""
    q = _normal(sum(lengths_q) + rest, 2, head_dim)
    k, v = _normal(2, sum(lengths_k) + rest, 1, head_dim).unbind(0)
    k[sum(lengths_k) :] = v[sum(lengths_k) :] = float("nan")

    def call(dtype):
        return flash_attn_varlen_func(
            *(x.bfloat16().to(dtype) for x in (q, k, v)),
            _cumulative(lengths_q),
            _cumulative(lengths_k),
            max(lengths_q),
            max(lengths_k),
            **options,
            return_attn_probs=True,
        )[:2]

    return call


CALLS = {
    # 2 tiles a head; of the queries' keys, blocks before and behind the full ones.
    "windowed": lambda: _dense((200, 450), 2, 64, (20, 440), window_size=(300, 60)),
    # No block of V is looked through.
    "plain": lambda: _dense((70, 150), 1, 64),
    # A tile of one block for each head, then those without keys.
    "small tiles": lambda: _dense((700, 20), 4, 64, causal=True),
    "unmasked": lambda: _dense((130, 300), 2, 128),
    "unmasked small tiles": lambda: _dense((200, 90), 4, 128),
    "causal": lambda: _dense((260, 300), 2, 128, (299,), causal=True),
    "in Q's place": lambda: _dense((140, 400), 1, 256, (10,), causal=True),
    "packed": lambda: _packed([70, 0, 200], [150, 20, 190], 128, causal=True),
    "packed, in Q's place": lambda: _packed([70, 140, 20, 9], [100, 0, 90, 0], 256),
}


def run_of(*names: str, sms: int = 1) -> Callable[[], bool]:
    """A case's ``run``: the calls of these names give what they give in fp32 on the CPU."""
    calls = [CALLS[name]() for name in names]
    expected = [call(torch.float32) for call in calls]
    library = os.environ["GPU_EMULATOR_LIBRARY"]
    ctypes.CDLL(library).gpuEmulatorSetOption(DEVICE, b"sms", str(sms).encode())
    # Entered for good: the tool sets the options that change.
    flash_attn.emulator("sm_90a", library=library, threads=1).__enter__()

    def run() -> bool:
        for call, exact in zip(calls, expected):
            for x, y in zip(call(torch.bfloat16), exact):
                if not torch.isclose(x.float(), y, rtol=0, atol=TOLERANCE, equal_nan=True).all():
                    return False
        return True

    return run
