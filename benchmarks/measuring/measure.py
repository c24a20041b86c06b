"""Measures one case: who can run it, whether the results agree, how long each takes."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace

import torch
from cases.case import Case, Inputs, Work, make_inputs
from peers.limits import LIMITS
from peers.registry import HOLDS_SCORES, PEERS, Run
from peers.unsupported import Unsupported

from measuring.refcheck import RefCheck
from measuring.table import CASE_COLUMNS
from measuring.tile_peak import PeakBeside
from measuring.timing import median, seconds, take_turns

# Largest difference from this package's result, relative to the largest value: enough for what
# implementations round in between (ggml adds up fp16 values in fp16), too little for a wrong mask.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-2, torch.bfloat16: 6e-2}
_NOT_COMPARED = frozenset(("flash_attn", "no_window", *LIMITS))
# With a total budget, longer calls (seconds) are not begun; of ours and torch's, of the others.
_LONGEST_CALL, _LONGEST_CALL_OF_OTHERS = 20.0, 3.0
_MAIN = frozenset(("flash_attn", "no_window", "sdpa"))


@dataclass
class Budget:
    """How long a run may take, and what it has seen so far.

    total: seconds for all cases (None: no limit); case: for one; told: lines printed already.
    """

    total: float | None
    case: float
    max_scores_gib: float
    started: float = field(default_factory=time.perf_counter)
    told: set[str] = field(default_factory=set)
    _rates: dict[tuple, float] = field(default_factory=dict)

    def guess(self, case: Case, name: str) -> float:
        """Seconds of a call, by the rate of the last case of this kind; 0 where unknown."""
        rate = self._rates.get((case.op, case.dtype, name))
        return case.flops() / rate if rate and name in PEERS else 0.0

    def learn(self, case: Case, name: str, call: float) -> None:
        """Remember a call's seconds."""
        self._rates[(case.op, case.dtype, name)] = case.flops() / call

    def left(self) -> float:
        """Seconds that remain."""
        if self.total is None:
            return float("inf")
        return self.total - (time.perf_counter() - self.started)

    def suffices(self, case: Case, names) -> bool:
        """Whether a case, as far as one can guess, ends in time."""
        calls = [self.guess(case, name) for name in names if not self.refusal(case, name)]
        turns = sum(call if call > self.case else 3 * call for call in calls)
        return turns < self.left()

    def refusal(self, case: Case, name: str) -> str:
        """Why a peer is left out, or nothing."""
        if name in HOLDS_SCORES and case.score_bytes() > self.max_scores_gib * 2**30:
            return "scores do not fit"
        guess = self.guess(case, name)
        longest = _LONGEST_CALL if name in _MAIN else _LONGEST_CALL_OF_OTHERS
        if self.total is not None and guess > longest:
            return f"a call would take {guess:.0f} s"
        return ""


@dataclass
class Measurement:
    """Rows of the table, and lines about what was left out."""

    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Contender:
    """A peer, or a limit, ready to run."""

    run: Run
    work: Work
    first_call: float = 0.0
    error_ratio: float | None = None
    difference: float | None = None
    share_of_tile_peak: float | None = None


@functools.cache
def _warm_up(op: str, dtype: str, peer: str) -> None:
    """Pay once for what a process pays once: loading code, starting threads."""
    small = Case(op, dtype, 1, 1 if op == "decode" else 32, 32, 2, 2, 16, 16, False)
    try:
        _prepare(small, make_inputs(small), peer).run()
    except Unsupported:
        return


def _prepare(case: Case, inputs: Inputs, name: str) -> _Contender:
    if name in LIMITS:
        run, work = LIMITS[name](case, inputs)
        return _Contender(run, work)
    own = replace(case, window=0) if name == "no_window" else case
    return _Contender(PEERS[name](case, inputs), own.work())


def _difference(actual, expected, dtype: torch.dtype) -> float:
    """Largest difference as a fraction of what is tolerated; infinite for NaN."""
    worst = 0.0
    for a, b in zip(actual, expected):
        limit = _TOLERANCE[dtype] * float(b.abs().max())
        ratio = float((a.detach().float() - b.float()).abs().max()) / limit
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


class _Notes:
    """Lines for the reader; each is told once a run."""

    def __init__(self, told: set[str]):
        self._told = told
        self.lines: list[str] = []

    def add(self, name: str, reason: str, case: Case | None = None) -> None:
        line = f"{name}: {reason}" + (f" ({case})" if case else "")
        if line not in self._told:
            self._told.add(line)
            self.lines.append(line)


def _gather(case: Case, names, budget: Budget, notes: _Notes, inputs: Inputs):
    """Those who can run the case."""
    contenders = {}
    for name in names:
        if reason := budget.refusal(case, name):
            notes.add(name, reason, case)
            continue
        _warm_up(case.op, case.dtype, name)
        try:
            contenders[name] = _prepare(case, inputs, name)
        except Unsupported as error:
            notes.add(name, str(error))
    return contenders


def _call_once(case: Case, contenders: dict[str, _Contender], check: RefCheck | None) -> None:
    """The first call of each: its time, and whether its result is right."""
    expected = None
    for name, contender in contenders.items():
        results = []
        contender.first_call = seconds(lambda: results.append(contender.run()))  # noqa: B023
        if name == "flash_attn":
            expected = tuple(x.detach().clone() for x in results[0])
        if check is not None and name not in LIMITS and name != "no_window":
            contender.error_ratio = check.ratio(results[0])
        if expected is not None and name not in _NOT_COMPARED:
            contender.difference = _difference(results[0], expected, case.torch_dtype)


def _row(case: Case, name: str, contender: _Contender, samples: list[float], sdpa) -> dict:
    middle = median(samples)
    work, rate = contender.work, 1e-9 / middle
    row = {column: getattr(case, column) for column in CASE_COLUMNS}
    return row | {
        "causal": int(case.causal),
        "peer": name,
        "median_ms": round(middle * 1e3, 4),
        "min_ms": round(min(samples) * 1e3, 4),
        "samples": len(samples),
        "gflops": round(work.flops * rate, 2),
        "gexps": round(work.exps * rate, 3),
        "gbytes": round(work.bytes * rate, 3),
        "share_of_tile_peak": _text(contender.share_of_tile_peak),
        "ratio_to_sdpa": round(sdpa / middle, 3) if sdpa and name not in LIMITS else "",
        "error_ratio": _text(contender.error_ratio),
        "difference": _text(contender.difference),
    }


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


def measure(case: Case, names, budget: Budget, refcheck: bool) -> Measurement:
    """Rows of one case, one a peer; none if the budget's rest does not suffice.

    A wrong result shows as an error_ratio or a difference above 1; a peer whose result differs is
    not timed, unless it is PyTorch's default, for then ours may be wrong.
    """
    notes = _Notes(budget.told)
    if not budget.suffices(case, names):
        notes.add("left out", "the time is up", case)
        return Measurement(notes=notes.lines)
    inputs = make_inputs(case)
    contenders = _gather(case, names, budget, notes, inputs)
    _call_once(case, contenders, RefCheck(case, inputs) if refcheck else None)
    for name, contender in list(contenders.items()):
        if name != "sdpa" and (contender.difference or 0) > 1:
            notes.add(name, f"result differs, {contender.difference:.3g} of the tolerance", case)
            del contenders[name]
    runs = {name: contender.run for name, contender in contenders.items()}
    estimates = {name: contender.first_call for name, contender in contenders.items()}
    beside = PeakBeside()
    samples = take_turns(runs, estimates, budget.case, timed=beside.seconds)
    for contender in contenders.values():
        contender.share_of_tile_peak = beside.share(contender.run, contender.work.flops)
    for name, values in samples.items():
        budget.learn(case, name, median(values))
    sdpa = median(samples["sdpa"]) if "sdpa" in samples else None
    rows = [_row(case, name, contenders[name], values, sdpa) for name, values in samples.items()]
    return Measurement(rows, notes.lines)


def format_rows(case: Case, rows: list[dict]) -> str:
    """One line of the printed table."""
    cells = []
    for row in rows:
        ratio = f" ({row['ratio_to_sdpa']:.2f}x)" if row["ratio_to_sdpa"] else ""
        error = f" err {row['error_ratio']}" if row["error_ratio"] else ""
        share = row["share_of_tile_peak"]
        share = f" {float(share):.0%} of AMX" if share and row["peer"] not in LIMITS else ""
        cells.append(f"{row['peer']} {_value(row)}{share}{ratio}{error}")
    return f"{case!s:52} | " + " | ".join(cells)


def _value(row: dict) -> str:
    """The time, and the rate that tells most; of a limit the rate alone."""
    if row["op"] == "decode":
        rate = f"{row['gbytes']:.1f} GB/s"
    else:
        rate = f"{row['gflops']:.1f}" if row["gflops"] else f"{row['gexps']:.1f} Gexp/s"
    return rate if row["peer"] in LIMITS else f"{row['median_ms']:.3f} ms {rate}"
