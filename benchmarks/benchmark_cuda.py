"""Speed of the CUDA kernels beside torch's attention: SDPA by flash and cuDNN, varlen_attn.

    python benchmarks/benchmark_cuda.py --out build/bench
    python benchmarks/benchmark_cuda.py --device cpu --shrink 64   # tries the script without a GPU

Operations (--op): dense and packed prefill; forward and backward; decode, also as a share of the
bandwidth of a copy on the device; latency, the time from a call of one sequence's decode to its
result; decode_grid, if it is asked for, many shapes of decode. Peers take turns and medians are
compared. But for latency each call is timed by events on the device after the L2 cache has been
overwritten. Writes cuda.csv and, with matplotlib, cuda.png into --out.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
from cases.case import Case, make_inputs
from cases.gpu import CASES, GRIDS, shrunk
from peers.gpu import OURS, PEERS
from peers.registry import Run
from peers.unsupported import Unsupported
from reports import cuda_figure

COLUMNS = (
    *("device", "op", "dtype", "headdim", "causal", "batch", "seqlen", "nheads", "nheads_k"),
    "page_size",
)
RESULTS = (
    *("peer", "median_ms", "min_ms", "samples", "tflops", "gbytes", "share_of_copy"),
    "ratio_to_best_torch",
)
FLUSH_BYTES = 256 << 20  # more than any L2 cache
TOLERANCE = 0.03  # between results of order 1 in 16 bits


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--op", nargs="+", choices=[*CASES, *GRIDS], default=list(CASES))
    add("--headdim", nargs="+", type=int, help="these alone")
    add("--shrink", type=int, default=1, help="divide lengths and heads by this")
    add("--samples", type=int, default=20)
    add("--budget", type=float, default=float("inf"), help="seconds after which no case begins")
    add("--out", type=Path, default=Path("build/bench"))
    return parser.parse_args(argv)


class Timer:
    """Milliseconds of a call: between two events on a GPU, by the clock elsewhere."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        self.flush = torch.empty(
            FLUSH_BYTES if self.on_gpu else 1, dtype=torch.uint8, device=device
        )

    def until_done(self, run: Run) -> float:
        """By the clock, from the call to its result."""
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return (time.perf_counter() - start) * 1e3

    def on_device(self, run: Run) -> float:
        """Of the device's work, nothing of its operands in the L2 cache."""
        self.flush.zero_()
        if not self.on_gpu:
            return self.until_done(run)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()


def agrees(results, expected) -> bool:
    """Whether a peer computes what this package does; a copy computes nothing."""
    return all(
        (x - y).abs().max() <= TOLERANCE * max(1.0, y.abs().max().item())
        for x, y in zip(results, expected)
    )


def working_peers(op: str, case: Case, device: str) -> dict[str, Run]:
    """Those that run this case here and agree with the first; a line for each that does not."""
    inputs = make_inputs(case, device)
    runs, expected = {}, None
    for name, make in PEERS[op].items():
        try:
            run = make(case, inputs)
            results = run()
        except (RuntimeError, TypeError, Unsupported) as error:
            print(f"  {name} does not run: {str(error).splitlines()[0][:120]}")
            continue
        expected = expected or results
        if agrees(results, expected):
            runs[name] = run
        else:
            print(f"  {name} is left out: its result differs")
    return runs


def rates(case: Case, peer: str, ms: float) -> dict:
    """10^12 operations and 10^9 bytes a second; a copy reads and writes keys and values."""
    work = case.work()
    keys = 2 * case.batch * case.seqlen_k * case.nheads_k * case.headdim * case.itemsize
    moved, flops = (2 * keys, 0.0) if peer == "copy" else (work.bytes, work.flops)
    return {"tflops": round(flops / ms / 1e9, 2), "gbytes": round(moved / ms / 1e6, 1)}


def rows_of(case: Case, op: str, samples: dict[str, list[float]], device: str) -> list[dict]:
    """One a peer."""
    medians = {name: statistics.median(times) for name, times in samples.items()}
    others = [ms for name, ms in medians.items() if name not in OURS and name != "copy"]
    shape = (case.headdim, int(case.causal), case.batch, case.seqlen_k, case.nheads, case.nheads_k)
    constant = dict(zip(COLUMNS, (device, op, case.dtype, *shape, case.page_size)))
    rows = []
    for peer, ms in medians.items():
        rate = rates(case, peer, ms)
        copied = rates(case, "copy", medians["copy"])["gbytes"] if "copy" in medians else 0
        rows.append(
            {
                **constant,
                "peer": peer,
                "median_ms": round(ms, 4),
                "min_ms": round(min(samples[peer]), 4),
                "samples": len(samples[peer]),
                **rate,
                "share_of_copy": round(rate["gbytes"] / copied, 3) if copied else "",
                "ratio_to_best_torch": round(min(others) / ms, 3) if others else "",
            }
        )
    return rows


def measure(timer: Timer, op: str, case: Case, options) -> list[dict]:
    """Rows of one case, one a peer."""
    runs = working_peers(op, case, options.device)
    time_of = timer.until_done if op == "latency" else timer.on_device
    samples = {name: [] for name in runs}
    for _ in range(options.samples):
        for name, run in runs.items():
            samples[name].append(time_of(run))
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return rows_of(case, op, samples, name)


def cell(row: dict) -> str:
    """A peer's figures of one case, for the terminal."""
    ms = row["median_ms"]
    time = f"{ms:.3f} ms" if ms >= 1 else f"{1e3 * ms:.1f} us"
    rate = f"{row['tflops']:.1f}"
    if row["op"] not in ("fwd", "fwd_bwd", "varlen"):
        rate = f"{row['gbytes']:.0f} GB/s"
    share = f" {100 * row['share_of_copy']:.0f}% of a copy" if row["share_of_copy"] else ""
    return f"{row['peer']} {time} {rate}{share}"


def cases_of(options) -> list[tuple[str, Case]]:
    """``(op, case)`` of all that the options ask for."""
    cases = [(op, case) for op in options.op for case in {**CASES, **GRIDS}[op]()]
    if options.headdim:
        cases = [(op, case) for op, case in cases if case.headdim in options.headdim]
    if options.shrink > 1:
        cases = [(op, shrunk(case, options.shrink)) for op, case in cases]
    return cases


def main(argv=None) -> int:
    """Measure, print, write."""
    options = parse_arguments(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    timer, started = Timer(options.device), time.perf_counter()
    table = options.out / "cuda.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *RESULTS))
        writer.writeheader()
        for op, case in cases_of(options):
            if time.perf_counter() - started > options.budget:
                print(f"left out, the time is up: {case}")
                continue
            rows = measure(timer, op, case, options)
            writer.writerows(rows)
            file.flush()  # a run that is cut off leaves what it has measured
            print(f"{op:7}", case, "|", " | ".join(cell(row) for row in rows), flush=True)
    if (picture := cuda_figure.save(table)) is not None:
        print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
