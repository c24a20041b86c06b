"""The kernels of csrc/flash_attn/src/sm80 that append to a paged cache and attend to it, for
tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/sm80_cache.py

More queries than decoding takes, rotated and negated in shared memory, and modified scores. The
CPU backend has the expected result: what is deleted is CUDA's.
"""

import os

import torch

import flash_attn

QUERIES, CACHED, PAGES, PAGE_SIZE, HEADS, HEAD_DIM = 70, 100, 16, 16, 2, 64
GENERATOR = torch.Generator().manual_seed(1)


def _normal(*shape):
    return torch.randn(shape, generator=GENERATOR).bfloat16()


_Q = _normal(1, QUERIES, HEADS, HEAD_DIM)
_NEW = [_normal(1, QUERIES, 1, HEAD_DIM) for _ in "kv"]
_CACHE = [_normal(PAGES, PAGE_SIZE, 1, HEAD_DIM) for _ in "kv"]
_TABLE = torch.randperm(PAGES, generator=GENERATOR).to(torch.int32)[None]
_ANGLES = torch.rand(PAGES * PAGE_SIZE, HEAD_DIM // 2, generator=GENERATOR)
_SIZES = torch.tensor([CACHED], dtype=torch.int32)


def _attend(**options):
    caches = [x.clone() for x in _CACHE]
    return flash_attn.flash_attn_with_kvcache(
        _Q,
        *caches,
        *_NEW,
        rotary_cos=_ANGLES.cos().bfloat16(),
        rotary_sin=_ANGLES.sin().bfloat16(),
        cache_seqlens=_SIZES,
        block_table=_TABLE,
        softmax_scale=-0.1,
        causal=True,
        **options,
    )


CALLS = ({}, {"softcap": 2.0})
_EXPECTED = [_attend(**options) for options in CALLS]
# Entered for good: the tool sets the options that change.
flash_attn.emulator("sm_80", library=os.environ.get("GPU_EMULATOR_LIBRARY"), threads=1).__enter__()


def run() -> bool:
    results = [_attend(**options) for options in CALLS]
    return all((x - y).abs().max() < 0.04 for x, y in zip(results, _EXPECTED))
