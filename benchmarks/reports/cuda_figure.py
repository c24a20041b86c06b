"""The picture of cuda.csv."""

from __future__ import annotations

import csv
from pathlib import Path

from reports.figures import pyplot


def save(table: Path) -> Path | None:
    """Of the dense forward a panel for each dtype, head dim and mask with several lengths, a line a
    peer, beside the table.

    None without matplotlib or without rows.
    """
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["op"] == "fwd"]
    lengths = {}
    for r in rows:
        group = (r["dtype"], int(r["headdim"]), int(r["causal"]))
        lengths.setdefault(group, set()).add(r["seqlen"])
    groups = sorted(group for group in lengths if len(lengths[group]) > 1)
    if not groups or (plt := pyplot()) is None:
        return None
    figure, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3.6), squeeze=False)
    for axis, group in zip(axes[0], groups):
        for peer in dict.fromkeys(r["peer"] for r in rows):
            points = [
                (int(r["seqlen"]), float(r["tflops"]))
                for r in rows
                if (r["dtype"], int(r["headdim"]), int(r["causal"])) == group and r["peer"] == peer
            ]
            if points:
                axis.plot(*zip(*points), marker="o", label=peer)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{group[0]} d={group[1]} {'causal' if group[2] else 'full'}")
        axis.set_xlabel("sequence length")
        axis.set_ylabel("TFLOP/s, forward")
        axis.grid(alpha=0.25)
    axes[0][0].legend()
    figure.suptitle(rows[0]["device"])
    figure.tight_layout()
    path = table.with_suffix(".png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
