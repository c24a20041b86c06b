"""Attention of sequences that two and four processes share, against one process."""

from __future__ import annotations

import socket

import torch.multiprocessing as mp
from ring_ranks import PROCESSES, run_rank


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_processes_are_one():
    mp.spawn(run_rank, (free_port(),), PROCESSES)
