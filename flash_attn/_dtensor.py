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


def refuse(tensors: dict) -> None:
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


def on_shards(run, operator, args):
    """Call ``run``, which runs a forward operator, on this rank's shards of its arguments."""
    given = dict(zip(operator.names, args))
    _refuse_dropout(given["dropout_p"])
    is_packed = "cu_seqlens_q" in given
    q, k, v = args[:3]
    sharding = _Sharding(q, k, None if is_packed else 0, q.dim() - 2)
    dims = {
        **{name: (0, given[name].dim() - 2) for name in "qkv"},
        "alibi_slopes": _of_slopes(given["alibi_slopes"]),
        "s_aux": (None, 0),
        "attn_bias": _of_bias(given["attn_bias"]),
    }
    for name, x in given.items():
        if name not in dims:
            given[name] = sharding.whole(x)
            continue
        batch, heads = dims[name]
        given[name] = sharding.local(name, x, None if is_packed else batch, heads)
    out, lse, s_dmask, rng_state = run(operator, tuple(given.values()))
    batch = None if is_packed else 0
    out_shape, nheads = (*q.shape[:-1], v.shape[-1]), q.shape[-2]
    lse_shape = (nheads, q.shape[0]) if is_packed else (q.shape[0], nheads, q.shape[1])
    return (
        sharding.result(out, out_shape, batch, q.dim() - 2),
        sharding.result(lse, lse_shape, batch, 0 if is_packed else 1),
        s_dmask,
        rng_state,
    )


def _refuse_dropout(dropout_p):
    if dropout_p > 0.0:
        raise RuntimeError(
            "dropout_p must be 0 with DTensors: every rank would drop the same of its shard"
        )
