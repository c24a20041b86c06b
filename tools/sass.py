"""Machine code of CUDA kernels as nvdisasm prints it, and the loops of its control flow."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

FATBIN_MAGIC = 0xBA55ED50
FATBIN_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of the header and after it
ENTRY_HEADER = struct.Struct("<HHIQ")  # kind, version, bytes of the header and after it
CUBIN = 2  # the kind
COMPRESSED = 0x2000 | 0x8000  # of an entry's flags: LZ4, zstd
FLAGS_AT = 40

FUNCTION = re.compile(r"\s*\.section\s+\.text\.([\w$]+),")
LABEL = re.compile(r"(\.L_x_\d+):")
INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]+\*/\s+(?:(?P<guard>@!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"\s*(?P<operands>.*?)\s*;"
)
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
LEAVES = {"EXIT", "RET", "KILL"}
JUMPS = {"BRA", "CALL"}
INDIRECT = {"BRX", "JMX", "JMP"}


class NoDisassembler(FileNotFoundError):
    """There is no nvdisasm."""


class Instruction(NamedTuple):
    """One line: ``@P0 BRA `(.L_x_3) ;`` has guard ``@P0`` and opcode ``BRA``."""

    guard: str
    opcode: str
    operands: str

    @property
    def root(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        """The label that it may jump to."""
        match = TARGET.search(self.operands) if self.root in JUMPS else None
        return match[1] if match else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. A jump's condition is its guard or an operand
        before the label."""
        if self.root in LEAVES:
            return bool(self.guard)
        return not self.target or bool(self.guard) or not self.operands.startswith("`")


class Loop(NamedTuple):
    """Blocks that a jump back to ``head`` closes: a natural loop."""

    head: int
    blocks: frozenset[int]


class Function:
    """A function's basic blocks. ``blocks``: lists of instructions in the order of addresses."""

    def __init__(self, name: str, instructions: list[Instruction], labels: dict[str, int]):
        self.name = name
        leaders = {0, *labels.values()}
        for i, instruction in enumerate(instructions):
            if instruction.root in INDIRECT:
                raise ValueError(f"{name}: {instruction.opcode} jumps to where no one can see")
            if instruction.target or instruction.root in LEAVES:
                leaders.add(i + 1)
        starts = sorted(start for start in leaders if start < len(instructions))
        self.blocks = [instructions[i:j] for i, j in zip(starts, [*starts[1:], len(instructions)])]
        self._block_of = {start: block for block, start in enumerate(starts)}
        self._labels = labels

    @cached_property
    def successors(self) -> list[set[int]]:
        """The blocks that may follow each block."""
        found = []
        for i, block in enumerate(self.blocks):
            last = block[-1]
            after = {i + 1} if last.falls_through and i + 1 < len(self.blocks) else set()
            if last.target in self._labels:
                after.add(self._block_of[self._labels[last.target]])
            found.append(after)
        return found

    @cached_property
    def predecessors(self) -> list[set[int]]:
        """The blocks that may come before each block."""
        found = [set() for _ in self.blocks]
        for i, after in enumerate(self.successors):
            for j in after:
                found[j].add(i)
        return found

    @cached_property
    def dominators(self) -> list[set[int]]:
        """The blocks through which every way from the entry to each block leads."""
        everything = set(range(len(self.blocks)))
        found = [{0}, *(everything for _ in self.blocks[1:])]
        changed = True
        while changed:
            changed = False
            for i in range(1, len(self.blocks)):
                before = [found[j] for j in self.predecessors[i]]
                new = {i} | set.intersection(*before) if before else {i}
                changed |= new != found[i]
                found[i] = new
        return found

    def is_back(self, i: int, j: int) -> bool:
        """Whether the edge from block ``i`` to block ``j`` closes a loop."""
        return j in self.dominators[i]

    def loops(self) -> list[Loop]:
        """Return the loops, one for each head."""
        bodies: dict[int, set[int]] = {}
        for i, after in enumerate(self.successors):
            for head in after:
                if self.is_back(i, head):
                    bodies.setdefault(head, {head}).update(self._reaching(i, head))
        return [Loop(head, frozenset(body)) for head, body in sorted(bodies.items())]

    def _reaching(self, block: int, head: int) -> set[int]:
        """Return the blocks from which ``block`` is reached without passing ``head``."""
        found, open_blocks = {head}, [block]
        while open_blocks:
            i = open_blocks.pop()
            if i not in found:
                found.add(i)
                open_blocks += self.predecessors[i]
        return found

    def inner_loops(self, opcodes: frozenset[str]) -> list[Loop]:
        """Return the innermost loops that hold an instruction of ``opcodes`` (roots)."""
        holding = [
            loop
            for loop in self.loops()
            if any(line.root in opcodes for i in loop.blocks for line in self.blocks[i])
        ]
        return [loop for loop in holding if not any(a.blocks < loop.blocks for a in holding)]

    def best_path(self, loop: Loop, value: Callable[[list], tuple]) -> list[Instruction]:
        """Return the instructions of one trip through ``loop``.

        Of all ways from its head back to it, the one with the largest sum of ``value(block)``, a
        tuple of numbers. Loops inside are gone through once at most.
        """

        @cache
        def search(i: int) -> tuple[tuple, list[int]] | None:
            mine = value(self.blocks[i])
            onward = (j for j in self.successors[i] & loop.blocks if not self.is_back(i, j))
            ways = [way for way in map(search, onward) if way]
            if loop.head in self.successors[i]:
                ways.append(((0,) * len(mine), []))
            if not ways:
                return None
            total, blocks = max(ways)
            return tuple(map(sum, zip(mine, total))), [i, *blocks]

        _, blocks = search(loop.head)
        return [line for i in blocks for line in self.blocks[i]]


def parse(text: str) -> list[Function]:
    """Return the functions of nvdisasm's output."""
    functions = []
    sections = re.split(r"(?m)^(?=\s*\.section\s+\.text\.)", text)
    for section in sections:
        match = FUNCTION.match(section)
        if match:
            instructions, labels = [], {}
            for line in section.splitlines():
                if label := LABEL.match(line):
                    labels[label[1]] = len(instructions)
                elif found := INSTRUCTION.match(line):
                    guard, opcode, operands = found.group("guard", "opcode", "operands")
                    instructions.append(Instruction(guard or "", opcode, operands))
            functions.append(Function(match[1], instructions, labels))
    return functions


def cubins(data: bytes) -> Iterator[bytes]:
    """Yield the machine code in fatbins: in a file of its own, or anywhere in a library."""
    magic = FATBIN_MAGIC.to_bytes(4, "little")
    start = data.find(magic)
    while start >= 0:
        _, version, header, size = FATBIN_HEADER.unpack_from(data, start)
        end = start + header + size
        if version == 1 and header == FATBIN_HEADER.size and end <= len(data):
            yield from _entries(data[start + header : end])
            start = end - 1
        start = data.find(magic, start + 1)


def _entries(body: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(body):
        kind, _, header, size = ENTRY_HEADER.unpack_from(body, at)
        (flags,) = struct.unpack_from("<Q", body, at + FLAGS_AT)
        if kind == CUBIN:
            if flags & COMPRESSED:
                raise ValueError("the fatbin's machine code is compressed")
            yield body[at + header : at + header + size]
        at += header + size


def find_nvdisasm() -> Path:
    """Return nvdisasm of this Python environment, of ``PATH`` or of a CUDA toolkit.

    Raises ``NoDisassembler`` if there is none.
    """
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    toolkits = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    for folder in (*packages.glob("cu*/bin"), None, *toolkits):
        found = shutil.which("nvdisasm", path=folder)
        if found:
            return Path(found)
    raise NoDisassembler(
        "nvdisasm is neither in this Python environment nor on PATH nor in a CUDA toolkit: "
        "pip install nvidia-cuda-nvdisasm (tools/constraints-dev.txt has the version)"
    )


def disassemble(cubin: bytes) -> list[Function]:
    """Return the functions of ``cubin``."""
    nvdisasm = find_nvdisasm()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [nvdisasm, "--print-code", path]
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return parse(finished.stdout)
