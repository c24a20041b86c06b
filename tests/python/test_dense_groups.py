"""Collectives, dense layers, MLPs and embeddings divided over four processes and over two."""

from __future__ import annotations

import socket

import torch.multiprocessing as mp
from dense_ranks import PROCESSES, run_rank


def test_processes_are_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (port,), PROCESSES)
