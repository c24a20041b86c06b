"""Runs of several processes are those of one; a checkpoint goes from any to any number."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist
from processes import free_port
from torch.distributed.tensor import DTensor
from training_cases import COURSE, on_processes, overrides, rows, run_here, torchrun

STEPS = {
    "trainer__max_steps": 6,
    "trainer__global_batch": 8,
    "trainer__micro_batch": 2,
    "trainer__evaluate_every": 2,
    "trainer__ema_decay": 0.8,
    "scheduler__name": "constant",
}
# Sums over processes have another order than those of one: 2e-7 was measured.
LOSS = {"rel": 3e-6}


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share; run_here takes one."""


def train_ranks(arguments, expected_type):
    """In each process: a run, whose parameters are of a type."""
    from training.run import compose_settings, train

    trainer = train(compose_settings(arguments))
    parameters = list(trainer.model.parameters())
    assert all(type(parameter.data) is expected_type for parameter in parameters)
    if expected_type is DTensor:  # each process has its part alone
        local = sum(parameter.to_local().numel() for parameter in parameters)
        assert local <= 1.1 * trainer.num_parameters / dist.get_world_size()


def course(folder):
    """Step, loss, gradient norm and validation loss of a run, as numbers."""
    read = rows(folder, "step", "loss", "grad_norm", "validation_loss")
    return [[float(value or 0) for value in row] for row in read]


def assert_same_course(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert one == pytest.approx(other, **LOSS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_here(folder, **STEPS)
    return folder


def test_fsdp_on_two_is_one_and_its_checkpoint_goes_to_one_and_to_four(alone, tmp_path):
    common = {**STEPS, "trainer__checkpoint_every": 2, "trainer__keep_checkpoints": 3}
    fsdp = {**common, "trainer__strategy": "fsdp"}
    on_processes(2, train_ranks, overrides(tmp_path, **fsdp), DTensor)
    run = tmp_path / "run"
    assert_same_course(course(run), course(alone / "run"))

    # 2 -> 1: from the second step to the fourth on one process; 1 -> 4: to the end on four.
    second = str(run / "checkpoints" / "step-00000002")
    one = run_here(tmp_path, trainer__resume=second, **{**common, "trainer__max_steps": 4})
    assert (one.step, one.world_size) == (4, 1)
    assert len(rows(run, "step")) == 4 + 2
    on_processes(4, train_ranks, overrides(tmp_path, **fsdp), DTensor)
    assert_same_course(course(run), course(alone / "run"))


def runs(all_arguments):
    """In each process: one run after the other."""
    from training.run import compose_settings, train

    for arguments, port in all_arguments:
        # Its own: a process must not find the store of the run before.
        os.environ["MASTER_PORT"] = str(port)
        trainer = train(compose_settings(arguments))
        assert trainer.step == trainer.settings.trainer.max_steps
        dist.destroy_process_group()


SAMPLES = "{_target_: training.callbacks.Samples, prompt: 'one two ', tokens: 6, top_k: 1}"
DROPOUT = {
    **STEPS,
    "+callbacks__samples": SAMPLES,  # which must not change what follows
    "model__resid_pdrop": 0.1,
    "model__attn_pdrop": 0.1,
    "trainer__checkpoint_every": 4,
}


def test_two_processes_with_dropout_go_on_to_the_last_bit_and_ddp_is_one_too(alone, tmp_path):
    """A whole run, one that ends at its fourth step and goes on, and one without dropout."""
    dropout = {**DROPOUT, "trainer__strategy": "fsdp"}
    cases = {"whole": dropout, "part": {**dropout, "trainer__max_steps": 4}, "parts": dropout,
             "ddp": {**STEPS, "trainer__strategy": "ddp"}}  # fmt: skip
    lines = [
        overrides(tmp_path, **{**options, "out": str(tmp_path / name.replace("parts", "part"))})
        for name, options in cases.items()
    ]
    on_processes(2, runs, [(line, free_port()) for line in lines])
    whole = rows(tmp_path / "whole", *COURSE)
    assert len(whole) == 6 + 3
    assert rows(tmp_path / "part", *COURSE) == whole
    samples = (tmp_path / "whole" / "samples.txt").read_text()
    assert samples.count("one two ") == 3
    assert (tmp_path / "part" / "samples.txt").read_text() == samples
    assert_same_course(course(tmp_path / "ddp"), course(alone / "run"))


@pytest.mark.slow
def test_torchrun_killed_on_one_process_goes_on_to_the_last_bit(tmp_path):
    """Three processes: sums of three have an order, which DDP's buckets must not change."""
    options = {**DROPOUT, "trainer__global_batch": 6, "trainer__strategy": "ddp"}
    assert torchrun(3, overrides(tmp_path / "whole", **options)) == 0
    fault = "+callbacks.kill={_target_: training_faults.KillAfter, step: 5, stored: 4, rank: 1}"
    assert torchrun(3, [*overrides(tmp_path, **options), fault]) != 0
    assert torchrun(3, overrides(tmp_path, **options)) == 0
    assert rows(tmp_path / "run", *COURSE) == rows(tmp_path / "whole" / "run", *COURSE)
