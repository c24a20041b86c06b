"""What the inner loops of the sm_90a kernels ask of an SM, and how fast that makes them.

Their warpgroups multiply by wgmma and take turns at their exponentials (mainloop_fwd.h). Of the
machine code this reads the loop over blocks that every query sees, and the one over blocks that a
mask cuts; warp_schedule.py tells how long two or three warpgroups take that share an SM.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import sm_pipes
import warp_schedule
from sass import Function, Instruction

PREFIX = "flash_fwd_sm90_"
PRODUCT = frozenset({"HGMMA", "QGMMA"})
REGISTERS = 64 << 10  # of an SM
WARPGROUP = 128  # threads
SHARED_BYTES = 128  # a cycle and SM
PRODUCT_BYTES = 32  # of a row of an operand of a product
ROWS = 64  # of a warpgroup
MASK = 8  # selects in a row are a mask's, fewer are a row's
SMS = 132  # of an H100 SXM
GHZ = 1.755  # its boost clock under load: without a limit by power
OPERATIONS = 4096  # of 16-bit products, a cycle and SM; of those of 8 bits twice as many
PEAK = SMS * GHZ * OPERATIONS / 1000  # TFLOP/s of 16-bit products
EPILOGUE_LATENCY = 300  # cycles: the sum's shuffles, a division, a logarithm, a barrier, in a row


class Kernel(NamedTuple):
    """A kernel's loops: ``full`` and ``cut`` are the instructions of a trip of one warp."""

    name: str
    registers: int  # of a thread of a warpgroup that multiplies
    n: int  # keys of a block
    head_dim: int
    head_dim_v: int
    full: list[Instruction]
    cut: list[Instruction]

    @property
    def warpgroups(self) -> int:
        """Warpgroups that multiply."""
        return REGISTERS // (self.registers * WARPGROUP)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of Q, K and V."""
        return 1 if "_e4m3_" in self.name else 2

    @property
    def m(self) -> int:
        """Queries of a tile."""
        return self.warpgroups * ROWS

    @property
    def products(self) -> int:
        """Cycles of the tensor pipe for one warpgroup's block, at least."""
        operations = ROWS * self.n * (self.head_dim + self.head_dim_v) * 2
        return operations * self.element_bytes // (2 * OPERATIONS)

    @property
    def copied(self) -> int:
        """Bytes of K and V of a block."""
        return self.n * (self.head_dim + self.head_dim_v) * self.element_bytes

    @property
    def transposed(self) -> int:
        """Bytes of V of a block that a warp reads and writes again."""
        return self.n * self.head_dim_v if self.element_bytes == 1 else 0


def value(cut: bool) -> Callable[[list[Instruction]], tuple[int, ...]]:
    """Return what ``Function.best_path`` makes large: a trip multiplies, selects scores in a block
    that is cut, and does nothing else that it can leave out, such as to raise references."""

    def of(block: list[Instruction]) -> tuple[int, ...]:
        roots = Counter(line.root for line in block)
        selects = roots["FSEL"] if roots["FSEL"] >= MASK else 0
        return sum(roots[root] for root in PRODUCT), cut * selects, -len(block)

    return of


def from_registers(line: Instruction) -> bool:
    """Whether a product takes its first operand from registers, as P V does."""
    return not line.operands.split(",")[1].strip().startswith("gdesc")


def overlap(trip: list[Instruction]) -> bool:
    """Whether P V of a block is under way with Q K^T of the next, in front of its softmax."""
    before = itertools.takewhile(lambda line: line.root != "MUFU", trip)
    return any(line.root in PRODUCT and from_registers(line) for line in before)


def width(line: Instruction) -> int:
    """Return N of a product."""
    return sm_pipes.products(line) * 8


def read(function: Function) -> Kernel:
    """Return the loops of a kernel. One may do for both kinds of blocks."""
    loops = function.inner_loops(PRODUCT)
    if not loops:
        raise ValueError(f"{function.name} has no loop with wgmma")
    ways = [function.best_path(loop, value(cut=False)) for loop in loops]
    full = min(ways, key=lambda way: (not overlap(way), len(way)))
    cut = max((function.best_path(loop, value(cut=True)) for loop in loops), key=len)
    products = [line for line in full if line.root in PRODUCT]
    (n,) = {width(line) for line in products if not from_registers(line)}
    registers = next(
        int(line.operands.split(",")[1], 0)
        for block in function.blocks
        for line in block
        if line.opcode.startswith("USETMAXREG.TRY_ALLOC")
    )
    head_dim, head_dim_v = re.search(r"_d(\d+)(?:x(\d+))?_", function.name).groups()
    return Kernel(
        function.name,
        registers,
        n,
        int(head_dim),
        int(head_dim_v or head_dim),
        full,
        cut,
    )


def shared_memory(kernel: Kernel) -> int:
    """Return the cycles of shared memory for a block and all warpgroups: what products and warps
    read, and what the copies write."""
    bytes_read = 0
    for line in kernel.full:
        if line.root in PRODUCT:
            rows = width(line) + (0 if from_registers(line) else ROWS)
            bytes_read += rows * PRODUCT_BYTES
    warps = sm_pipes.trip(kernel.full).cycles("9.0")["LSU"]
    moved = kernel.copied + 2 * kernel.transposed
    return kernel.warpgroups * (bytes_read // SHARED_BYTES + warps) + moved // SHARED_BYTES


def minimum(n: int) -> dict[str, int]:
    """Return the fewest instructions of a pipe for one warp's block of ``n`` keys.

    A lane has n / 2 scores, of two rows. A score is compared, scaled less its reference by one FMA,
    raised to a power, added up, and with another packed. Of a row the maximum goes through two
    shuffles and is compared with the reference, and the reference is scaled; then the warp votes
    whether to rescale.
    """
    scores, rows = n // 2, 2
    return {
        "MUFU": scores,
        "FMA": 2 * scores + rows,
        "ALU": (scores - rows) + 2 * rows + rows + scores // 2 + 1,
    }


def surplus(kernel: Kernel) -> dict[str, float]:
    """Return the loop's instructions as multiples of the fewest, by pipe; those that are neither
    products nor softmax, such as the loop's counters, included."""
    turns = Counter(sm_pipes.use(line).pipe for line in kernel.full)
    return {pipe: turns[pipe] / least for pipe, least in minimum(kernel.n).items()}


def tile(kernel: Kernel, full: int, cut: int) -> list[warp_schedule.Op]:
    """Return a warp's instructions for a tile of ``full`` and ``cut`` blocks."""
    trip = [warp_schedule.decode(line) for line in kernel.full]
    cut_trip = [warp_schedule.decode(line) for line in kernel.cut]
    is_pv = [line.root in PRODUCT and from_registers(line) for line in kernel.full]
    program = cut_trip * cut
    if not overlap(kernel.full):
        program += trip * full
    elif full:
        # The first has nothing beside it; its P V is what the last has left.
        program += [op for op, left_out in zip(trip, is_pv) if not left_out]
        program += trip * (full - 1)
        program += [op for op, kept in zip(trip, is_pv) if kept]
    return [*program, warp_schedule.Op("wait", "others", 1, 1, (), ()), *epilogue(kernel)]


def epilogue(kernel: Kernel) -> list[warp_schedule.Op]:
    """Return instructions as of the output's way to shared memory."""
    outputs = kernel.head_dim_v // 2  # of a lane
    scale, pack, store = (
        warp_schedule.Op("issue", pipe, busy, 5, (), ())
        for pipe, busy in (("FMA", 1), ("ALU", 2), ("LSU", 16))
    )
    steps = [scale] * outputs + [pack] * (outputs // 2) + [store] * (outputs // 8)
    return [warp_schedule.idle(EPILOGUE_LATENCY), *steps]


def period(kernel: Kernel, full: int, cut: int = 0, slowness: float = 1.0) -> float:
    """Return the cycles from a tile to the next, with latencies ``slowness`` times as long."""
    one = tile(kernel, full, cut)
    programs = ([one * tiles] * kernel.warpgroups for tiles in (2, 4))
    two, four = (warp_schedule.SubPartition(each, slowness).run() for each in programs)
    return (four - two) / 2


def full_block(kernel: Kernel, slowness: float = 1.0) -> float:
    """Return the cycles of a block that every query sees."""
    return (period(kernel, 16, 0, slowness) - period(kernel, 8, 0, slowness)) / 8


class Speed(NamedTuple):
    """Cycles of a tile: ``tile + full * blocks + cut * blocks under a mask``."""

    tile: float
    full: float
    cut: float


def speed(kernel: Kernel) -> Speed:
    """Return what the simulation gives."""
    full = full_block(kernel)
    short, masked = period(kernel, 8), period(kernel, 8, 1)
    return Speed(short - 8 * full, full, masked - short)


def teraflops(kernel: Kernel, its: Speed, seqlen: int, heads: int, causal: bool) -> float:
    """Return TFLOP/s of ``heads`` heads of ``seqlen`` queries and keys; half of the operations
    count where the mask is causal. Full tiles are shared out evenly, so that some SMs have one
    more; causal ones start with the longest, and end together."""
    operations = 2 * seqlen * seqlen * (kernel.head_dim + kernel.head_dim_v) * heads
    tiles = math.ceil(seqlen / kernel.m)
    if not causal:
        blocks, rest = divmod(seqlen, kernel.n)
        cycles = its.tile + its.full * blocks + its.cut * (rest > 0)
        rounds = math.ceil(tiles * heads / SMS)
        return operations / (rounds * cycles) * GHZ / 1000
    cycles = 0.0
    for last_rows in range(kernel.m - ROWS, tiles * kernel.m, kernel.m):
        full = min(last_rows + 1, seqlen) // kernel.n
        end = min(last_rows + ROWS, seqlen)
        cycles += its.tile + its.full * full + its.cut * (math.ceil(end / kernel.n) - full)
    return operations / 2 / (heads * cycles / SMS) * GHZ / 1000
