"""Shares of features, and collectives of a process alone; test_dense_groups.py has the groups."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from flash_attn.utils.distributed import (
    all_gather,
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    allreduce_sequence_parallel_grad,
    get_dim_for_local_rank,
    reduce_scatter,
    reduce_scatter_raw,
    sync_shared_params,
)


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 7))
def test_shares(multiples, world_size, multiple_of):
    """They are those of torch.tensor_split of the multiples."""
    dim = multiples * multiple_of
    shares = [get_dim_for_local_rank(dim, world_size, r, multiple_of) for r in range(world_size)]
    expected = torch.empty(multiples).tensor_split(world_size)
    assert shares == [len(part) * multiple_of for part in expected]


def test_shares_by_hand():
    assert [get_dim_for_local_rank(8, 4, r) for r in range(4)] == [2, 2, 2, 2]
    assert [get_dim_for_local_rank(10, 4, r) for r in range(4)] == [3, 3, 2, 2]
    assert [get_dim_for_local_rank(384, 2, r, 128) for r in range(2)] == [256, 128]


BAD_SHARES = {
    r"dim \(10\) must be a multiple of multiple_of \(4\)": (10, 2, 0, 4),
    "local_rank 2 is not below world_size 2": (10, 2, 2),
    "local_rank must be at least 0, got -1": (10, 2, -1),
    "world_size must be at least 1, got 0": (10, 0, 0),
    "multiple_of must be at least 1, got 0": (10, 2, 0, 0),
    "dim must be at least 0, got -4": (-4, 2, 0),
    "dim must be an int": (2.5, 2, 0),
}


@pytest.mark.parametrize("message", BAD_SHARES)
def test_bad_shares(message):
    with pytest.raises((TypeError, ValueError), match=message):
        get_dim_for_local_rank(*BAD_SHARES[message])


@pytest.fixture(params=[False, True], ids=["no torch.distributed", "a group of one"])
def group(request, tmp_path):
    if not request.param:
        yield None
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_alone_nothing_is_exchanged(group):
    x = torch.randn(3, 2)
    for function in (all_gather_raw, reduce_scatter_raw, all_reduce_raw):
        assert function(x, group) == (x, None)
        out, handle = function(x, group, async_op=True)
        assert out is x and handle.is_completed() and handle.wait()
        assert function(x, None)[0] is x
    y = x.clone().requires_grad_()
    for function in (all_gather, reduce_scatter, all_reduce):
        out = function(y, group)
        assert out.data_ptr() == y.data_ptr()
        assert torch.equal(torch.autograd.grad(out, y, x)[0], x)
    model = torch.nn.Linear(2, 3)
    for p in model.parameters():
        p._shared_params = p._sequence_parallel = True
    model.weight.grad = torch.ones_like(model.weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sync_shared_params(model, group)
    allreduce_sequence_parallel_grad(model, group)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))
    assert model.bias.grad is None


def test_collectives_of_what_is_no_tensor():
    for function in (all_gather_raw, reduce_scatter_raw, all_reduce_raw):
        with pytest.raises(TypeError, match=r"input_ must be a torch.Tensor, got list"):
            function([1.0], None)
