"""A small model whose sequences two processes share, under DDP, FSDP2, checkpointing, autocast and
torch.compile, against one process."""

from __future__ import annotations

import pytest
import torch
from processes import on_processes
from shared_model_ranks import PROCESSES, run_rank

from flash_attn.distributed import ContextParallel, share_sequences
from flash_attn.modules.mha import MHA, HeadOptions


def test_processes_are_one():
    on_processes(PROCESSES, run_rank)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cross_attn": True}, "context_parallel must be None with cross_attn"),
        ({"dwconv": True}, "context_parallel must be None with dwconv"),
        ({"use_flash_attn": False}, "context_parallel needs use_flash_attn=True"),
    ],
)
def test_modules_that_cannot_share(options, sentence):
    heads = HeadOptions(context_parallel=ContextParallel())
    options = {"use_flash_attn": True, **options}
    with pytest.raises(ValueError, match=f"head_options.{sentence}"):
        MHA(32, 4, head_options=heads, **options)
    (name,) = set(options) - {"use_flash_attn"} or {"use_flash_attn"}
    model = torch.nn.Sequential(MHA(32, 4, use_flash_attn=True), MHA(32, 4, **options))
    with pytest.raises(ValueError, match=rf"1.{name} must be \w+ to share sequences, got \w+"):
        share_sequences(model, ContextParallel())
    assert model[0].context_parallel is None
    with pytest.raises(ValueError, match="model must have MHA or ParallelMHA modules"):
        share_sequences(torch.nn.Linear(2, 2), ContextParallel())
