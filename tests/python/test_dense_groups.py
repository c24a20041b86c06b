"""Collectives, dense layers, MLPs and embeddings divided over two and four processes."""

from __future__ import annotations

import socket

import pytest
import torch.multiprocessing as mp
from dense_ranks import run_rank


@pytest.mark.parametrize("size", [2, 4])
def test_processes_are_one(size):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (size, port), size)
