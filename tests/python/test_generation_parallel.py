"""Generation by a GPT spread over two processes: the tokens of one."""

from __future__ import annotations

from generation_ranks import RANKS, run_rank
from processes import on_processes


def test_processes_are_one():
    on_processes(RANKS, run_rank)
