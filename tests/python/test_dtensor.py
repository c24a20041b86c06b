"""DTensors sharded over the batch and over heads, on two processes."""

from __future__ import annotations

from dtensor_ranks import RANKS, run_rank
from processes import on_processes


def test_two_processes_are_one():
    on_processes(RANKS, run_rank)
