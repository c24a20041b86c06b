"""Speed of this package beside PyTorch's attention, other libraries and the machine's limits.

    python benchmarks/benchmark_attn.py              # --grid quick, a fixed selection of cases
    python benchmarks/benchmark_attn.py --grid full  # everything, 15 minutes
    python benchmarks/benchmark_attn.py --op fwd bwd --dtype bfloat16 --seqlen 1024 4096
    python benchmarks/benchmark_attn.py --op decode --nheads 32 --nheads-k 8 --seqlen 8192

With --op, every combination of the options is a case. Within a case the peers take turns, and the
medians are compared. Writes attention.csv and pictures into --out; README.md beside this file
describes the columns.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

import machine
import torch
from cases import grids
from cases.case import DTYPES, OPS, Case
from cases.grids import GRIDS
from measuring.measure import Budget, Measurement, format_rows, measure
from measuring.table import machine_of, read_csv, write_csv
from peers.versions import versions
from reports.figures import save_benchmark
from reports.grid_figures import save_grid

from flash_attn import _library

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "build" / "bench"
GRID_SECONDS = {"quick": 170.0, "full": 880.0}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--grid", choices=list(GRIDS), help="a fixed selection of cases; without --op: quick")
    add("--quick", dest="grid", action="store_const", const="quick", help="--grid quick")
    add("--op", nargs="+", choices=OPS, help="cases of the options below")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    add("--batch", nargs="+", type=int, default=[1])
    add(
        "--seqlen",
        nargs="+",
        type=int,
        default=[2048],
        help="of keys, and of queries but in decode",
    )
    add("--nheads", nargs="+", type=int, default=[8])
    add("--nheads-k", type=int, help="key-value heads (default: as many as query heads)")
    add("--headdim", nargs="+", type=int, default=[64])
    add("--headdim-v", type=int, help="of the values (default: as --headdim)")
    add("--causal", nargs="+", type=int, choices=(0, 1), default=[0, 1])
    add("--window", type=int, default=0, help="keys before its own that a causal query sees")
    add("--page-size", nargs="+", type=int, default=[0], help="of decode's cache; 0: not paged")
    add("--peers", nargs="+", help="default: flash_attn sdpa plain; a grid: all (README.md)")
    add("--threads", type=int, help="threads of all peers (default: PyTorch's choice)")
    add("--isa", help="instruction set of this package's kernels (default: the best)")
    add("--budget", type=float, help="seconds for all cases (default: without --op, 170 or 880)")
    add("--case-seconds", type=float, help="seconds a case (default 3; in a grid 1)")
    add("--max-plain-gib", type=float, default=1.0, help="largest score matrix held in memory")
    add("--refcheck", action="store_true", help="compare with fp64 first; exit 1 on a mismatch")
    add("--out", type=Path, help="directory of the files (default: build/bench; a grid: below it)")
    options = parser.parse_args(argv)
    if not options.op:
        options.grid = options.grid or "quick"
        options.budget = options.budget or GRID_SECONDS[options.grid]
    options.case_seconds = options.case_seconds or (1.0 if options.grid else 3.0)
    return options


def make_cases(options: argparse.Namespace) -> list[Case]:
    """The grid's cases, or all combinations of the options; a causal decode is listed once."""
    if options.grid:
        return GRIDS[options.grid]()
    cases = []
    for op in options.op:
        decode = op == "decode"
        for dtype, batch, nheads, d, causal, page_size, seqlen in itertools.product(
            options.dtype,
            options.batch,
            options.nheads,
            options.headdim,
            [0] if decode else options.causal,
            options.page_size if decode else [0],
            options.seqlen,
        ):
            window = options.window if causal and not decode else 0
            more = {"headdim_v": options.headdim_v or d, "window": window, "page_size": page_size}
            heads = (nheads, options.nheads_k or nheads)
            cases.append(grids.case(op, dtype, batch, seqlen, *heads, d, bool(causal), **more))
    return cases


def run_cases(options: argparse.Namespace) -> list[dict]:
    """Measure all cases, print each; the rows of the table."""
    budget = Budget(options.budget, options.case_seconds, options.max_plain_gib)
    rows = []
    for case in make_cases(options):
        names = options.peers or (
            grids.peers_of(case) if options.grid else ("flash_attn", "sdpa", "plain")
        )
        result: Measurement = measure(case, names, budget, options.refcheck)
        for note in result.notes:
            print(f"  {note}")
        if result.rows:
            print(format_rows(case, result.rows), flush=True)
        rows += result.rows
    return rows


def draw(table: Path, is_grid: bool) -> list[Path]:
    """The pictures of attention.csv; without matplotlib none."""
    rows = read_csv(table)
    if is_grid:
        return save_grid(rows, table.parent)
    path = save_benchmark(rows, machine_of(rows[0]), table.with_suffix(".png")) if rows else None
    return [path] if path else []


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if this package's results failed a check."""
    options = parse_arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.isa:
        _library.set_cpu_isa(options.isa)
    options.out = options.out or DEFAULT_OUT / (machine.slug() if options.grid else "")
    options.out.mkdir(parents=True, exist_ok=True)
    used = versions(options.peers or (grids.RIVALS if options.grid else ()))
    print(machine.summary() + (f"; {used}" if used else ""))
    print("median ms, GFLOP/s (causal: half), (speed relative to sdpa)")
    started = time.perf_counter()
    rows = run_cases(options)
    print(f"{time.perf_counter() - started:.0f} s")
    table = options.out / "attention.csv"
    write_csv(table, rows)
    for path in [table, *draw(table, bool(options.grid))]:
        print(f"wrote {os.path.relpath(path)}")
    wrong = [r for r in rows if r["peer"] == "flash_attn" and float(r["error_ratio"] or 0) > 1]
    wrong += [r for r in rows if r["peer"] == "sdpa" and float(r["difference"] or 0) > 1]
    for row in wrong:
        print(f"check failed: {row}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
