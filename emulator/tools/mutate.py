"""Mutation test of the synchronisation in CUDA kernels, on the emulated GPU.

    python mutate.py CASE.py [--library libgpu_emulator.so] [--kernel NAME] [--seeds N]

CASE.py defines ``run() -> bool``: it launches kernels through the CUDA driver that the emulator's
library is, and says whether their results are right; an exception counts as a report. First it runs
as it is, with all checks, and must pass in every mode. Then each synchronising instruction that it
executed (barriers, fences, waits, commits, mbarrier operations, bar.warp.sync) is left out in
turn (a wait for an mbarrier is made to find its phase complete), and it runs again: eager, late and
in random schedules of several seeds. A deletion that no run notices, by a report or by a wrong
result, must stand in the list of equivalent ones, CASE.equivalent beside CASE.py, with the reason:

    cp.async.commit_group #3 of flash_fwd: the last group holds no copy

which names the instruction by its text without operands and its number among those of its kind in
the kernel, in order of the PTX. Exit status 0: every deletion was noticed or is listed, and every
listed one was not noticed.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import importlib.util
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

DEFAULT_LIBRARY = os.environ.get("GPU_EMULATOR_LIBRARY", "libgpu_emulator.so")
SYNCHRONISING = re.compile(
    r"(bar|barrier)\.|bar\.warp\.sync|fence|membar|mbarrier\.(?!init|inval|pending)"
    r"|cp\.async\.(wait|commit|mbarrier|bulk\.(wait|commit))|wgmma\.(fence|commit|wait)"
    r"|griddepcontrol|setmaxnreg"
)


@dataclass(frozen=True)
class Mode:
    name: str
    seed: int = 0

    def __str__(self) -> str:
        return self.name if self.name != "random" else f"random seed {self.seed}"


@dataclass(frozen=True)
class Mutant:
    kernel: str
    line: int
    opcode: str
    number: int  # among those with this opcode in the kernel
    instead: str  # the text that takes its place

    @property
    def key(self) -> str:
        return f"{self.opcode} #{self.number} of {self.kernel}"


class Emulator:
    """Options and counters of one device of the emulator's library in this process."""

    def __init__(self, library: str, device: int):
        self._library = ctypes.CDLL(library)
        self._device = device

    def set(self, **options) -> None:
        for name, value in options.items():
            status = self._library.gpuEmulatorSetOption(
                self._device, name.encode(), str(value).encode()
            )
            if status:
                raise ValueError(f"the emulator does not take {name}={value}")

    def report(self) -> str:
        return self._text(self._library.gpuEmulatorLastReport)

    def counters(self) -> dict:
        return json.loads(self._text(self._library.gpuEmulatorCounters))

    def reset_counters(self) -> None:
        self._library.gpuEmulatorResetCounters(self._device)

    def _text(self, function) -> str:
        function.restype = ctypes.c_size_t
        size = function(self._device, None, ctypes.c_size_t(0))
        text = ctypes.create_string_buffer(size + 1)
        function(self._device, text, ctypes.c_size_t(size + 1))
        return text.value.decode()


def without_wait(text: str) -> str:
    """A wait for an mbarrier's phase that finds it complete."""
    predicate = re.search(r"_wait\S*\s+([^,\s]+)", text).group(1)
    return f"setp.eq.s32 {predicate}, 0, 0;"


def find_mutants(counters: dict, kernel: Optional[str]) -> list[Mutant]:
    """One for each synchronising instruction that was executed."""
    mutants = []
    for name, of_kernel in counters.items():
        if kernel and not re.search(kernel, name):
            continue
        seen = collections.Counter()
        for line in sorted(of_kernel["lines"], key=lambda entry: entry["line"]):
            text = re.sub(r"^(@!?%\w+\s+)", "", line["text"].strip())
            opcode = re.split(r"[\s;]", text)[0]
            if not SYNCHRONISING.match(opcode):
                continue
            seen[opcode] += 1
            instead = without_wait(line["text"]) if "_wait.parity" in opcode else ""
            mutants.append(Mutant(name, line["line"], opcode, seen[opcode], instead))
    return mutants


def attempt(case, emulator: Emulator, mode: Mode, kernel: str = "", lines="") -> Optional[str]:
    """What was noticed with other ``lines`` of a kernel, "NUMBER TEXT" each; None: nothing."""
    emulator.set(mode=mode.name, seed=mode.seed, replace_lines=lines, delete_in=kernel)
    try:
        right = case.run()
    except Exception as error:
        report = emulator.report() or str(error)
        return report.splitlines()[0][:100]
    finally:
        emulator.set(replace_lines="")
    return None if right else "wrong result"


def read_equivalents(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    entries = [line.split(": ", 1) for line in path.read_text().splitlines() if ": " in line]
    return {key.strip(): reason.strip() for key, reason in entries if not key.startswith("#")}


def load_case(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def run_mutants(case, emulator: Emulator, mutants: list[Mutant], modes: list[Mode]) -> list[Mutant]:
    """Prints what noticed each; returns those that nothing noticed."""
    survivors = []
    by_mode = collections.Counter()
    for mutant in mutants:
        noticed = None
        for mode in modes:
            lines = f"{mutant.line} {mutant.instead}"
            noticed = attempt(case, emulator, mode, mutant.kernel, lines)
            if noticed:
                by_mode[str(mode)] += 1
                print(f"  line {mutant.line}: {mutant.key}: {mode}: {noticed}", flush=True)
                break
        if not noticed:
            survivors.append(mutant)
            print(f"  line {mutant.line}: {mutant.key}: not noticed", flush=True)
    print("first noticed by:", ", ".join(f"{mode} {n}" for mode, n in by_mode.items()))
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", type=Path)
    parser.add_argument("--library", default=DEFAULT_LIBRARY)
    parser.add_argument("--device", type=int, help="0: sm_80, 1: sm_90a, 2: sm_86; else the case's")
    parser.add_argument("--kernel", help="regular expression: only kernels of such names")
    parser.add_argument("--seeds", type=int, default=2, help="random schedules")
    arguments = parser.parse_args()

    os.environ["GPU_EMULATOR_LIBRARY"] = arguments.library
    case = load_case(arguments.case)
    device = getattr(case, "DEVICE", 0) if arguments.device is None else arguments.device
    emulator = Emulator(arguments.library, device)
    emulator.set(checks="all", max_instructions=2_000_000)
    modes = [Mode("eager"), Mode("late"), *(Mode("random", s + 1) for s in range(arguments.seeds))]
    emulator.set(count=1)
    emulator.reset_counters()
    for mode in modes:
        noticed = attempt(case, emulator, mode)
        if noticed:
            print(f"the case fails as it is, {mode}: {noticed}\n{emulator.report()}")
            return 2
    mutants = find_mutants(emulator.counters(), arguments.kernel)
    emulator.set(count=0)
    begin = time.monotonic()
    survivors = run_mutants(case, emulator, mutants, modes)
    listed = read_equivalents(arguments.case.with_suffix(".equivalent"))
    unlisted = [m for m in survivors if m.key not in listed]
    survived = {m.key for m in survivors}
    stale = [key for key in listed if key not in survived]
    print(
        f"{len(mutants)} deletions, {len(mutants) - len(survivors)} noticed, "
        f"{len(survivors) - len(unlisted)} equivalent, {len(unlisted)} not noticed, "
        f"{time.monotonic() - begin:.0f} s"
    )
    for key in stale:
        print(f"listed as equivalent, but noticed or not there: {key}")
    return 1 if unlisted or stale or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
