"""Timing of several functions that take turns."""

from __future__ import annotations

import statistics
import time
from typing import Callable

_SAMPLE_SECONDS = 0.005  # shorter calls are repeated within one sample


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def take_turns(
    runs: dict[str, Callable[[], object]], budget: float, max_samples: int = 50
) -> dict[str, list[float]]:
    """Seconds a call of each function, measured A B C A B C ...

    A change of the machine's pace then meets all of them alike.

    Arguments:
        runs: functions of no arguments, by name. Each is called once beforehand; one that takes
            longer than the budget is not called again.
        budget: seconds for all of them; every one is measured at least once, and three times if
            that costs no more than twice the budget.
        max_samples: samples of each at most.
    """
    started = time.perf_counter()
    estimates = {name: _seconds(run, 1) for name, run in runs.items()}
    slow = {name: [t] for name, t in estimates.items() if t > budget}
    runs = {name: run for name, run in runs.items() if name not in slow}
    repeats = {name: max(1, round(_SAMPLE_SECONDS / t)) for name, t in estimates.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(max_samples):
        elapsed = time.perf_counter() - started
        if done and elapsed > (2 * budget if done < 3 else budget):
            break
        for name, run in runs.items():
            samples[name].append(_seconds(run, repeats[name]))
    return {name: slow.get(name) or samples[name] for name in estimates}


def median(samples: list[float]) -> float:
    """The middle sample."""
    return statistics.median(samples)
