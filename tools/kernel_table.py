"""The tables of docs/cuda.md and docs/hopper.md.

`kernels`: what ptxas told the build of the CUDA kernels. `pipes`: what the inner loop of their
machine code asks of an SM. `counters`: what they do on the emulated GPU. `tiles`, `loops`, `speed`
(hopper_table.py): the sm_90a kernels' tiles, what their loops ask of an SM, and how fast that makes
them.

    python tools/kernel_table.py build/release/cuda/kernels.csv            # rewrite all
    python tools/kernel_table.py build/release/cuda/kernels.csv --print pipes
    python tools/kernel_table.py build/release/cuda/kernels.csv --only tiles loops speed

The fatbins lie beside kernels.csv. All but `kernels` and `counters` need nvdisasm. The package must
be importable, for `counters` with the emulated GPU beside it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hopper_table
import sass
import sm_pipes
import torch
import warpgroups
from markdown_table import alike, markdown

import flash_attn

DOCUMENTS = Path(__file__).resolve().parent.parent / "docs"


def section(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between the two marks of ``name``."""
    begin = f"<!-- {name}: made by tools/kernel_table.py -->\n"
    end = f"<!-- end of {name} -->\n"
    head, rest = text.split(begin)
    return head + begin + content + end + rest.split(end)[1]


def resources(path: Path) -> str:
    """Return the table of a build's kernels.csv."""
    rows = []
    with path.open() as file:
        for row in csv.DictReader(file):
            spilled = int(row["spill_stores"]) + int(row["spill_loads"])
            kib = round(int(row["bytes"]) / 1024)
            rows.append([f"`{row['kernel']}`", row["registers"], row["stack"], spilled, kib])
    return markdown(["kernel", "registers", "stack, bytes", "spilled, bytes", "fatbin, KiB"], rows)


def cells(trip: sm_pipes.Trip) -> list[str]:
    """Return a trip's instructions, with the cycles that they keep a pipe busy, and its bounds."""
    cycles = trip.cycles("8.0")
    counts = [f"{trip.counts[column]}" for column in sm_pipes.COLUMNS]
    busy = [f" ({cycles[column]})" if column in cycles else "" for column in sm_pipes.COLUMNS]
    bounds = [sm_pipes.bound(trip.cycles(capability)) for capability in sm_pipes.RATES]
    return [*map("".join, zip(counts, busy)), str(cycles["issue"]), *bounds]


def functions(path: Path, prefix: str = "") -> Iterator[sass.Function]:
    """Yield the machine code of the kernels of a build's kernels.csv that are called so."""
    with path.open() as file:
        for row in csv.DictReader(file):
            if not row["kernel"].startswith(prefix):
                continue
            fatbin = path.with_name(f"{row['kernel']}.fatbin").read_bytes()
            for cubin in sass.cubins(fatbin):
                yield from sass.disassemble(cubin)


@cache
def hopper(path: Path) -> list[warpgroups.Kernel]:
    """Return the loops of the sm_90a kernels of a build's kernels.csv."""
    return [warpgroups.read(function) for function in functions(path, warpgroups.PREFIX)]


def machine_code(path: Path) -> str:
    """Return the table of what a build's kernels ask of the pipes."""
    rows = [
        [f"`{function.name}`", block, *cells(trip)]
        for function in functions(path)
        for block, trip in sm_pipes.trips(function)
    ]
    bounds = [f"bound, {capability}" for capability in sm_pipes.RATES]
    return markdown(["kernel", "block", *sm_pipes.COLUMNS, "issued", *bounds], alike(rows))


HEADDIMS = (
    (32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (576, 512),
)  # fmt: skip
CALLS = {
    "none": lambda n: {},
    "causal": lambda n: {"causal": True},
    "softcap": lambda n: {"softcap": 30.0},
    "ALiBi": lambda n: {"alibi_slopes": torch.ones(1)},
    "bias": lambda n: {"attn_bias": torch.zeros(256, n)},
    "dropout": lambda n: {"dropout_p": 0.1},
}


BACKWARD_CALLS = {
    "none": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 30.0},
    "dropout": {"dropout_p": 0.1},
}


def launch(headdims: tuple[int, int], call: str, seqlen_k: int) -> tuple[str, dict]:
    """Return the kernel and the counters of one head of 256 queries over ``seqlen_k`` keys."""
    d, dv = headdims
    q, k, v = (torch.randn(1, n, 1, d).bfloat16() for n in (256, seqlen_k, seqlen_k))
    with flash_attn.emulator(checks="none") as gpu:
        flash_attn.flash_attn_func(q, k, v[..., :dv], **CALLS[call](seqlen_k))
    ((name, kernel),) = gpu.counters.items()
    return name, kernel


def launch_backward(headdims: tuple[int, int], call: str, seqlen: int) -> tuple[str, dict]:
    """Return the main kernel and the counters of the backward of ``seqlen`` queries and keys. One
    CTA runs after the other, so that none waits for its turn."""
    d, _ = headdims
    q, k, v = (torch.randn(1, seqlen, 1, d).bfloat16().requires_grad_() for _ in "qkv")
    with flash_attn.emulator(checks="none", threads=1) as gpu:
        out = flash_attn.flash_attn_func(q, k, v, **BACKWARD_CALLS[call])
        out.backward(torch.randn_like(out))
    ((name, kernel),) = (x for x in gpu.counters.items() if x[0].startswith("flash_bwd_sm80_"))
    return name, kernel


def work(kernel: dict) -> tuple[int, int]:
    """Return a launch's mma and its warp instructions without moves."""
    return sum(kernel["tensor"].values()), kernel["warp_instructions"] - kernel["classes"]["move"]


def costs(run, headdims: tuple[int, int], call: str) -> list:
    """Return a row of the table of counters; the difference of two lengths is the loop's."""
    _, short = run(headdims, call, 512)
    name, long = run(headdims, call, 1024)
    (mma, instructions), (more_mma, more) = work(short), work(long)
    shared, memory = long["shared"], long["global"]
    return [
        f"`{name}`",
        call,
        more_mma,
        f"{(more - instructions) / (more_mma - mma):.2f}",
        f"{more / more_mma:.2f}",
        f"{shared['wavefronts']} of {shared['ideal_wavefronts']}",
        f"{memory['sectors']} of {memory['ideal_sectors']}",
    ]


def counters() -> str:
    """Return the table of what the kernels do."""
    torch.manual_seed(0)
    rows = [costs(launch, *x) for x in itertools.product(HEADDIMS, CALLS)]
    backward = [x for x in HEADDIMS if x[0] == x[1]]
    rows += [costs(launch_backward, *x) for x in itertools.product(backward, BACKWARD_CALLS)]
    header = [
        "kernel",
        "scores",
        "mma",
        "instructions for each, loop",
        "instructions for each, launch",
        "shared wavefronts, of the fewest",
        "global sectors, of the fewest",
    ]
    return markdown(header, rows)


# By document. The parts of machine code that tables share are read once.
TABLES = {
    "cuda.md": {
        "kernels": resources,
        "pipes": machine_code,
        "counters": lambda path: counters(),
    },
    "hopper.md": {
        "tiles": lambda path: hopper_table.tiles(hopper(path)),
        "loops": lambda path: hopper_table.loops(hopper(path)),
        "speed": lambda path: hopper_table.speeds(hopper(path)),
    },
}
MAKERS = {name: make for tables in TABLES.values() for name, make in tables.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="kernels.csv of a build")
    parser.add_argument(
        "--print",
        nargs="*",
        choices=MAKERS,
        help="these, or all, to the terminal, not into the files",
    )
    parser.add_argument("--only", nargs="+", choices=MAKERS, help="rewrite these and no others")
    options = parser.parse_args()
    names = options.print or options.only or MAKERS
    try:
        tables = {name: MAKERS[name](options.csv) for name in names}
    except sass.NoDisassembler as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if options.print is not None:
        print("\n".join(tables.values()), end="")
        return 0
    for document, makers in TABLES.items():
        path = DOCUMENTS / document
        text = path.read_text()
        for name in makers.keys() & tables.keys():
            text = section(text, name, tables[name])
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
