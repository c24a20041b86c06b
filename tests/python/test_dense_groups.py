"""Collectives, dense layers, MLPs and embeddings divided over four processes and over two."""

from __future__ import annotations

from dense_ranks import PROCESSES, run_rank
from processes import on_processes


def test_processes_are_one():
    on_processes(PROCESSES, run_rank)
