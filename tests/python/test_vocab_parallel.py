"""Cross entropy with the classes divided over four processes, and over two."""

from __future__ import annotations

import socket

import torch.multiprocessing as mp
from cross_entropy_ranks import RANKS, run_rank


def test_shards_of_the_classes_are_the_whole():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (port,), RANKS)
