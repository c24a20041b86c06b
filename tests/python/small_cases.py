"""Small inputs and helpers of the tests of the Python face."""

from __future__ import annotations

import torch

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_K, DIM, DIM_V = 2, 5, 7, 4, 2, 8, 6
CU_SEQLENS_Q, CU_SEQLENS_K = [0, 4, 4, 10], [0, 5, 8, 14]  # of a packed batch of three
TOTAL_Q, TOTAL_K, MAX_Q, MAX_K = 10, 14, 6, 6


def randn(*shape, grad=False, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape) + 31 * seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


def dense(grad=False, dtype=torch.float32):
    return (
        randn(BATCH, SEQLEN_Q, HEADS, DIM, grad=grad, dtype=dtype, seed=1),
        randn(BATCH, SEQLEN_K, HEADS_K, DIM, grad=grad, dtype=dtype, seed=2),
        randn(BATCH, SEQLEN_K, HEADS_K, DIM_V, grad=grad, dtype=dtype, seed=3),
    )


def packed(grad=False, dtype=torch.float32):
    return (
        randn(TOTAL_Q, HEADS, DIM, grad=grad, dtype=dtype, seed=1),
        randn(TOTAL_K, HEADS_K, DIM, grad=grad, dtype=dtype, seed=2),
        randn(TOTAL_K, HEADS_K, DIM_V, grad=grad, dtype=dtype, seed=3),
    )


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def sequences():
    return int32(CU_SEQLENS_Q), int32(CU_SEQLENS_K), MAX_Q, MAX_K


def caches(rows=8, dtype=torch.float32):
    return tuple(
        randn(BATCH, rows, HEADS_K, d, seed=seed, dtype=dtype) for d, seed in ((DIM, 4), (DIM_V, 5))
    )


def grads_of(outputs, inputs):
    """Gradients of a sum of the outputs with fixed random weights."""
    total = sum((x * randn(*x.shape, seed=9)).sum() for x in outputs)
    return torch.autograd.grad(total, inputs)


def assert_all_close(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, atol=2e-5, rtol=1e-4)
