"""The peak of the tile unit (AMX) at the moment of each sample.

Where others share the machine, its pace changes from call to call, and the peak with it: a call's
share of the peak beside it says how good a kernel is, whoever else is busy.
"""

from __future__ import annotations

from typing import Callable

from peers.limits import amx_rate
from peers.unsupported import Unsupported

from measuring.timing import median, seconds


def _amx_rate() -> float:
    try:
        return amx_rate()
    except Unsupported:
        return 0.0


class PeakBeside:
    """Takes samples, on machines with AMX each between two of the peak."""

    def __init__(self):
        self._has_amx = _amx_rate() > 0
        self._shares: dict[Callable, list[float]] = {}  # a call's rate by the peak: per operation

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Seconds a call, of several in a row."""
        if not self._has_amx:
            return seconds(run, repeats)
        before = _amx_rate()
        call = seconds(run, repeats)
        peak = (before + _amx_rate()) / 2
        self._shares.setdefault(run, []).append(1 / (call * peak))
        return call

    def share(self, run: Callable[[], object], flops: float) -> float | None:
        """The median share of the peak of calls that do so many operations; None if not known."""
        shares = self._shares.get(run)
        return flops * median(shares) if shares and flops else None
