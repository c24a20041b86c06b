"""The picture of emulator.csv."""

from __future__ import annotations

import csv
from pathlib import Path

from reports.figures import pyplot


def save(table: Path) -> Path | None:
    """Bars by shape and level of checking, beside the table. None without matplotlib."""
    if (plt := pyplot()) is None:
        return None
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    shapes = list(dict.fromkeys((r["seqlen"], r["headdim"], r["causal"]) for r in rows))
    levels = list(dict.fromkeys(r["checks"] for r in rows))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for i, checks in enumerate(levels):
        heights = [float(r["million_a_second"]) for r in rows if r["checks"] == checks]
        axes.bar([x + 0.4 * (i - 0.5) for x in range(len(shapes))], heights, 0.38, label=checks)
    names = [f"S = {s}, d = {d}{', causal' if c == 'True' else ''}" for s, d, c in shapes]
    axes.set_xticks(range(len(shapes)), names)
    axes.set_ylabel("million warp instructions / s, one thread")
    axes.set_title(f"Emulated GPU, forward kernel\n{rows[0]['cpu']}", fontsize=10)
    axes.legend(title="checks")
    path = table.with_suffix(".png")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
