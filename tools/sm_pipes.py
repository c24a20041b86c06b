"""What a trip through a kernel's inner loop asks of the pipes of an SM.

An SM has four sub-partitions. Cycles are a sub-partition's, for one warp's block of keys, while the
other three do the same. It issues one instruction a cycle; a pipe of its own takes one every
32 / lanes cycles; the load/store pipe, which the four share, moves 128 bytes a cycle.

Where the figures come from: the throughputs of arithmetic instructions in the CUDA C++ Best
Practices Guide (results a cycle and SM: FP32 64 and 128 for compute capability 8.0 and 9.0;
integers, logic, comparisons and minima 64; exp2f 16; shuffles 32); which pipe an instruction takes,
packing FP32 to FP16 included, in Nsight Compute's Profiling Guide; the 16-bit products, 1024 and
2048 a cycle and SM, and shared memory's 128 bytes in the white papers of the A100 and the H100.
arXiv:2206.02874 measures as much for mma.m16n8k16 on the A100.

HGMMA.64xNx16, wgmma's instruction, is issued by the four warps of a warpgroup, one on each
sub-partition, and is N / 8 times the m16n8k16 of each of them. QGMMA.64xNx32, that of 8 bits, does
twice as much in as many cycles.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sass import Function, Instruction

# Roots of opcodes by the pipe that runs them.
OPCODES = {
    "tensor": "HGMMA HMMA QGMMA",
    "MUFU": "BREV F2F F2I FLO FRND I2F MUFU POPC",
    "FMA": "FADD FFMA FMUL HADD2 HFMA2 HMUL2 IMAD IMUL",
    "ALU": "F2FP FCHK FMNMX FSEL FSETP I2FP IABS IADD3 IMNMX ISETP LEA LOP3 P2R PLOP3 PRMT R2P SEL "
    "SGXT SHF VIADD VIADDMNMX VIMNMX VOTE",
    "LSU": "ATOMG LDG LDGSTS LDL LDS LDSM S2R SHFL ST STG STL STS STSM",
    "uniform": "ELECT R2UR S2UR UIADD3 UIMAD UISETP ULDC ULEA ULOP3 UPLOP3 UPRMT USEL USHF VOTEU",
    # What waits, barriers and fences among them, and what only starts a copy, counts where it is
    # issued.
    "others": "BAR BRA BREAK BSSY BSYNC CALL CCTL CGAERRBAR DEPBAR ENDCOLLECTIVE ERRBAR EXIT FENCE "
    "LDC LDGDEPBAR MEMBAR NOP RET SYNCS UCGABAR_ARV UCGABAR_WAIT USETMAXREG UTMACCTL "
    "UTMACMDFLUSH UTMALDG UTMASTG WARPGROUP WARPSYNC YIELD",
}
PIPE_OF = {root: pipe for pipe, roots in OPCODES.items() for root in roots.split()}
MOVES = {"MOV": "ALU", "CS2R": "ALU", "IMAD.MOV": "FMA", "UMOV": "uniform"}
WIDTHS = {"64": 2, "128": 4, "2": 2, "4": 4}  # bits of a lane, matrices of ldmatrix: wavefronts
WGMMA = re.compile(r"^(?:H|Q)GMMA\.64x(\d+)x(?:16|32)\.F32")  # bf16 and e4m3 have modifiers more
COLUMNS = ("tensor", "MUFU", "FMA", "ALU", "LSU", "uniform", "moves", "others")

# Cycles for each instruction, by compute capability; of the load/store pipe, for each 128 bytes.
RATES = {
    "8.0": {"issue": 1, "tensor": 8, "MUFU": 8, "FMA": 2, "ALU": 2, "LSU": 4},
    "9.0": {"issue": 1, "tensor": 4, "MUFU": 8, "FMA": 1, "ALU": 2, "LSU": 4},
}


class Use(NamedTuple):
    """The column that counts an instruction, the pipe that runs it, and how often that turns."""

    column: str
    pipe: str
    turns: int = 1


def use(line: Instruction) -> Use:
    """Return what ``line`` takes. Raises ``ValueError`` for an opcode that is not known here."""
    if line.guard == "@!PT":  # never runs
        return Use("others", "others")
    for opcode, pipe in MOVES.items():
        if f"{line.opcode}.".startswith(f"{opcode}."):
            return Use("moves", pipe)
    pipe = PIPE_OF.get(line.root)
    turns = {"LSU": wavefronts, "tensor": products}.get(pipe, lambda line: 1)(line)
    if pipe is None or turns is None:
        raise ValueError(f"tools/sm_pipes.py does not know the pipe or the rate of {line.opcode}")
    return Use(pipe, pipe, turns)


def products(line: Instruction) -> int | None:
    """Return how many m16n8k16 a warp's share of a product is, ``None`` for other shapes."""
    if ".16816." in line.opcode:
        return 1
    shape = WGMMA.search(line.opcode)
    return int(shape[1]) // 8 if shape else None


def wavefronts(line: Instruction) -> int:
    """Return how many times 128 bytes a warp's access moves, if no banks conflict."""
    return max(WIDTHS.get(modifier, 1) for modifier in line.opcode.split("."))


class Trip(NamedTuple):
    """One block of keys: ``counts`` of instructions by column, ``turns`` of the pipes."""

    counts: Counter
    turns: Counter

    def cycles(self, capability: str) -> dict[str, int]:
        """Return the cycles that each pipe is busy."""
        return {pipe: self.turns[pipe] * rate for pipe, rate in RATES[capability].items()}


def trip(lines: list[Instruction]) -> Trip:
    """Return what ``lines`` take."""
    uses = [use(line) for line in lines]
    turns = Counter(issue=len(lines))
    for one in uses:
        turns[one.pipe] += one.turns
    return Trip(Counter(one.column for one in uses), turns)


def preference(masked: bool) -> Callable[[list[Instruction]], tuple[int, ...]]:
    """Return what ``Function.best_path`` makes large: a trip multiplies and fetches all it can,
    selects scores under a mask, and does nothing else that it can leave out."""

    def value(block: list[Instruction]) -> tuple[int, ...]:
        roots = Counter(line.root for line in block)
        return roots["HMMA"], roots["LDGSTS"], masked * roots["FSEL"], -len(block)

    return value


def trips(function: Function) -> Iterator[tuple[str, Trip]]:
    """Yield the trips of ``function``'s inner loops and the block that each is for: one that every
    query sees, "full", and, if that is another way, one under a mask."""
    for loop in function.inner_loops(frozenset({"HMMA"})):
        full, masked = (function.best_path(loop, preference(mask)) for mask in (False, True))
        yield "full", trip(full)
        if masked != full:
            yield "masked", trip(masked)


def bound(cycles: dict[str, int]) -> str:
    """Return the busiest pipe, its cycles, and what it leaves of the tensor pipe's peak."""
    pipe = max(cycles, key=cycles.get)
    return f"{pipe} {cycles[pipe]}, {cycles['tensor'] / cycles[pipe]:.0%}"
