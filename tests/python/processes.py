"""Tests on several processes, forked from one that has imported what most need and run nothing: the
imports would take each of them longer than most of its checks."""

from __future__ import annotations

import multiprocessing
import os
import socket

import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "transformers.models.gpt2.configuration_gpt2",
        "flash_attn.models.gpt",
    ]
)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _start(rank: int, environment: dict[str, str], work, port: int, arguments: tuple) -> None:
    os.environ.clear()  # that of the server's start
    os.environ.update(environment)
    work(rank, port, *arguments)


def on_processes(world_size: int, work, *arguments) -> None:
    """Call ``work(rank, port, *arguments)`` in ``world_size`` processes, with a port to meet at."""
    environment = dict(os.environ)
    mp.start_processes(
        _start, (environment, work, free_port(), arguments), world_size, start_method="forkserver"
    )
