"""What each process of test_dtensor.py does: calls on its shards against the call on the whole."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

RANKS = 2


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_inputs():
    """q, k, v, s_aux, attn_bias, alibi_slopes; three sequences, so that shards differ in size."""
    shapes = (3, 9, 4, 8), (3, 11, 2, 8), (3, 11, 2, 8), (4,), (1, 4, 9, 11), (3, 4)
    return [randn(*s, seed=i) for i, s in enumerate(shapes)]


def dense(q, k, v, s_aux, attn_bias, slopes):
    return flash_attn_func(
        q, k, v, causal=True, s_aux=s_aux, attn_bias=attn_bias, alibi_slopes=slopes,
        return_attn_probs=True,
    )[:2]  # fmt: skip


def packed_inputs():
    shapes = (10, 4, 8), (14, 2, 8), (14, 2, 8), (4,), (2, 1, 6, 8), (4,)
    return [randn(*s, seed=i) for i, s in enumerate(shapes)]


def packed(q, k, v, s_aux, attn_bias, slopes):
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ((0, 4, 10), (0, 6, 14)))
    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 6, 8, s_aux=s_aux, attn_bias=attn_bias, alibi_slopes=slopes,
        return_attn_probs=True,
    )[:2]  # fmt: skip


def qkvpacked_inputs():
    return [randn(3, 9, 3, 4, 8, seed=0)]


def qkvpacked(qkv):
    return flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)[:2]


# name: the function, its inputs, and how each of them is sharded.
R = Replicate()
BATCH = [Shard(0), Shard(0), Shard(0), R, R, Shard(0)]
HEADS = [Shard(2), Shard(2), Shard(2), Shard(0), Shard(1), Shard(1)]
PACKED_HEADS = [Shard(1), Shard(1), Shard(1), Shard(0), R, Shard(0)]
CASES = {
    "dense over the batch": (dense, dense_inputs, BATCH, Shard(0)),
    "dense over heads": (dense, dense_inputs, HEADS, Shard(2)),
    "dense replicated": (dense, dense_inputs, [R] * 6, R),
    "queries alone sharded": (dense, dense_inputs, [Shard(2), *[R] * 5], Shard(2)),
    "over queries, which are gathered": (dense, dense_inputs, [Shard(1), *[R] * 5], R),
    "packed over heads": (packed, packed_inputs, PACKED_HEADS, Shard(1)),
    "packed over tokens, which are gathered": (packed, packed_inputs, [Shard(0), *[R] * 5], R),
    "qkvpacked over heads": (qkvpacked, qkvpacked_inputs, [Shard(3)], Shard(2)),
}  # fmt: skip


def weighted_sum(outputs):
    return sum((y.sin() if i else y.square()).sum() for i, y in enumerate(outputs))


def check(mesh, f, make_inputs, placements, out_placement):
    alone = [x.requires_grad_() for x in make_inputs()]
    expected = f(*alone)
    weighted_sum(expected).backward()
    shards = [
        distribute_tensor(x.detach(), mesh, [p]).requires_grad_() for x, p in zip(alone, placements)
    ]
    outputs = f(*shards)
    assert outputs[0].placements == (out_placement,)
    for actual, wanted in zip(outputs, expected):
        assert torch.equal(actual.full_tensor(), wanted)
    weighted_sum(outputs).backward()
    for x, shard in zip(alone, shards):
        torch.testing.assert_close(shard.grad.full_tensor(), x.grad, rtol=1e-5, atol=1e-5)
    detached = [x.detach() for x in shards]
    with torch.no_grad():
        assert torch.equal(f(*detached)[0].full_tensor(), expected[0])


def check_refusals(mesh):
    q, k, v = (distribute_tensor(x, mesh, [Shard(2)]) for x in dense_inputs()[:3])
    with pytest.raises(RuntimeError, match="dropout_p"):
        flash_attn_func(q, k, v, dropout_p=0.1)
    with pytest.raises(TypeError, match="k must be a DTensor"):
        flash_attn_func(q, k.full_tensor(), v)
    plain = [x.full_tensor() for x in (q, k, v)]
    with pytest.raises(TypeError, match="k must not be a DTensor where q is a plain tensor"):
        flash_attn_func(plain[0], k, plain[2])


def run_rank(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        for name, case in CASES.items():
            try:
                check(mesh, *case)
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error
        check_refusals(mesh)
    finally:
        dist.destroy_process_group()
