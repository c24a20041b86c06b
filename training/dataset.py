"""Sequences of a token file, in an order that a seed and a position determine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from training.token_file import open_tokens


class TokenDataset(Dataset):
    """Windows of ``seqlen`` tokens, each with the tokens after them; they do not overlap."""

    def __init__(self, path: Path, seqlen: int):
        self.path, self.seqlen = path, seqlen
        self.header, self._tokens = open_tokens(path)

    def __len__(self) -> int:
        return max((self.header.num_tokens - 1) // self.seqlen, 0)

    def __getitem__(self, index: int) -> Tensor:
        """Return int64 (seqlen + 1,): the inputs are all but the last, the targets all but the
        first."""
        first = index * self.seqlen
        return torch.from_numpy(self._tokens[first : first + self.seqlen + 1].astype(np.int64))

    def __getstate__(self) -> dict:  # a worker maps the file itself
        return {"path": self.path, "seqlen": self.seqlen}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


class EpochOrder:
    """Position in the run to sequence: a permutation an epoch, drawn from (seed, epoch)."""

    def __init__(self, num_sequences: int, seed: int):
        self.num_sequences, self._seed = num_sequences, seed
        self._epoch, self._permutation = -1, None

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            # Philox takes (seed, epoch) as its key: neighbouring seeds and epochs have nothing in
            # common.
            generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            self._epoch, self._permutation = epoch, generator.permutation(self.num_sequences)
        return int(self._permutation[place])


class StepSampler(Sampler):
    """This process's sequences of each step's global batch.

    The state is the number of steps alone, the same on every process and for any number of them:
    step ``s`` takes the positions from ``s * global_batch`` on, each process its equal share.
    """

    def __init__(self, order: EpochOrder, global_batch: int, rank: int, world_size: int):
        self._order, self._global_batch = order, global_batch
        self._share = global_batch // world_size
        self._first = rank * self._share
        self.step = 0

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        first = self.step * self._global_batch + self._first
        self.step += 1
        return [self._order[position] for position in range(first, first + self._share)]

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


def training_loader(
    dataset: TokenDataset, seed: int, global_batch: int, rank: int, world_size: int, workers: int
) -> StatefulDataLoader:
    """Return the endless loader of int64 (global_batch / world_size, seqlen + 1) a step."""
    sampler = StepSampler(EpochOrder(len(dataset), seed), global_batch, rank, world_size)
    with warnings.catch_warnings():  # of torchdata, for torch
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        return StatefulDataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # not the process', which a checkpoint stores
        )


def restore_loader(loader: StatefulDataLoader, state: dict, step: int) -> None:
    """Let the loader go on after ``step`` steps.

    state: of a loader, of another process or of another number of them, too. Its layout is of a
    number of workers; where that differs, the position alone tells all.
    """
    if state["workers"] == loader.num_workers:
        loader.load_state_dict(state["loader"])
    else:
        loader.batch_sampler.load_state_dict({"step": step})
