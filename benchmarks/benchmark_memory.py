"""Peak memory of forward and backward beyond what was there before, measured in a fresh process.

    python benchmarks/benchmark_memory.py            # (1, 32768, 8, 64) in bf16
    python benchmarks/benchmark_memory.py --seqlen 512 2048 --dtype float32 --peers flash_attn plain

The tensors that must exist afterwards are out, softmax_lse, dq, dk and dv: "ratio" relates the peak
to them. "ratio with dout" counts dout, which exists before the backward and is made before the
measurement, on both sides. Writes memory.csv into --out.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import subprocess
import sys
from pathlib import Path

COLUMNS = (
    "peer",
    "dtype",
    "batch",
    "seqlen_k",
    "nheads",
    "headdim",
    "causal",
    "extra_mib",
    "must_exist_mib",
    "ratio",
    "ratio_with_dout",
)
_M_MMAP_THRESHOLD = -3


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seqlen", nargs="+", type=int, default=[32768])
    add("--batch", type=int, default=1)
    add("--nheads", type=int, default=8)
    add("--headdim", type=int, default=64)
    add("--dtype", default="bfloat16")
    add("--causal", type=int, choices=(0, 1), default=1)
    add("--peers", nargs="+", default=["flash_attn"])
    add("--max-plain-gib", type=float, default=1.0, help="largest score matrix of plain attention")
    add("--out", type=Path, default=Path("build/bench"))
    add("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_extra_bytes(run) -> int:
    """How far the resident memory rises above its level before, while ``run()`` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present level
    before = _status_kib("VmRSS")
    result = run()
    peak = _status_kib("VmHWM")
    del result
    return (peak - before) * 1024


def measure(case, peer: str) -> dict:
    """A row of the table for one peer and case."""
    from cases.case import make_inputs
    from peers.registry import PEERS

    inputs = make_inputs(case)
    run = PEERS[peer](case, inputs)
    extra = peak_extra_bytes(run)
    itemsize = inputs.q.element_size()
    out = inputs.dout.numel() * itemsize
    lse = case.batch * case.nheads * case.seqlen_q * 4
    must_exist = out + lse + sum(x.numel() for x in (inputs.q, inputs.k, inputs.v)) * itemsize
    mib = 2**20
    return {
        "peer": peer,
        "dtype": case.dtype,
        "batch": case.batch,
        "seqlen_k": case.seqlen_k,
        "nheads": case.nheads,
        "headdim": case.headdim,
        "causal": int(case.causal),
        "extra_mib": round(extra / mib, 2),
        "must_exist_mib": round(must_exist / mib, 2),
        "ratio": round(extra / must_exist, 3),
        "ratio_with_dout": round((extra + out) / (must_exist + out), 3),
    }


def _warm_up(peer: str, dtype: str) -> None:
    """Load code and start threads, which cost memory once and not per call."""
    from cases.case import Case, make_inputs
    from peers.registry import PEERS

    small = Case("fwd_bwd", dtype, 1, 64, 64, 8, 8, 16, 16, True)
    PEERS[peer](small, make_inputs(small))()


def run_here(options: argparse.Namespace) -> None:
    """Measure all peers and lengths in this process, one CSV row a line on standard output."""
    from cases.case import Case

    # Freed blocks go back to the system at once, so that one measurement leaves the next nothing to
    # reuse.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    writer = csv.DictWriter(sys.stdout, COLUMNS)
    for peer in options.peers:
        _warm_up(peer, options.dtype)
        for seqlen in options.seqlen:
            heads, d = (options.nheads,) * 2, (options.headdim,) * 2
            shape = (options.batch, seqlen, seqlen, *heads, *d)
            case = Case("fwd_bwd", options.dtype, *shape, bool(options.causal))
            if peer == "plain" and case.score_bytes() > options.max_plain_gib * 2**30:
                continue
            writer.writerow(measure(case, peer))
            sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Measure each peer in a process of its own, print the table and write memory.csv."""
    options = parse_arguments(argv)
    if options.in_this_process:
        run_here(options)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    arguments = list(sys.argv[1:] if argv is None else argv)
    rows = []
    for peer in options.peers:
        command = [sys.executable, __file__, *arguments, "--peers", peer, "--in-this-process"]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows += csv.DictReader(finished.stdout.splitlines(), COLUMNS)
    print(" ".join(f"{column:>{max(len(column), 9)}}" for column in COLUMNS))
    for row in rows:
        print(" ".join(f"{row[c]:>{max(len(c), 9)}}" for c in COLUMNS))
    with (options.out / "memory.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {os.path.relpath(options.out / 'memory.csv')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
