"""Modules spread over two and four processes, against one: values and gradients."""

from __future__ import annotations

import socket

import torch.multiprocessing as mp
from parallel_module_ranks import RANKS, run_rank


def test_processes_are_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (port,), RANKS)
