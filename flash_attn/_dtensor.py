"""Calls with DTensors (``torch.distributed.tensor``): each rank attends over its shard.

q's placements decide. Sharded over the batch (dense calls) or over heads, k, v and all else that
has these dimensions are sharded alike, and no rank needs another's data; any other placement is
made Replicate first. Results are sharded as q, gradients as what they belong to.
"""

from __future__ import annotations

import sys

import torch


def is_dtensor(x) -> bool:
    """Whether ``x`` is a DTensor; does not import torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def refuse(**tensors) -> None:
    """Raise TypeError for a DTensor in a call whose q is none."""
    for name, x in tensors.items():
        if is_dtensor(x):
            raise TypeError(f"{name} must not be a DTensor where q is a plain tensor")


class _Sharding:
    """How a call is sharded over the dimensions of its mesh: "batch", "heads" or None for each."""

    def __init__(self, q, k, batch_dim, head_dim):
        self.mesh = q.device_mesh
        shards = 1  # of the heads
        self.dims = []
        for placement, size in zip(q.placements, self.mesh.shape):
            dim = None
            if batch_dim is not None and placement.is_shard(batch_dim):
                dim = "batch"
            elif placement.is_shard(head_dim) and k.shape[-2] % (shards * size) == 0:
                dim = "heads"
                shards *= size
            self.dims.append(dim)

    def placements(self, batch, heads):
        """Return the placements of a tensor with these two dimensions, None where it lacks one."""
        from torch.distributed.tensor import Replicate, Shard

        own = {"batch": batch, "heads": heads, None: None}
        return [Replicate() if own[d] is None else Shard(own[d]) for d in self.dims]

    def local(self, name, x, batch, heads):
        """Return this rank's part of ``x``; its gradient is summed over dims that x lacks."""
        from torch.distributed.tensor import Partial

        if x is None:
            return None
        if not is_dtensor(x):
            raise TypeError(f"{name} must be a DTensor, as q is, got {type(x).__name__}")
        placements = self.placements(batch, heads)
        own = {"batch": batch, "heads": heads}
        gradient = [
            Partial() if d is not None and own[d] is None else p
            for d, p in zip(self.dims, placements)
        ]
        return x.redistribute(self.mesh, placements).to_local(grad_placements=gradient)

    def whole(self, x):
        """Return a tensor that every rank has whole."""
        return x.full_tensor() if is_dtensor(x) else x

    def result(self, x, shape, batch, heads):
        """Return the DTensor of ``shape`` whose parts the ranks have computed."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            x,
            self.mesh,
            self.placements(batch, heads),
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )


def _of_bias(bias):
    """Return bias' dimensions of batch and heads; None where it is broadcast."""
    sizes = bias.shape if bias is not None else (1, 1)
    return 0 if sizes[0] > 1 else None, 1 if sizes[1] > 1 else None


def _of_slopes(slopes):
    return (0, 1) if slopes is not None and slopes.dim() == 2 else (None, 0)


def dense(f, q, k, v, args, s_aux, attn_bias):
    """Call f, the forward of a dense batch, on this rank's shards."""
    *numbers, alibi_slopes, return_softmax = args
    _refuse_dropout(numbers[0])
    sharding = _Sharding(q, k, 0, 2)
    local = (sharding.local(n, x, 0, 2) for n, x in zip("qkv", (q, k, v)))
    slopes = sharding.local("alibi_slopes", alibi_slopes, *_of_slopes(alibi_slopes))
    out, lse, s_dmask, rng_state = f(
        *local,
        *numbers,
        slopes,
        return_softmax,
        s_aux=sharding.local("s_aux", s_aux, None, 0),
        attn_bias=sharding.local("attn_bias", attn_bias, *_of_bias(attn_bias)),
    )
    batch, seqlen_q, nheads, _ = q.shape
    return (
        sharding.result(out, (batch, seqlen_q, nheads, v.shape[-1]), 0, 2),
        sharding.result(lse, (batch, nheads, seqlen_q), 0, 1),
        s_dmask,
        rng_state,
    )


def packed(f, q, k, v, args, s_aux, attn_bias):
    """Call f, the forward of a packed batch, on this rank's heads."""
    _refuse_dropout(args[4])
    sharding = _Sharding(q, k, None, 1)
    local = (sharding.local(n, x, None, x.dim() - 2) for n, x in zip("qkv", (q, k, v)))
    args = list(args)
    slopes = args[10]
    args = [sharding.whole(x) for x in args]
    args[10] = sharding.local("alibi_slopes", slopes, None, _of_slopes(slopes)[1])
    out, lse, s_dmask, rng_state = f(
        *local,
        *args,
        s_aux=sharding.local("s_aux", s_aux, None, 0),
        attn_bias=sharding.local("attn_bias", attn_bias, None, _of_bias(attn_bias)[1]),
    )
    total_q, nheads, _ = q.shape
    return (
        sharding.result(out, (total_q, nheads, v.shape[-1]), None, 1),
        sharding.result(lse, (nheads, total_q), None, 0),
        s_dmask,
        rng_state,
    )


def _refuse_dropout(dropout_p):
    if dropout_p > 0.0:
        raise RuntimeError(
            "dropout_p must be 0 with DTensors: every rank would drop the same of its shard"
        )
