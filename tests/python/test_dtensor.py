"""DTensors sharded over the batch and over heads, on two processes."""

from __future__ import annotations

import socket

import torch.multiprocessing as mp
from dtensor_ranks import RANKS, run_rank


def test_two_processes_are_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (port,), RANKS)
