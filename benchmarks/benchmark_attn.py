"""Speed of this package beside PyTorch's scaled_dot_product_attention and plain softmax attention.

    python benchmarks/benchmark_attn.py              # --quick, a fixed selection of cases
    python benchmarks/benchmark_attn.py --op fwd bwd --dtype bfloat16 --seqlen 1024 4096
    python benchmarks/benchmark_attn.py --op decode --nheads 32 --nheads-k 8 --seqlen 8192

Every combination of the options is a case. Within a case the peers take turns, and the medians are
compared. Writes attention.csv and attention.png into --out; README.md beside this file describes
the columns.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import os
import sys
from pathlib import Path

import machine
import torch
from cases import DTYPES, OPS, Case, make_inputs
from peers import PEERS
from refcheck import RefCheck
from timing import median, take_turns

from flash_attn import _library

CASE_COLUMNS = (
    "op",
    "dtype",
    "batch",
    "seqlen_q",
    "seqlen_k",
    "nheads",
    "nheads_k",
    "headdim",
    "headdim_v",
    "causal",
)
RESULT_COLUMNS = (
    "peer",
    "median_ms",
    "min_ms",
    "samples",
    "gflops",
    "ratio_to_sdpa",
    "error_ratio",
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--op", nargs="+", choices=OPS, help="without it: --quick")
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
    add("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    add("--threads", type=int, help="threads of all peers (default: PyTorch's choice)")
    add("--isa", help="instruction set of this package's kernels (default: the best)")
    add("--budget", type=float, default=3.0, help="seconds a case")
    add("--max-plain-gib", type=float, default=1.0, help="largest score matrix of plain attention")
    add("--refcheck", action="store_true", help="compare with fp64 first; exit 1 on a mismatch")
    add("--quick", action="store_true", help="a fixed selection of cases, under three minutes")
    add("--out", type=Path, default=Path("build/bench"), help="directory of the CSV and PNG files")
    options = parser.parse_args(argv)
    options.quick = options.quick or not options.op
    return options


def _case(op, dtype, batch, seqlen, nheads, nheads_k, headdim, headdim_v, causal) -> Case:
    return Case(
        op=op,
        dtype=dtype,
        batch=batch,
        seqlen_q=1 if op == "decode" else seqlen,
        seqlen_k=seqlen,
        nheads=nheads,
        nheads_k=nheads_k or nheads,
        headdim=headdim,
        headdim_v=headdim_v or headdim,
        causal=bool(causal),
    )


def quick_cases() -> list[Case]:
    """The selection that ``make bench`` runs."""
    dense = itertools.product(("fwd", "bwd"), DTYPES, (64, 128), (False, True))
    cases = [_case(op, dtype, 1, 2048, 8, 8, d, d, causal) for op, dtype, d, causal in dense]
    for dtype in DTYPES:
        cases.append(_case("decode", dtype, 4, 4096, 32, 8, 128, 128, False))
        cases.append(_case("varlen", dtype, 8, 1024, 8, 8, 64, 64, True))
    return cases


def make_cases(options: argparse.Namespace) -> list[Case]:
    """All combinations of the options; a causal decode is a decode, and listed once."""
    if options.quick:
        return quick_cases()
    cases = []
    for op in options.op:
        causal = options.causal if op != "decode" else [0]
        for dtype, batch, nheads, d, c, seqlen in itertools.product(
            options.dtype, options.batch, options.nheads, options.headdim, causal, options.seqlen
        ):
            shape = (batch, seqlen, nheads, options.nheads_k, d, options.headdim_v)
            cases.append(_case(op, dtype, *shape, c))
    return cases


@functools.cache
def warm_up(op: str, dtype: str, peer: str) -> None:
    """Pay once for what a process pays once: loading code, starting threads."""
    small = _case(op, dtype, 1, 32, 2, 2, 16, 16, False)
    PEERS[peer](small, make_inputs(small))()


def measure(case: Case, options: argparse.Namespace) -> list[dict]:
    """Rows of one case, one a peer. A failed --refcheck shows as an error_ratio above 1."""
    inputs = make_inputs(case)
    names = list(options.peers)
    if options.quick and case.dtype != "float32" and "plain" in names:
        names.remove("plain")  # seconds a call on CPUs without half-precision instructions
    if case.score_bytes() > options.max_plain_gib * 2**30 and "plain" in names:
        names.remove("plain")
    for name in names:
        warm_up(case.op, case.dtype, name)
    runs = {name: PEERS[name](case, inputs) for name in names}
    errors = {}
    if options.refcheck:
        check = RefCheck(case, inputs)
        errors = {name: check.ratio(run()) for name, run in runs.items()}
    samples = take_turns(runs, options.budget)
    sdpa_seconds = median(samples["sdpa"]) if "sdpa" in samples else None
    rows = []
    for name, seconds in samples.items():
        row = {column: getattr(case, column) for column in CASE_COLUMNS}
        row |= {
            "causal": int(case.causal),
            "peer": name,
            "median_ms": round(median(seconds) * 1e3, 4),
            "min_ms": round(min(seconds) * 1e3, 4),
            "samples": len(seconds),
            "gflops": round(case.flops() / median(seconds) / 1e9, 2),
            "ratio_to_sdpa": round(sdpa_seconds / median(seconds), 3) if sdpa_seconds else "",
            "error_ratio": f"{errors[name]:.3g}" if name in errors else "",
        }
        rows.append(row)
    return rows


def format_rows(case: Case, rows: list[dict]) -> str:
    """One line of the printed table."""
    cells = []
    for row in rows:
        ratio = f" ({row['ratio_to_sdpa']:.2f}x)" if row["ratio_to_sdpa"] else ""
        error = f" err {row['error_ratio']}" if row["error_ratio"] else ""
        cells.append(f"{row['peer']} {row['median_ms']:9.3f} ms {row['gflops']:7.1f}{ratio}{error}")
    return f"{case!s:52} | " + " | ".join(cells)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write all rows with the machine's columns."""
    with path.open("w", newline="") as file:
        columns = machine.describe()
        writer = csv.DictWriter(file, (*CASE_COLUMNS, *RESULT_COLUMNS, *columns))
        writer.writeheader()
        writer.writerows(row | columns for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write. Returns 1 if this package's results failed --refcheck."""
    options = parse_arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.isa:
        _library.set_cpu_isa(options.isa)
    options.out.mkdir(parents=True, exist_ok=True)
    print(machine.summary())
    print("median ms, GFLOP/s (causal: half), (speed relative to sdpa)")
    rows = []
    for case in make_cases(options):
        rows += (case_rows := measure(case, options))
        print(format_rows(case, case_rows), flush=True)
    write_csv(options.out / "attention.csv", rows)
    print(f"wrote {os.path.relpath(options.out / 'attention.csv')}")
    from figures import save_benchmark  # matplotlib is needed for the picture alone

    if (
        figure := save_benchmark(rows, machine.summary(), options.out / "attention.png")
    ) is not None:
        print(f"wrote {os.path.relpath(figure)}")
    wrong = [r for r in rows if r["peer"] == "flash_attn" and float(r["error_ratio"] or 0) > 1]
    for row in wrong:
        print(f"refcheck failed: {row}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
