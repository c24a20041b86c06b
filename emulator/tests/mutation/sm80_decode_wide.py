"""The decode kernel of csrc/flash_attn/src/sm80 for head dims above 256, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/sm80_decode_wide.py

Values within the keys, in units that several CTAs share and the last one merges; values of their
own, in one CTA that fills its ring again and again; a scale that negates Q, and a NaN in V that
some queries do not see. And Q rotated after it is negated, with the last keys appended by the CTA
that reads them, which is not the first: of this call the CPU backend has the expected result.
"""

import os

import torch

import flash_attn

QUERIES, KEYS, HEADS, HEAD_DIM, HEAD_DIM_V = 3, 300, 2, 576, 512
SCALE = -0.03


def _inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, QUERIES, HEADS, HEAD_DIM), (1, KEYS, 1, HEAD_DIM)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def _reference(q, k):
    q, k = (x.double().transpose(1, 2) for x in (q, k))
    scores = q @ k.transpose(-1, -2) * SCALE
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ k[..., :HEAD_DIM_V]).transpose(1, 2)


def _rotated(q, k):
    """Of 64 keys, the last QUERIES of which are appended."""
    cache = k[:, :64].clone()
    angles = torch.arange(64.0)[:, None] * torch.linspace(1.0, 0.01, 32)
    return flash_attn.flash_attn_with_kvcache(
        q,
        cache,
        cache[..., :HEAD_DIM_V].clone(),
        k[:, -QUERIES:],
        k[:, -QUERIES:, :, :HEAD_DIM_V],
        rotary_cos=angles.cos().bfloat16(),
        rotary_sin=angles.sin().bfloat16(),
        cache_seqlens=64 - QUERIES,
        num_splits=4,
        softmax_scale=SCALE,
        causal=True,
    )


_Q, _K = _inputs()
_EXPECTED = _reference(_Q, _K)[:, :-1]
_K_OF_CACHE = _K.clone()
_EXPECTED_ROTATED = _rotated(_Q, _K_OF_CACHE).double()
# Entered for good: the tool sets the options that change.
flash_attn.emulator("sm_80", library=os.environ.get("GPU_EMULATOR_LIBRARY"), threads=1).__enter__()
_K[0, -1, :, :HEAD_DIM_V] = float("nan")
_V = _K[..., :HEAD_DIM_V]


def run() -> bool:
    options = {"softmax_scale": SCALE, "causal": True}
    shared = flash_attn.flash_attn_func(_Q, _K, _V, **options)
    alone = flash_attn.flash_attn_with_kvcache(_Q, _K, _V.clone(), num_splits=1, **options)
    errors = [(out[:, :-1].double() - _EXPECTED).abs().max() for out in (shared, alone)]
    errors.append((_rotated(_Q, _K_OF_CACHE).double() - _EXPECTED_ROTATED).abs().max())
    return all(error < 0.03 for error in errors)
