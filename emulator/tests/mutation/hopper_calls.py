"""Cases of tools/mutate.py on the emulated H100, made as few multiprocessors as a case wants."""

from __future__ import annotations

import ctypes
import os
from typing import Callable

import torch

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, v3

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


def _fp8(seqlens, heads, head_dim, bad=(), **options):
    """As ``_dense``, of numbers in e4m3 with a factor for each 128 rows."""
    q = _normal(1, seqlens[0], heads, head_dim)
    k, v = _normal(2, 1, seqlens[1], 1, head_dim).unbind(0)
    v = v / 4  # whose rounded weights err by less than TOLERANCE
    for key in bad:
        v[0, key, 0, 3] = float("nan")
    numbers = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    blocks = [-(-rows // 128) for rows in (*seqlens, seqlens[1])]
    factors = [0.5 + _normal(1, 1, count).abs() / 4 for count in blocks]

    def call(dtype):
        if dtype is torch.bfloat16:
            return v3.flash_attn_func(
                *numbers,
                **dict(zip(("q_descale", "k_descale", "v_descale"), factors)),
                **options,
                return_attn_probs=True,
            )
        each = (f[0, 0].repeat_interleave(128)[: x.shape[1]] for f, x in zip(factors, numbers))
        exact = (x.float() * f[:, None, None] for x, f in zip(numbers, each))
        return flash_attn_func(*exact, **options, return_attn_probs=True)[:2]

    return call


def _cache(lengths, heads, dims, capacity, page_size=0, bad=(), rotary=False, **options):
    """Two queries for each length; ``bad``: keys of the first sequence whose V is NaN in one
    column. Behind the last keys all is NaN; of dims (576, 512) V is the first columns of K.
    ``rotary``: Q and one new key are rotated."""
    q = _normal(len(lengths), 2, heads, dims[0])
    k, v = (_normal(len(lengths), capacity, 1, d) for d in dims)
    for i, length in enumerate(lengths):
        k[i, length:] = v[i, length:] = float("nan")
    for key in bad:
        v[0, key, 0, 3] = float("nan")
    options["cache_seqlens"] = torch.tensor(lengths).int()
    if page_size:
        k, v = (x.reshape(-1, page_size, 1, x.shape[-1]) for x in (k, v))
        options["block_table"] = torch.arange(k.shape[0]).view(len(lengths), -1).int()
    new = {}
    if rotary:
        new = {name: _normal(len(lengths), 1, 1, d) for name, d in zip("kv", dims)}
        new |= {f"rotary_{name}": _normal(capacity, 16) for name in ("cos", "sin")}

    def call(dtype):
        query, keys, values = (x.bfloat16().to(dtype) for x in (q, k, v))
        if dims[1] == 512:
            values = keys[..., :512]
        more = {name: x.bfloat16().to(dtype) for name, x in new.items()}
        return flash_attn_with_kvcache(
            query, keys, values, **more, **options, return_softmax_lse=True
        )

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
    "fp8": lambda: _fp8((130, 400), 2, 128, (390,), causal=True),
    "packed": lambda: _packed([70, 0, 200], [150, 20, 190], 128, causal=True),
    # Several tiles for each CTA that runs at a time: it merges its own units. Then one whose units
    # several share.
    "caches": lambda: _cache((600, 70, 0), 20, (64, 64), 640, 0, (298, 599), window_size=(300, 0)),
    "shared cache": lambda: _cache((700,), 20, (64, 64), 704, bad=(699,), causal=True),
    "row by row": lambda: _cache((600,), 20, (64, 64), 640, 4, rotary=True, softmax_scale=-0.05),
    "latent caches": lambda: _cache((1200, 70, 0), 20, (576, 512), 1280, causal=True),
    "shared latent cache": lambda: _cache((1100,), 20, (576, 512), 1152, causal=True),
    "latent row by row": lambda: _cache((200,), 20, (576, 512), 256, page_size=4),
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
