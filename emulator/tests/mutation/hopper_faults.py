"""Faults planted into the forward kernels of csrc/flash_attn/src/hopper: which modes of the
emulated GPU notice them?

    python hopper_faults.py libgpu_emulator.so

prints a JSON object: for each of FAULTS what each mode that noticed it said.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import mutate

SWIZZLE_SHIFT = 62  # of a wgmma descriptor's swizzle mode: 1 is 128 bytes, 2 is 64


class Kernel:
    """The executed lines of a kernel's PTX."""

    def __init__(self, lines: list[dict]):
        self.lines = sorted(lines, key=lambda line: line["line"])

    def find(self, pattern: str, first: int = 0) -> list[int]:
        """Places in ``lines`` of what matches, from ``first`` on."""
        lines = self.lines[first:]
        return [first + i for i, line in enumerate(lines) if re.search(pattern, line["text"])]

    def replace(self, place: int, change: Callable[[str], str]) -> str:
        """The tool's "NUMBER TEXT"."""
        line = self.lines[place]
        return f"{line['line']} {change(line['text'].strip())}"


def _operand(text: str, index: int) -> str:
    return re.sub(r"\[.*?\]", "m", text.rstrip(";").split(None, 1)[1]).split(",")[index].strip()


def _with_operand(index: int, change: str, back: str) -> Callable[[str], str]:
    """The instruction with an operand that is changed before and restored behind it."""

    def apply(text):
        register = _operand(text, index)
        before, after = (f"{op.format(r=register)};" for op in (change, back))
        return f"{before} {text} {after}"

    return apply


def _first_product(kernel: Kernel) -> int:
    return kernel.find(r"wgmma\.mma_async")[0]


def wrong_phase(kernel: Kernel) -> str:
    """The last wait for a full slot of K before a product waits for the other parity."""
    (*_, wait) = [i for i in kernel.find(r"try_wait") if i < _first_product(kernel)]
    flip = "xor.b32 {r}, {r}, 1"
    return kernel.replace(wait, _with_operand(2, flip, flip))


def missing_proxy_fence(kernel: Kernel) -> str:
    """What warps have written of O is stored by TMA."""
    store = kernel.find(r"bulk\.tensor\.4d\.global")[0]
    fences = [i for i in kernel.find(r"fence\.proxy\.async") if i < store]
    return kernel.replace(fences[-1], lambda text: "")


def wrong_swizzle(kernel: Kernel) -> str:
    """All descriptors of the first kind have the next swizzle mode."""
    constant = r"or\.b64.*, (-?\d{15,});"
    first = kernel.find(constant)[0]
    value = int(re.search(constant, kernel.lines[first]["text"]).group(1))
    other = value + (1 << SWIZZLE_SHIFT)
    signed = other - (1 << 64) if other >= 1 << 63 else other
    places = kernel.find(f", {value};")
    return "\n".join(
        kernel.replace(i, lambda text: text.replace(str(value), str(signed))) for i in places
    )


def _expects(kernel: Kernel, more: int) -> str:
    place = kernel.find(r"arrive\.expect_tx")[1]  # of K
    return kernel.replace(
        place, _with_operand(2, f"add.s32 {{r}}, {{r}}, {more}", f"sub.s32 {{r}}, {{r}}, {more}")
    )


def expects_too_many_bytes(kernel: Kernel) -> str:
    return _expects(kernel, 16)


def expects_too_few_bytes(kernel: Kernel) -> str:
    return _expects(kernel, -16)


def released_before_the_product_is_done(kernel: Kernel) -> str:
    """Of K: one group may be under way still."""
    wait = kernel.find(r"wgmma\.wait_group", _first_product(kernel))[0]
    return kernel.replace(wait, lambda text: text.replace(" 0;", " 1;"))


def output_overwritten_before_it_is_read(kernel: Kernel) -> str:
    """All of the waits for TMA's reads of O let one group go on."""
    waits = kernel.find(r"bulk\.wait_group\.read")
    return "\n".join(kernel.replace(i, lambda text: re.sub(r" 0;", " 1;", text)) for i in waits)


FAULTS = (
    wrong_phase,
    missing_proxy_fence,
    wrong_swizzle,
    expects_too_many_bytes,
    expects_too_few_bytes,
    released_before_the_product_is_done,
    output_overwritten_before_it_is_read,
)


def main() -> None:
    os.environ["GPU_EMULATOR_LIBRARY"] = library = sys.argv[1]
    case = mutate.load_case(Path(__file__).with_name("hopper_fwd.py"))
    emulator = mutate.Emulator(library, case.DEVICE)
    emulator.set(checks="all", max_instructions=2_000_000, count=1)
    emulator.reset_counters()
    modes = [mutate.Mode("eager"), mutate.Mode("late"), mutate.Mode("random", 1)]
    assert mutate.attempt(case, emulator, modes[0]) is None
    kernels = emulator.counters()
    emulator.set(count=0)
    ((name, counters),) = kernels.items()
    kernel = Kernel(counters["lines"])
    report = {}
    for fault in FAULTS:
        found = {str(m): mutate.attempt(case, emulator, m, name, fault(kernel)) for m in modes}
        report[fault.__name__] = {mode: said for mode, said in found.items() if said}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
