"""What short accumulators make of attention in fp8: the table of docs/hopper.md, "FP8".

    python tools/fp8_accumulators.py

A model of what is published of Hopper's tensor cores (DeepSeek-V3, arXiv:2412.19437, section
3.3.2): 32 products at a time and the sum before them are cut, towards 0, to 14 bits below the
largest of them. The accumulators of P V go into fp32 sums every so many keys.
"""

from __future__ import annotations

import torch
from markdown_table import markdown

BITS, DEPTH = 14, 32  # of a sum; products that are summed at a time
LARGEST = 448.0  # of e4m3
OFFSET = 16.0  # exponentials are so many times what they are called
HEAD_DIM, QUERIES = 64, 16
EVERY = (128, 256, 512)  # keys after which accumulators are new
CASES = ((8192, 0.0), (8192, 1.0), (32768, 1.0))  # keys, mean of V


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.float().to(torch.float8_e4m3fn).double()


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Return what x becomes in e4m3 with one factor."""
    factor = x.abs().max() / LARGEST
    return e4m3(x / factor) * factor


def cut_sum(total: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Return ``total`` and ``products``, (depth, ...), summed as the tensor core does."""
    largest = torch.maximum(products.abs().amax(0), total.abs()).clamp_min(1e-300)
    unit = torch.exp2(torch.floor(torch.log2(largest)) - (BITS - 1))
    return (torch.trunc(total / unit) + torch.trunc(products / unit).sum(0)) * unit


def product(p: torch.Tensor, v: torch.Tensor, every: int) -> torch.Tensor:
    """Return p v, with new accumulators after ``every`` keys."""
    out = torch.zeros(p.shape[0], v.shape[1], dtype=p.dtype)
    for begin in range(0, p.shape[1], every):
        total = torch.zeros_like(out)
        for k in range(begin, min(begin + every, p.shape[1]), DEPTH):
            total = cut_sum(total, p[:, k : k + DEPTH].T[:, :, None] * v[k : k + DEPTH, None])
        out += total
    return out


def rms(x: torch.Tensor) -> float:
    return x.pow(2).mean().sqrt().item()


def row(keys: int, mean: float) -> list[str]:
    """Return errors as multiples of that of quantising q, k and v."""
    q = torch.randn(QUERIES, HEAD_DIM, dtype=torch.float64)
    k, v = torch.randn(2, keys, HEAD_DIM, dtype=torch.float64)
    v = v + mean
    scale = HEAD_DIM**-0.5
    exact = torch.softmax(q @ k.T * scale, -1) @ v
    q8, k8, v8 = (quantised(x) for x in (q, k, v))
    scores = q8 @ k8.T * scale
    quantising = rms(torch.softmax(scores, -1) @ v8 - exact)
    p = torch.exp(scores - scores.amax(-1, keepdim=True)) * OFFSET
    rounded, sums = e4m3(p), p.sum(-1, keepdim=True)
    outs = [rounded @ v8, *(product(rounded, v8, every) for every in (*EVERY, keys))]
    errors = [rms(out / sums - exact) / quantising for out in outs]
    return [f"{keys}, {mean:g}", *(f"{error:.3g}" for error in errors)]


if __name__ == "__main__":
    torch.manual_seed(0)
    header = ["keys, mean of V", "fp32", f"new for each {EVERY[0]} keys", *map(str, EVERY[1:])]
    print(markdown([*header, "never"], [row(*case) for case in CASES]))
