"""Speed of the emulated GPU on the forward kernel: warp instructions a second of one CPU thread.

    python benchmarks/benchmark_emulator.py [--out DIR]

One launch a sample, the levels of checking taking turns; CPU time of the calling thread, medians. A
launch is bf16, (1, seqlen, 2, d). Writes emulator.csv and emulator.png into DIR (build/bench).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import machine
import torch
from reports import emulator_figure

import flash_attn

CHECKS = ("memory", "all")  # bounds and alignment are always checked


def launch(qkv: torch.Tensor, causal: bool, checks: str) -> tuple[float, int]:
    """CPU seconds and warp instructions of one launch."""
    with flash_attn.emulator(checks=checks, threads=1) as gpu:
        start = time.thread_time()
        flash_attn.flash_attn_func(*qkv, causal=causal)
        seconds = time.thread_time() - start
    return seconds, sum(kernel["warp_instructions"] for kernel in gpu.counters.values())


def measure(seqlen: int, headdim: int, causal: bool, samples: int) -> list[dict]:
    """One row for each level of checking."""
    qkv = torch.randn(3, 1, seqlen, 2, headdim, dtype=torch.bfloat16)
    for checks in CHECKS:  # loads and decodes the kernel
        launch(qkv, causal, checks)
    rates: dict[str, list[float]] = {checks: [] for checks in CHECKS}
    for _ in range(samples):
        for checks in CHECKS:
            seconds, instructions = launch(qkv, causal, checks)
            rates[checks].append(instructions / seconds / 1e6)
    shape = {"seqlen": seqlen, "headdim": headdim, "causal": causal, "instructions": instructions}
    return [
        {**shape, "checks": checks, "million_a_second": round(statistics.median(values), 2)}
        for checks, values in rates.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args(argv)
    print(machine.summary())
    rows = []
    for seqlen, headdim, causal in [(256, 64, True), (512, 64, False), (512, 128, False)]:
        for row in measure(seqlen, headdim, causal, options.samples):
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "emulator.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "cpu"])
        writer.writeheader()
        writer.writerows({**row, "cpu": machine.cpu_model()} for row in rows)
    emulator_figure.save(table)


if __name__ == "__main__":
    main()
