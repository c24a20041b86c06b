"""Callbacks that end a run as a machine would: in the middle of a step, or of a checkpoint."""

from __future__ import annotations

import os
import resource
import signal
import time

import torch
import training_cases  # noqa: F401  makes training importable

from training import checkpoint
from training.callbacks import Callback


def kill() -> None:
    """As ``kill -9`` of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_checkpoint(trainer, step: int) -> None:
    """Return when the checkpoint of a step is whole, which may be written meanwhile."""
    folder = trainer.out / "checkpoints" / f"step-{step:08d}"
    end = time.monotonic() + 60
    while not folder.is_dir() and time.monotonic() < end:
        time.sleep(0.01)


class KillAfter(Callback):
    """Kills the process after a step, the checkpoint of an earlier one being whole."""

    def __init__(self, step: int, stored: int, rank: int = 0):
        self._step, self._stored, self._rank = step, stored, rank

    def on_step(self, trainer, metrics):
        if trainer.step == self._step and trainer.rank == self._rank:
            wait_for_checkpoint(trainer, self._stored)
            kill()


class SignalAfter(Callback):
    """Sends the process what a cluster's scheduler sends before it takes the machine."""

    def __init__(self, step: int, signal: int = signal.SIGTERM):
        self._step, self._signal = step, signal

    def on_step(self, trainer, metrics):
        if trainer.step == self._step:
            os.kill(os.getpid(), self._signal)


class KillInCheckpoint(Callback):
    """Kills the process in the checkpoint of a step: when its files are there, before its name."""

    def __init__(self, step: int):
        self._step = step

    def on_start(self, trainer):
        crc = checkpoint._crc

        def crc_and_kill(path):
            if path.parent.name.startswith(f"step-{self._step:08d}"):
                kill()
            return crc(path)

        checkpoint._crc = crc_and_kill


class FullDisk(Callback):
    """After a step, files cannot grow beyond some bytes; until the run's end."""

    def __init__(self, step: int, stored: int, limit: int):
        self._step, self._stored, self._limit = step, stored, limit

    def on_step(self, trainer, metrics):
        if trainer.step == self._step:
            wait_for_checkpoint(trainer, self._stored)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._limit, resource.RLIM_INFINITY))

    def on_end(self, trainer):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


class Spoil(Callback):
    """Makes the weights that a step leaves behind too large for a loss, though finite."""

    def __init__(self, step: int):
        self._step = step

    def on_step(self, trainer, metrics):
        if trainer.step == self._step:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.copy_(parameter.sign() * 1e30)


class SpoilGradient(Callback):
    """After a step, makes gradients infinite."""

    def __init__(self, step: int):
        self._step = step

    def on_step(self, trainer, metrics):
        if trainer.step == self._step:
            parameter = next(trainer.model.parameters())
            parameter.register_hook(lambda gradient: gradient + float("inf"))
