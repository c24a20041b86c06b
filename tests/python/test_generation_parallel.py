"""Generation by a GPT spread over two processes: the tokens of one."""

from __future__ import annotations

import socket

import torch.multiprocessing as mp
from generation_ranks import RANKS, run_rank


def test_processes_are_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (port,), RANKS)
