"""Pictures of measured rows. Without matplotlib they are skipped with a line that says so."""

from __future__ import annotations

import textwrap
from pathlib import Path

COLOURS = {
    "flash_attn": "#c1440e",
    "sdpa": "#3b6ea5",
    "sdpa_flash": "#7fa6cf",
    "sdpa_math": "#a8b8c8",
    "plain": "#8a8a8a",
    "onednn": "#2a9d8f",
    "openvino": "#8e6bbf",
    "ggml": "#b8860b",
    "no_window": "#e6a188",
    "fma_peak": "#222222",
    "dot_peak": "#777777",
    "amx_peak": "#222222",
    "read": "#222222",
}
LABELS = {
    "flash_attn": "flash_attn",
    "sdpa": "torch SDPA",
    "sdpa_flash": "torch SDPA, flash",
    "sdpa_math": "torch SDPA, math",
    "plain": "plain softmax",
    "onednn": "oneDNN graph",
    "openvino": "OpenVINO",
    "ggml": "llama.cpp (ggml)",
    "no_window": "flash_attn without the window",
    "fma_peak": "FMA peak",
    "dot_peak": "AVX-512-BF16 peak",
    "amx_peak": "AMX peak",
    "read": "plain read of the cache",
}


_LEGEND_INCHES = 2.3  # of the longest label


def pyplot():
    """matplotlib.pyplot for files, or None if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is missing: no picture")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw_lines(axis, rows: list[dict], column: str, title: str, unit: str, log_y=False) -> None:
    """One line a peer of ``column`` over the key sequence length."""
    for peer in COLOURS:
        points = sorted((int(r["seqlen_k"]), float(r[column])) for r in rows if r["peer"] == peer)
        if points:
            limit = peer.endswith("_peak")
            style = {"linestyle": ":"} if limit else {"marker": "o", "markersize": 4}
            axis.plot(*zip(*points), color=COLOURS[peer], label=LABELS[peer], **style)
    seqlens = sorted({int(r["seqlen_k"]) for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(seqlens, [f"{s // 1024}k" if s >= 1024 else str(s) for s in seqlens])
    axis.minorticks_off()
    if log_y:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("sequence length")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.25)


def _group_key(row: dict) -> tuple:
    """What all points of a line have in common."""
    return tuple(v for k, v in row.items() if k in _GROUP_COLUMNS)


_GROUP_COLUMNS = (
    "op",
    "dtype",
    "batch",
    "nheads",
    "nheads_k",
    "headdim",
    "headdim_v",
    "causal",
    "window",
    "page_size",
    "lengths_of",
)


def _group_title(row: dict) -> str:
    heads = f"h={row['nheads']}"
    if row["nheads"] != row["nheads_k"]:
        heads += f"/{row['nheads_k']}"
    mask = "causal" if int(row["causal"]) else "full"
    return f"{row['op']} {row['dtype']} {mask}\nb={row['batch']} {heads} d={row['headdim']}"


def _save_lines(plt, groups: list[list[dict]], machine: str, path: Path) -> None:
    columns = min(len(groups), 4)
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 3.1 * lines + 0.5), squeeze=False
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, rows in zip(axes.flat, groups):
        draw_lines(axis, rows, "gflops", _group_title(rows[0]), "GFLOP/s")
    finish(plt, figure, machine, path)


def _save_bars(plt, groups: list[list[dict]], machine: str, path: Path) -> None:
    """Horizontal bars of GFLOP/s, one group a case."""
    cases = [case for rows in groups for case in _split_by_seqlen(rows)]
    height = 0.55 * len(cases) + 1.2
    figure, axis = plt.subplots(figsize=(8.5, height))
    for i, rows in enumerate(cases):
        for j, row in enumerate(rows):
            label = LABELS[row["peer"]] if i == 0 else None
            y = i + 0.26 * (j - (len(rows) - 1) / 2)
            axis.barh(y, row["gflops"], 0.24, color=COLOURS[row["peer"]], label=label)
            if row["peer"] == "flash_attn" and row["ratio_to_sdpa"]:
                axis.text(
                    row["gflops"], y, f" {row['ratio_to_sdpa']:.2f}x", va="center", fontsize=7
                )
    names = [
        _group_title(rows[0]).replace("\n", " ") + f" s={rows[0]['seqlen_k']}" for rows in cases
    ]
    axis.set_yticks(range(len(cases)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlabel(
        "GFLOP/s (a causal mask counts as half); beside the bars: speed relative to torch SDPA"
    )
    axis.grid(axis="x", alpha=0.25)
    finish(plt, figure, machine, path)


def _split_by_seqlen(rows: list[dict]) -> list[list[dict]]:
    seqlens = sorted({row["seqlen_k"] for row in rows})
    return [[row for row in rows if row["seqlen_k"] == s] for s in seqlens]


def finish(plt, figure, machine: str, path: Path) -> None:
    """Write the legend and the machine under the figure, and the figure to ``path``."""
    width, height = figure.get_size_inches()
    named = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            named.setdefault(label, handle)
    labels, handles = list(named), list(named.values())
    columns = max(1, int(width / _LEGEND_INCHES))
    lines = -(-len(labels) // columns)
    text = textwrap.fill(machine, int(width * 16))
    text_inches = 0.12 * (text.count("\n") + 1) + 0.1
    rest = (text_inches + 0.22 * lines + 0.1) / height
    figure.tight_layout(rect=(0, rest, 1, 1))
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, text_inches / height)}
    if labels:
        figure.legend(handles, labels, ncols=min(columns, len(labels)), frameon=False, **place)
    figure.text(0.01, 0.05 / height, text, fontsize=6.5, color="#555555", va="bottom")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_benchmark(rows: list[dict], machine: str, path: Path) -> Path | None:
    """Lines over the sequence length where some case has three or more of them, else bars."""
    if (plt := pyplot()) is None:
        return None
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["peer"] not in COLOURS:  # exponentials: no GFLOP/s
            continue
        groups.setdefault(_group_key(row), []).append(row)
    has_sweep = any(len(_split_by_seqlen(group)) >= 3 for group in groups.values())
    (_save_lines if has_sweep else _save_bars)(plt, list(groups.values()), machine, path)
    return path
