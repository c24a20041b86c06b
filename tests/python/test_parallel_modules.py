"""Modules spread over two and four processes, against one: values and gradients."""

from __future__ import annotations

from parallel_module_ranks import RANKS, run_rank
from processes import on_processes


def test_processes_are_one():
    on_processes(RANKS, run_rank)
