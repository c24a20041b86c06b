"""The processes of a run: torchrun's, or this one alone."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import torch
import torch.distributed as dist

_PHILOX_SEEDS = 1 << 63


def start_processes(device: str) -> torch.device:
    """Join torchrun's process group, or make one of this process; return this one's device.

    device: "auto" (a GPU if there is one), "cpu" or "cuda".
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(index)
        chosen = torch.device("cuda", index)
    else:
        chosen = torch.device(device)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return chosen


def seed_everything(seed: int, *more: int) -> None:
    """Seed all generators of this process from numbers, such as its rank and the step."""
    words = np.random.SeedSequence([seed, *more]).generate_state(2, np.uint64)
    value = int(words[0] % _PHILOX_SEEDS)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(int(words[1] % (1 << 32)))  # noqa: NPY002  what libraries draw from


def rng_state() -> dict:
    """Return the state of all generators of this process."""
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Set the state of all generators."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class StopSignal:
    """Whether SIGTERM or SIGUSR1 (of a cluster's scheduler), or SIGINT (Ctrl-C), asks this process
    to end. A second SIGINT interrupts at once."""

    def __init__(self):
        self.arrived = False
        self._before = {
            number: signal.signal(number, self._arrive)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }

    def _arrive(self, number: int, _) -> None:
        self.arrived = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def restore(self) -> None:
        """Let the signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
