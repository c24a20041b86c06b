"""Cross entropy with the classes divided over four processes, and over two."""

from __future__ import annotations

from cross_entropy_ranks import RANKS, run_rank
from processes import on_processes


def test_shards_of_the_classes_are_the_whole():
    on_processes(RANKS, run_rank)
