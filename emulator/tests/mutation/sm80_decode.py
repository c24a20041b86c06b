"""The decode kernel of csrc/flash_attn/src/sm80, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/sm80_decode.py

Units that several CTAs share and the last one merges, and one CTA that fills its ring again and
again; a scale that negates Q, and a NaN in V that some queries do not see; and the last keys
appended by the CTA that reads them.
"""

import os

import torch

import flash_attn

QUERIES, KEYS, HEADS, HEAD_DIM = 3, 700, 2, 64
SCALE = -0.1


def _inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, n, heads, HEAD_DIM) for n, heads in ((QUERIES, HEADS), (KEYS, 1), (KEYS, 1))]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def _reference(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * SCALE
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


# Entered for good: the tool sets the options that change.
flash_attn.emulator("sm_80", library=os.environ.get("GPU_EMULATOR_LIBRARY"), threads=1).__enter__()
_Q, _K, _V = _inputs()
_EXPECTED = _reference(_Q, _K, _V)[:, :-1]
_V[0, -1] = float("nan")


def _append(**options):
    """The last keys go where zeros are."""
    old, new = zip(*((x[:, :-QUERIES], x[:, -QUERIES:]) for x in (_K, _V)))
    caches = [torch.cat([x, torch.zeros_like(y)], 1) for x, y in zip(old, new)]
    sizes = torch.tensor([KEYS - QUERIES], dtype=torch.int32)
    return flash_attn.flash_attn_with_kvcache(_Q, *caches, *new, cache_seqlens=sizes, **options)


def run() -> bool:
    options = {"softmax_scale": SCALE, "causal": True}
    shared = flash_attn.flash_attn_func(_Q, _K, _V, **options)
    alone = flash_attn.flash_attn_with_kvcache(_Q, _K, _V, num_splits=1, **options)
    outs = (shared, alone, _append(**options))
    errors = [(out[:, :-1].double() - _EXPECTED).abs().max() for out in outs]
    return all(error < 0.02 for error in errors)
