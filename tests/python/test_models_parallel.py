"""GPTs spread over two processes, against one: values, gradients, cache and state dicts."""

from __future__ import annotations

import pytest
import torch
from gpt_cases import LLAMA, config
from model_ranks import RANKS, run_rank
from processes import on_processes

from flash_attn.models.gpt import GPTLMHeadModel, combine_state_dicts_tp, shard_state_dict_tp


def test_processes_are_one():
    on_processes(RANKS, run_rank)


@pytest.fixture(scope="module")
def model():
    return GPTLMHeadModel(config(vocab_size=96, **LLAMA))


@pytest.mark.parametrize(
    ("world_size", "rank", "sentence"),
    [
        (2, 2, r"rank \(2\) must be from 0 to world_size - 1 \(1\)"),
        (4, 0, r"world_size \(4\) must be at most config.n_head_kv \(2\)"),
    ],
)
def test_processes_that_cannot_share(model, world_size, rank, sentence):
    with pytest.raises(ValueError, match=sentence):
        shard_state_dict_tp(model.state_dict(), model.config, world_size, rank)


def test_vocabulary_that_cannot_be_shared():
    options = config(vocab_size=97, **LLAMA)
    with pytest.raises(ValueError, match=r"world_size \(2\) must divide the vocabulary 97"):
        shard_state_dict_tp({}, options, 2, 0)


def test_parameters_that_do_not_fit_are_named(model):
    name = "transformer.layers.1.mlp.fc2.weight"
    wrong = {**model.state_dict(), name: torch.zeros(3, 5)}
    with pytest.raises(RuntimeError, match=rf"{name} has shape \(3, 5\), but dimension 1 must be"):
        shard_state_dict_tp(wrong, model.config, 2, 0)
    shards = [shard_state_dict_tp(model.state_dict(), model.config, 2, rank) for rank in range(2)]
    missing = {n: x for n, x in shards[1].items() if n != name}
    with pytest.raises(RuntimeError, match=rf"{name} is missing in state_dicts\[1\]"):
        combine_state_dicts_tp([shards[0], missing], model.config)
    with pytest.raises(RuntimeError, match=rf"{name} of state_dicts\[1\] has shape \(3, 5\)"):
        combine_state_dicts_tp([shards[0], {**shards[1], name: torch.zeros(3, 5)}], model.config)
    with pytest.raises(ValueError, match="at least one process"):
        combine_state_dicts_tp([], model.config)
