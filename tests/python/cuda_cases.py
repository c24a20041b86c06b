"""What the CUDA kernels do, sampled, and how to compare it with the CPU backend."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from attention_cases import BF16, FP16
from reference import assert_attention_close, attention

import flash_attn
from flash_attn import _library, flash_attn_func

HAVE_KERNELS = "cuda sm80" in str(_library.lib.kernels())
HAVE_EMULATOR = (_library.library_path().parent / "libgpu_emulator.so").is_file()
needs_kernels = pytest.mark.skipif(not HAVE_KERNELS, reason="built without nvcc")
needs_emulator = pytest.mark.skipif(
    not (HAVE_KERNELS and HAVE_EMULATOR), reason="built without nvcc or the emulated GPU"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, and how the emulator runs it."""

    dtype: torch.dtype = BF16
    batch: int = 1
    seqlens: tuple[int, int] = (128, 192)
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (64, 64)
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    layout: str = "bshd"  # order in memory; "packed": q, k, v interleaved in one tensor
    mode: str = "eager"
    seed: int = 0

    def __str__(self):
        """The fields that are not the default's."""
        return ",".join(
            f"{f.name}={getattr(self, f.name)}".replace("torch.", "").replace(" ", "")
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        )


CHOICES = {
    "dtype": [FP16, BF16],
    "batch": [1, 1, 2],
    "seqlens": [
        (1, 1), (1, 70), (17, 64), (64, 17), (65, 129), (128, 128), (129, 257), (200, 30),
        (31, 200), (130, 0), (257, 190), (128, 65),
    ],
    "heads": [(1, 1), (2, 1), (4, 2), (3, 1)],
    "dims": [
        (64, 64), (128, 128), (64, 64), (128, 128), (96, 96), (32, 32), (40, 72), (128, 64),
        (8, 120), (33, 50), (1, 1),
    ],
    "causal": [False, True],
    "window_size": [(-1, -1), (-1, -1), (-1, -1), (0, 0), (16, 0), (-1, 7), (50, 30), (70, -1)],
    "softmax_scale": [None, None, None, 0.3, -0.4, 0.0],
    "layout": ["bshd", "bshd", "bhsd", "sbhd", "packed"],
    "mode": ["eager", "late", "random"],
}  # fmt: skip


def sampled_cases(count, seed):
    """``count`` random points of the product; every choice of a field comes up equally often."""
    rng = random.Random(seed)
    columns = {}
    for name, values in CHOICES.items():
        column = (values * (count // len(values) + 1))[:count]
        rng.shuffle(column)
        columns[name] = column
    return [Case(**{n: column[i] for n, column in columns.items()}, seed=i) for i in range(count)]


def make_tensors(case):
    """q, k, v of a case."""
    gen = torch.Generator().manual_seed(case.seed)
    (sq, sk), (h, hk), (d, dv) = case.seqlens, case.heads, case.dims

    def normal(rows, heads, dim):
        shape = {"b": case.batch, "s": rows, "h": heads, "d": dim}
        order = case.layout if case.layout != "packed" else "bshd"
        x = torch.randn([shape[c] for c in order], generator=gen).to(case.dtype)
        return x.permute([order.index(c) for c in "bshd"])

    if case.layout == "packed" and sq == sk and d == dv:
        packed = normal(sq, h + 2 * hk, d)
        return packed[:, :, :h], packed[:, :, h : h + hk], packed[:, :, h + hk :]
    return normal(sq, h, d), normal(sk, hk, d), normal(sk, hk, dv)


def on_emulator(case, q, k, v, **options):
    """(out, lse) of the emulated kernel."""
    with flash_attn.emulator(mode=case.mode, seed=case.seed):
        return flash_attn_func(q, k, v, **options, return_attn_probs=True)[:2]


def on_gpu(case, q, k, v, **options):
    """(out, lse) of the kernel on the machine's GPU."""
    q, k, v = (x.cuda() for x in (q, k, v))
    out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    return out.cpu(), lse.cpu()


def check(case, run=on_emulator):
    """The kernel's out and LSE are as good as plain PyTorch's in the case's dtype,
    measured against the CPU backend in fp32."""
    q, k, v = make_tensors(case)
    options = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window_size,
    }
    exact = flash_attn_func(q.float(), k.float(), v.float(), **options, return_attn_probs=True)
    plain = attention(q, k, v, **options)[0]
    out, lse = run(case, q, k, v, **options)
    assert out.dtype == case.dtype
    assert_attention_close(out, exact[0].double(), plain, "out")
    assert_attention_close(lse, exact[1].double(), exact[1], "lse", slack=2e-6 * lse_size(exact[1]))


def lse_size(lse):
    """The largest finite LSE, at least 1."""
    finite = lse[lse.isfinite()].abs()
    return max(1.0, finite.max().item() if finite.numel() else 0.0)
