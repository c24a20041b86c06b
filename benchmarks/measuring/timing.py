"""Timing of several functions that take turns."""

from __future__ import annotations

import statistics
import time
from typing import Callable

_SAMPLE_SECONDS = 0.005  # shorter calls are repeated within one sample
# Between two functions: threads of the first's pool that still spin would slow the second.
_PAUSE_SECONDS = 0.002


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Seconds a call, of several in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def take_turns(
    runs: dict[str, Callable[[], object]],
    estimates: dict[str, float],
    budget: float,
    max_samples: int = 50,
    timed: Callable[[Callable[[], object], int], float] = seconds,
) -> dict[str, list[float]]:
    """Seconds a call of each function, measured A B C A B C ...

    A change of the machine's pace then meets all of them alike.

    Arguments:
        runs: functions of no arguments, by name.
        estimates: seconds of a call of each, from one made before. Where it exceeds the budget,
            it is the only sample and the function is not called again.
        budget: seconds for all of them; every one is measured at least once, and three times if
            that costs no more than twice the budget.
        max_samples: samples of each at most.
        timed: takes a sample, as ``seconds`` does.
    """
    started = time.perf_counter()
    slow = {name: [t] for name, t in estimates.items() if t > budget}
    runs = {name: run for name, run in runs.items() if name not in slow}
    repeats = {name: max(1, round(_SAMPLE_SECONDS / estimates[name])) for name in runs}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(max_samples):
        elapsed = time.perf_counter() - started
        if done and elapsed > (2 * budget if done < 3 else budget):
            break
        for name, run in runs.items():
            time.sleep(_PAUSE_SECONDS)
            samples[name].append(timed(run, repeats[name]))
    return {name: slow.get(name) or samples[name] for name in estimates}


def median(samples: list[float]) -> float:
    """The middle sample."""
    return statistics.median(samples)
