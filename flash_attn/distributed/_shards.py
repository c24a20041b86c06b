"""DTensors whose tokens are shared: each process calls on its own part."""

from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor

from flash_attn import _dtensor
from flash_attn._arguments import wrong_kind

_BATCH, _TOKENS, _HEADS = 0, 1, 2  # dimensions of q, k and v


def on_local_tokens(function: Callable, q, k, v, group, options: dict):
    """Call ``function`` on this process' parts of q, k and v; return DTensors placed as q.

    Raises:
        ValueError, TypeError: they are not all sharded over tokens by one dimension of a mesh.
    """
    mesh, placements = q.device_mesh, q.placements
    dims = [i for i, p in enumerate(placements) if p.is_shard(_TOKENS)]
    allowed = all(p.is_replicate() or any(map(p.is_shard, range(3))) for p in placements)
    if len(dims) != 1 or not allowed:
        raise ValueError(
            "q must be sharded over its tokens, Shard(1), by one dimension of its mesh, and by the "
            f"others over batch or heads or not at all; got {tuple(placements)}"
        )
    for name, x in (("k", k), ("v", v)):
        if not _dtensor.is_dtensor(x):
            raise wrong_kind(name, x, "a DTensor, as q is")
        if x.device_mesh != mesh or tuple(x.placements) != tuple(placements):
            raise ValueError(
                f"{name} must be placed as q, {tuple(placements)}, got {tuple(x.placements)}"
            )
    if group is not None:
        raise ValueError("group must be None where q is a DTensor, which says its processes")
    if options["layout"] != "contiguous":
        raise ValueError(
            f"layout must be 'contiguous' where q is a DTensor, got {options['layout']!r:.80}"
        )
    for name in ("alibi_slopes", "s_aux"):
        options[name] = _local_heads(name, options[name], placements)
    local = (x.to_local() for x in (q, k, v))
    results = function(*local, group=mesh.get_group(dims[0]), **options)
    if not options["return_softmax_lse"]:
        return _as_dtensor(results, q, (*q.shape[:-1], v.shape[-1]), placements)
    out, softmax_lse = results
    shape = (q.shape[_BATCH], q.shape[_HEADS], q.shape[_TOKENS])
    transposed = [_transposed(p) for p in placements]
    return (
        _as_dtensor(out, q, (*q.shape[:-1], v.shape[-1]), placements),
        _as_dtensor(softmax_lse, q, shape, transposed),
    )


def _local_heads(name: str, x: Optional[Tensor], placements) -> Optional[Tensor]:
    if x is None or not _dtensor.is_dtensor(x):
        if x is not None and any(p.is_shard(_BATCH) or p.is_shard(_HEADS) for p in placements):
            raise wrong_kind(name, x, "a DTensor where q's batch or heads are sharded")
        return x
    return x.to_local()


def _transposed(placement):
    """The placement of softmax_lse, (batch, nheads, seqlen_q), for one of q."""
    from torch.distributed.tensor import Shard

    swapped = {_TOKENS: _HEADS, _HEADS: _TOKENS}
    return Shard(swapped.get(placement.dim, placement.dim)) if placement.is_shard() else placement


def _as_dtensor(x: Tensor, q, shape: tuple, placements):
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        x, q.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
