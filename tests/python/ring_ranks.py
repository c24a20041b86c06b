"""What each process of test_distributed.py does: its part of a sequence against the whole."""

from __future__ import annotations

import os
from functools import partial

import torch
import torch.distributed as dist
from shared_edges import CHECKS
from shared_sequences import DENSE, PACKED, Case, check
from torch.distributed.device_mesh import init_device_mesh

from flash_attn.distributed import (
    hybrid_attention,
    ring_attention,
    ring_attention_varlen,
    ulysses_attention,
    ulysses_attention_varlen,
)
from flash_attn.distributed import layout as layouts

PROCESSES = 4
LAYOUTS = ("contiguous", "zigzag")


def check_bitwise_again(function, case, group, layout):
    first, second = (check(function, case, group, layout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def all_checks(group, mesh):
    """Name and check; every process of the group has them in the same order."""
    for layout in LAYOUTS:
        for function, cases in (
            (ring_attention, DENSE),
            (ring_attention_varlen, PACKED),
            (ulysses_attention, DENSE),
            (ulysses_attention_varlen, PACKED),
        ):
            for name, case in cases.items():
                yield f"{name}, {layout}", partial(check, function, case, group, layout)
        if mesh is not None:
            for name, case in DENSE.items():
                yield f"{name}, {layout}", partial(check, hybrid_attention, case, mesh, layout)
        big = Case((192,), heads_k=1, dim=32, dim_v=32, options={"causal": True})
        for function in (ring_attention, ulysses_attention):
            for dtype in (torch.bfloat16, torch.float16):
                yield f"{dtype}", partial(check, function, big, group, layout, dtype)
        again = partial(check_bitwise_again, ring_attention, DENSE["alibi, window"], group, layout)
        yield f"again, {layout}", again


def named_checks(group, mesh, only):
    if only != "edges":
        for some in (group, mesh["ring"]):
            for name, run in all_checks(some, mesh if some is group else None):
                function = getattr(run.args[0], "__name__", run)
                yield f"{function}, {name}, {layouts.owners(some).size} processes", run
    if only != "attention":
        for name, run in CHECKS.items():
            yield name, partial(run, group, mesh)


def run_rank(rank, port, only=None):
    """All checks, or those of "attention" or "edges" alone."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        for name, run in named_checks(dist.group.WORLD, mesh, only):
            try:
                run()
            except BaseException as error:  # pytest.raises fails with no Exception
                raise AssertionError(f"{name}: {error}") from error
    finally:
        dist.destroy_process_group()
