"""When the warps of a sub-partition of an H100 issue the instructions of an sm_90a kernel.

A simulation, cycle by cycle, of one of the four sub-partitions of an SM, on which each warpgroup
has one warp; the other three do the same at the same time. It is a model, simpler than a GPU:

- One instruction is issued a cycle, of the warps in turn. A warp issues in order, when the
  registers that the instruction names have been written and its pipe is free. Pipes and their
  rates are those of sm_pipes.py; MUFU and LSU have queues of ``QUEUE`` instructions, others none.
- Products go to the tensor core in the order in which they are issued, and keep it busy for N / 2
  cycles each; registers of A are read when a product is issued.
- Copies arrive in time: a wait for an mbarrier takes its latency and no more. Shared memory is fast
  enough (warpgroups.py has its share).
- ``BAR.SYNC`` and ``BAR.ARV`` with a barrier from a register are the warpgroups' turns, which go
  around.

Latencies, in cycles from issue to the first use of the result, are round figures from
microbenchmarks (arXiv:1804.06826, arXiv:2402.13499: 4 to 6 for arithmetic, 20 to 30 for what leaves
the core).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import sm_pipes
from sass import Instruction

RATES = sm_pipes.RATES["9.0"]
LATENCIES = {"FMA": 5, "ALU": 5, "MUFU": 20, "LSU": 25, "uniform": 8, "others": 2}
LATENCIES_OF = {"SYNCS": 20, "BAR": 15, "R2UR": 10, "BRA": 6, "BSYNC": 6, "CALL": 10}
PRODUCT_LATENCY = 32  # from the tensor core's last cycle to the end of the wait
QUEUE = 4
QUEUED = ("MUFU", "LSU")
FOREVER = 1 << 62

REGISTER = re.compile(r"(?<![\w.])(U?R|U?P)(\d+)(?![\w])")
WIDE = {"64": 2, "WIDE": 2, "128": 4}


class Op(NamedTuple):
    """An instruction as the scheduler sees it."""

    kind: str  # "issue", "product", "wait", "turn", "pass", "stall"
    pipe: str
    busy: int  # cycles of the pipe
    latency: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    argument: int = 0  # of a wait: groups that may be left; of a product: whether it ends a group


def named(text: str) -> list[str]:
    """Return the registers in an operand."""
    return [kind + number for kind, number in REGISTER.findall(text)]


def following(register: str, count: int) -> list[str]:
    """Return ``count`` registers from ``register`` on."""
    kind, number = REGISTER.match(register).groups()
    return [f"{kind}{int(number) + i}" for i in range(count)]


def results(line: Instruction) -> list[str]:
    """Return the registers that ``line`` writes: its first operand, and the second where the first
    is a predicate or a predicate is the second."""
    operands = [part.strip() for part in line.operands.split(",")]
    if not operands or line.root in ("STS", "STSM", "STL", "STG", "BRA", "BAR"):
        return []
    first = named(operands[0])
    width = max((WIDE.get(part, 1) for part in line.opcode.split(".")), default=1)
    found = following(first[0], width) if first else []
    second = operands[1] if len(operands) > 1 else ""
    if operands[0].lstrip("U").startswith("P") or second.lstrip("U").startswith("P"):
        found += named(second)
    return found


@cache
def decode(line: Instruction) -> Op:
    """Return ``line`` as the scheduler sees it."""
    use = sm_pipes.use(line)
    reads = tuple(named(line.guard.lstrip("@!"))) + tuple(named(line.operands))
    if line.root in ("HGMMA", "QGMMA"):
        parts = [part.strip() for part in line.operands.split(",")]
        a = following(parts[1], 4) if parts[1].startswith("R") and parts[1] != "RZ" else []
        busy = use.turns * RATES["tensor"]
        return Op("product", "tensor", busy, 1, tuple(a), (), int("gsb0" in parts))
    if line.opcode.startswith("WARPGROUP.DEPBAR"):
        return Op("wait", "others", 1, 1, (), (), int(line.operands.split(",")[1], 0))
    if line.root == "BAR" and line.operands.startswith("R"):
        kind = "turn" if line.opcode.startswith("BAR.SYNC") else "pass"
        return Op(kind, "others", 1, LATENCIES_OF["BAR"], reads, ())
    latency = LATENCIES_OF.get(line.root, LATENCIES.get(use.pipe, 2))
    busy = use.turns * RATES.get(use.pipe, 1)
    kind = "stall" if line.root in ("BRA", "BSYNC", "CALL") else "issue"
    return Op(kind, use.pipe, busy, latency, reads, tuple(results(line)))


def idle(cycles: int) -> Op:
    """Return an instruction that keeps its warp from issuing for ``cycles``."""
    return Op("stall", "others", 1, cycles, (), ())


class Warp:
    """A warp and the instructions before it. ``turns``: how often it may begin its turn."""

    def __init__(self, program: Iterable[Op], turns: int):
        self.program = list(program)
        self.at = 0
        self.next_issue = 0
        self.ready: dict[str, int] = {}  # the cycle from which a register can be read
        self.turns = turns
        self.group_ends: deque[int] = deque()  # of groups of products
        self.turn_from = 0

    @property
    def op(self) -> Op:
        return self.program[self.at]

    @property
    def is_done(self) -> bool:
        return self.at == len(self.program)


class SubPartition:
    """Runs warps with ``programs``, and with all latencies ``slowness`` times as long. ``busy``:
    cycles of each pipe."""

    def __init__(self, programs: list[list[Op]], slowness: float = 1.0):
        self.slowness = slowness
        self.warps = [Warp(program, int(i == 0)) for i, program in enumerate(programs)]
        self.free = dict.fromkeys([*RATES, "uniform", "others"], 0)
        self.busy = dict.fromkeys(self.free, 0)
        self.now = 0
        self._last = 0

    def run(self) -> int:
        """Run to the end; return its cycle."""
        while not all(warp.is_done for warp in self.warps):
            times = {i: self._earliest(w) for i, w in enumerate(self.warps) if not w.is_done}
            soonest = min(times.values())
            if soonest == FOREVER:
                raise ValueError("no warp's turn ever comes: the kernel passes on too few")
            self.now = max(self.now, soonest)
            count = len(self.warps)
            order = sorted(times, key=lambda i: (i - self._last - 1) % count)
            chosen = next(i for i in order if times[i] <= self.now)
            self._issue(chosen)
            self._last = chosen
            self.now += 1
        return max(self.now, self.free["tensor"])

    def _earliest(self, warp: Warp) -> int:
        """Return the first cycle in which ``warp`` can issue, as far as is known now."""
        op = warp.op
        at = warp.next_issue
        for register in op.reads:
            at = max(at, warp.ready.get(register, 0))
        if op.kind == "wait" and len(warp.group_ends) > op.argument:
            at = max(at, warp.group_ends[-1 - op.argument])
        if op.kind == "turn":
            at = max(at, warp.turn_from) if warp.turns > 0 else FOREVER
        if op.kind == "issue" and op.pipe in RATES:
            room = (QUEUE if op.pipe in QUEUED else 0) * RATES[op.pipe]
            at = max(at, self.free[op.pipe] - room)
        return at

    def _issue(self, index: int) -> None:
        warp, now = self.warps[index], self.now
        op = warp.op
        latency = round(op.latency * self.slowness) if op.latency > 1 else 1
        warp.at += 1
        warp.next_issue = now + 1
        start = max(now, self.free[op.pipe])
        if op.pipe in RATES:
            self.free[op.pipe] = start + op.busy
            self.busy[op.pipe] += op.busy
        self.busy["issue"] += 1
        for register in op.writes:
            warp.ready[register] = start + latency
        if op.kind == "product" and op.argument:
            warp.group_ends.append(self.free["tensor"] + round(PRODUCT_LATENCY * self.slowness))
        elif op.kind == "wait":
            while len(warp.group_ends) > op.argument:
                warp.group_ends.popleft()
        elif op.kind == "turn":
            warp.turns -= 1
        elif op.kind == "pass":
            after = self.warps[(index + 1) % len(self.warps)]
            after.turns += 1
            after.turn_from = now + latency
        elif op.kind == "stall":
            warp.next_issue = now + latency
