"""Speed and memory of attention over the sequence length: flash_attn, PyTorch's own, plain softmax.

Runs ../benchmarks in processes of their own, so that they measure undisturbed, and puts their
figures into a table and a picture.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from machine import summary as machine_summary  # noqa: E402, F401  for train_text.py
from reports.figures import draw_lines, finish, pyplot  # noqa: E402

SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
SHAPE = ["--nheads", "2", "--headdim", "64", "--causal", "1", "--dtype", "float32"]
PEERS = {"flash_attn": "flash_attn", "sdpa": "torch SDPA", "plain": "plain softmax"}
QUANTITIES = {"fwd": "forward, ms", "fwd_bwd": "forward + backward, ms", "memory": "memory, MiB"}


def _run(script: str, *arguments: str) -> None:
    command = [sys.executable, str(BENCHMARKS / script), *SHAPE, "--seqlen", *map(str, SEQLENS)]
    finished = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        raise SystemExit(f"{script} failed:\n{finished.stdout}")


def _read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(out: Path) -> list[dict]:
    """Rows {op, peer, seqlen, value}: op fwd and fwd_bwd in milliseconds, memory in MiB."""
    _run("benchmark_attn.py", "--op", "fwd", "fwd_bwd", "--case-seconds", "1.5", "--out", str(out))
    _run("benchmark_memory.py", "--peers", *PEERS, "--out", str(out))
    columns = [(row, row["op"], "median_ms") for row in _read(out / "attention.csv")]
    columns += [(row, "memory", "extra_mib") for row in _read(out / "memory.csv")]
    return [
        {"op": op, "peer": row["peer"], "seqlen": int(row["seqlen_k"]), "value": float(row[value])}
        for row, op, value in columns
    ]


def tables(rows: list[dict]) -> str:
    """A Markdown table a quantity: a line a sequence length, a column a peer."""
    return "\n\n".join(_table(op, [row for row in rows if row["op"] == op]) for op in QUANTITIES)


def _table(op: str, rows: list[dict]) -> str:
    values = {(row["peer"], row["seqlen"]): row["value"] for row in rows}
    header = [QUANTITIES[op], *PEERS.values(), "SDPA : flash_attn"]
    lines = [header, ["---:"] * len(header)]
    for seqlen in SEQLENS:
        cells = [values.get((peer, seqlen)) for peer in PEERS]
        ratio = f"{cells[1] / cells[0]:.2f}"
        lines.append([str(seqlen), *("-" if x is None else f"{x:.1f}" for x in cells), ratio])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def picture(report: dict, path: Path) -> Path | None:
    """The loss over the steps, and three panels over the sequence length where attention was
    measured. None without matplotlib."""
    if (plt := pyplot()) is None:
        return None
    rows = report["attention"]
    figure, axes = plt.subplots(
        1, 4 if rows else 1, figsize=(14 if rows else 5, 3.9), squeeze=False
    )
    first, *others = axes[0]
    _draw_training(first, report)
    titles = ("forward", "forward + backward", "memory of forward + backward")
    units = ("ms", "ms", "MiB beyond the inputs")
    for axis, op, title, unit in zip(others, QUANTITIES, titles, units):
        points = [{**row, "seqlen_k": row["seqlen"]} for row in rows if row["op"] == op]
        draw_lines(axis, points, "value", title, unit, log_y=True)
    attention = "; causal attention, fp32, 2 heads of 64" if rows else ""
    figure.suptitle(f"A GPT of {report['parameters']:,} parameters{attention}", fontsize=11)
    finish(plt, figure, report["machine"], path)
    return path


def _draw_training(axis, report: dict) -> None:
    losses = [entry["loss"] for entry in report["history"]]
    smooth, curve = 0.0, []
    for i, loss in enumerate(losses):
        smooth += max(0.05, 1 / (i + 1)) * (loss - smooth)
        curve.append(smooth)
    steps = range(1, len(losses) + 1)
    axis.plot(steps, losses, color="#bbbbbb", linewidth=0.6)
    axis.plot(steps, curve, color="#333333", label="training loss")
    axis.plot(
        len(losses), report["validation_loss"], "D", color="#cc3311", label="on held-out text"
    )
    axis.set_title("training", fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylabel("nats a byte")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
