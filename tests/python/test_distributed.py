"""Attention of sequences that two and four processes share, against one process."""

from __future__ import annotations

from processes import on_processes
from ring_ranks import PROCESSES, run_rank


def test_processes_are_one():
    on_processes(PROCESSES, run_rank)
