"""A state dict divided over the processes of a tensor-parallel group, and put together again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.models._config import GPTOptions, options_of
from flash_attn.models._state_dict import POSITIONS, WORDS
from flash_attn.utils.distributed import get_dim_for_local_rank


class Cut(NamedTuple):
    """How a parameter is divided: a dimension that has parts one after the other, each of ``units``
    of ``size``, of which every process gets its share."""

    dim: int
    parts: list[tuple[int, int]]


_OF_FIRST = re.compile(r"\.(mixer\.out_proj|mlp\.fc2)\.bias$")  # what the first process alone has


def _cut(name: str, options: GPTOptions) -> Optional[Cut]:
    """Return how the parameter is divided; None: every process has all of it."""
    if name in (WORDS, "lm_head.weight", "lm_head.bias"):
        return Cut(0, [(options.padded_vocab_size, 1)])
    if name == POSITIONS:
        return Cut(1, [(options.n_embd, 1)])
    groups, dim = options.n_head_kv, options.head_dim
    queries = options.n_head // groups
    if ".mixer.Wqkv." in name:
        return Cut(0, [(groups, queries * dim), (groups, dim), (groups, dim)])
    if name.endswith(".mixer.out_proj.weight"):
        return Cut(1, [(groups, queries * dim)])
    if name.endswith(".mixer.sinks"):
        return Cut(0, [(groups, queries)])
    hidden = options.hidden_features
    if ".mlp.fc1." in name:
        return Cut(0, [(hidden, 1)] * (2 if options.is_gated else 1))
    if name.endswith(".mlp.fc2.weight"):
        return Cut(1, [(hidden, 1)])
    return None


def _shares(cut: Cut, world_size: int) -> list[list[int]]:
    """Return, for each part, how much of the dimension each process has."""
    return [
        [size * get_dim_for_local_rank(units, world_size, rank) for rank in range(world_size)]
        for units, size in cut.parts
    ]


def _whole_size(cut: Cut) -> int:
    return sum(units * size for units, size in cut.parts)


def _check_size(name: str, x: Tensor, dim: int, expected: int) -> None:
    if x.shape[dim] != expected:
        raise RuntimeError(
            f"{name} has shape {tuple(x.shape)}, but dimension {dim} must be {expected} by the "
            "configuration"
        )


def _check_world(options: GPTOptions, world_size: int) -> None:
    if world_size > options.n_head_kv:
        raise ValueError(
            f"world_size ({world_size}) must be at most config.n_head_kv ({options.n_head_kv})"
        )
    if options.padded_vocab_size % world_size:
        raise ValueError(
            f"world_size ({world_size}) must divide the vocabulary {options.padded_vocab_size} of "
            f"config.vocab_size and config.pad_vocab_size_multiple"
        )
    if options.n_positions > 0 and options.n_embd % world_size:
        raise ValueError(f"world_size ({world_size}) must divide config.n_embd ({options.n_embd})")


def shard_state_dict_tp(
    state_dict: Mapping[str, Tensor], config, world_size: int, rank: int
) -> dict[str, Tensor]:
    """Return one process's part of a model's state dict.

    Args:
        state_dict: of the whole ``GPTLMHeadModel``.
        config: its configuration.
        world_size: processes of the group.
        rank: the process.

    Raises:
        ValueError: ``rank`` is none of the processes, or they cannot share the model.
        RuntimeError: a shape does not fit the configuration; the message names the parameter.
    """
    options = options_of(config)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank ({rank}) must be from 0 to world_size - 1 ({world_size - 1})")
    _check_world(options, world_size)
    shard = {}
    for name, x in state_dict.items():
        cut = _cut(name, options)
        if cut is None:
            if rank == 0 or not _OF_FIRST.search(name):
                shard[name] = x
            continue
        _check_size(name, x, cut.dim, _whole_size(cut))
        lengths = [length for shares in _shares(cut, world_size) for length in shares]
        pieces = x.split(lengths, cut.dim)[rank::world_size]
        shard[name] = torch.cat(pieces, cut.dim) if len(pieces) > 1 else pieces[0].contiguous()
    return shard


def _padded(name: str, x: Tensor, options: GPTOptions) -> Tensor:
    """Return it with the rows that fill up the vocabulary, where it is without."""
    rows = options.padded_vocab_size - x.shape[0]
    is_words = name in (WORDS, "lm_head.weight", "lm_head.bias")
    if not is_words or rows == 0 or x.shape[0] != options.vocab_size:
        return x
    return F.pad(x, (0, 0, 0, rows) if x.dim() == 2 else (0, rows))


def _combined(name: str, pieces: list[Tensor], cut: Cut, options: GPTOptions) -> Tensor:
    word_dim = options.word_embed_proj_dim or options.n_embd
    if name == WORDS and pieces[0].shape[1] < word_dim:
        cut = Cut(1, [(options.n_embd, 1)])  # Meta's Llama has it divided by columns
    if name in (WORDS, "lm_head.weight", "lm_head.bias"):
        whole = _padded(name, torch.cat(pieces, cut.dim), options)
    else:
        shares = _shares(cut, len(pieces))
        for rank, piece in enumerate(pieces):
            _check_size(
                f"{name} of state_dicts[{rank}]", piece, cut.dim, sum(s[rank] for s in shares)
            )
        by_rank = [
            piece.split([s[rank] for s in shares], cut.dim) for rank, piece in enumerate(pieces)
        ]
        whole = torch.cat([part for parts in zip(*by_rank) for part in parts], cut.dim)
    _check_size(name, whole, cut.dim, _whole_size(cut))
    return whole


def combine_state_dicts_tp(
    state_dicts: Sequence[Mapping[str, Tensor]], config
) -> dict[str, Tensor]:
    """Return a model's state dict from those of the processes that share it.

    Args:
        state_dicts: one of each process, in their order; those of Meta's Llama, converted, too.
        config: the model's configuration.

    Raises:
        ValueError: there is none.
        RuntimeError: a name is missing in one of them, or a shape does not fit the configuration;
            the message names the parameter.
    """
    if not state_dicts:
        raise ValueError("state_dicts must have the state dict of at least one process")
    options, whole = options_of(config), {}
    names = list(state_dicts[0])
    names += [name for other in state_dicts[1:] for name in other if name not in state_dicts[0]]
    for name in dict.fromkeys(names):
        cut = _cut(name, options)
        holders = state_dicts[:1] if _OF_FIRST.search(name) else state_dicts
        missing = [rank for rank, state_dict in enumerate(holders) if name not in state_dict]
        if missing:
            raise RuntimeError(f"{name} is missing in state_dicts[{missing[0]}]")
        if cut is None:
            whole[name] = state_dicts[0][name]
        else:
            pieces = [state_dict[name] for state_dict in state_dicts]
            whole[name] = _combined(name, pieces, cut, options)
    return whole
