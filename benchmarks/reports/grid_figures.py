"""Pictures of a grid: speed over the sequence length, speed against torch, decode, varlen."""

from __future__ import annotations

import math
from pathlib import Path

from measuring.table import by_case, machine_of

from reports.figures import COLOURS, LABELS, draw_lines, finish, pyplot

_SPEED_HEADDIM = 128
_COLOUR_RANGE = 2.0  # of the log2 of a ratio: from a quarter to four times torch's speed


def _is_dense(row: dict) -> bool:
    plain = not row["window"] and row["nheads"] == row["nheads_k"]
    return row["op"] in ("fwd", "bwd") and plain


def _order(values) -> list[str]:
    known = ("fwd", "bwd", "float32", "bfloat16", "float16")
    return sorted(set(values), key=known.index)


def save_speed(rows: list[dict], machine: str, path: Path) -> Path | None:
    """GFLOP/s over the sequence length, head dim 128, causal: a panel a pass and dtype."""
    wanted = [r for r in rows if _is_dense(r) and r["causal"] and r["headdim"] == _SPEED_HEADDIM]
    wanted = [r for r in wanted if r["peer"] in COLOURS]
    if (plt := pyplot()) is None or not wanted:
        return None
    passes, dtypes = (_order(r[column] for r in wanted) for column in ("op", "dtype"))
    size = (3.7 * len(dtypes), 3.1 * len(passes) + 0.7)
    figure, axes = plt.subplots(len(passes), len(dtypes), figsize=size, squeeze=False)
    for line, op in zip(axes, passes):
        for axis, dtype in zip(line, dtypes):
            part = [r for r in wanted if (r["op"], r["dtype"]) == (op, dtype)]
            title = f"{op}, {dtype}, causal, head dim {_SPEED_HEADDIM}"
            draw_lines(axis, part, "gflops", title, "GFLOP/s")
    finish(plt, figure, machine, path)
    return path


def save_ratios(rows: list[dict], machine: str, path: Path) -> Path | None:
    """How many times faster than torch: a table of colours."""
    ours = [r for r in rows if r["peer"] == "flash_attn" and r["ratio_to_sdpa"] and _is_dense(r)]
    if (plt := pyplot()) is None or not ours:
        return None
    kinds = sorted({(r["op"], r["dtype"], r["headdim"], r["causal"]) for r in ours}, reverse=True)
    seqlens = sorted({r["seqlen_k"] for r in ours})
    figure, axis = plt.subplots(figsize=(1.1 * len(seqlens) + 3.2, 0.26 * len(kinds) + 1.6))
    for row in ours:
        y = kinds.index((row["op"], row["dtype"], row["headdim"], row["causal"]))
        x, ratio = seqlens.index(row["seqlen_k"]), row["ratio_to_sdpa"]
        shade = min(max(math.log2(ratio) / _COLOUR_RANGE, -1), 1)
        colour = plt.get_cmap("RdYlGn")((shade + 1) / 2)
        axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour))
        ink = "white" if abs(shade) > 0.8 else "black"
        axis.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=7, color=ink)
    names = [f"{op} {dtype} d={d} {'causal' if c else 'full'}" for op, dtype, d, c in kinds]
    axis.set_yticks(range(len(kinds)), names, fontsize=7)
    axis.set_xticks(range(len(seqlens)), [str(s) for s in seqlens])
    axis.set(xlim=(-0.5, len(seqlens) - 0.5), ylim=(len(kinds) - 0.5, -0.5))
    axis.set_xlabel("sequence length")
    axis.set_title("speed relative to torch SDPA", fontsize=10)
    finish(plt, figure, machine, path)
    return path


def _bar_name(row: dict) -> str:
    detail = f"pages of {row['page_size']}" if row["page_size"] else row["lengths_of"]
    if row["op"] == "decode":
        detail = detail or "contiguous"
    heads = f"{row['nheads']}/{row['nheads_k']}" if row["nheads"] != row["nheads_k"] else ""
    mask = f"window {row['window']}" if row["window"] else ""
    parts = (row["op"], row["dtype"], f"b={row['batch']}", f"s={row['seqlen_k']}", heads, detail)
    return " ".join(part for part in (*parts, mask) if part)


def save_others(rows: list[dict], machine: str, path: Path) -> Path | None:
    """Time relative to this package's: decode, varlen, grouped heads, window."""
    cases = [c for c in by_case([r for r in rows if not _is_dense(r)]) if "flash_attn" in c]
    if (plt := pyplot()) is None or not cases:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(cases) + 1.6))
    shown = set()
    for i, case in enumerate(cases):
        bars = {p: r for p, r in case.items() if p in COLOURS and not p.endswith("_peak")}
        for j, (peer, row) in enumerate(bars.items()):
            speed = case["flash_attn"]["median_ms"] / row["median_ms"]
            height = 0.8 / len(bars)
            y = i - 0.4 + (j + 0.5) * height
            label = LABELS[peer] if peer not in shown else None
            shown.add(peer)
            axis.barh(y, speed, 0.9 * height, color=COLOURS[peer], label=label)
    names = [_bar_name(case["flash_attn"]) for case in cases]
    axis.set_yticks(range(len(cases)), names, fontsize=7)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.axvline(1, color=COLOURS["flash_attn"], linewidth=0.8)
    axis.set_xlabel("speed relative to flash_attn")
    finish(plt, figure, machine, path)
    return path


def save_grid(rows: list[dict], directory: Path) -> list[Path]:
    """All pictures that the rows of an attention.csv allow."""
    if not rows:
        return []
    machine = machine_of(rows[0])
    paths = (
        save_speed(rows, machine, directory / "speed.png"),
        save_ratios(rows, machine, directory / "ratios.png"),
        save_others(rows, machine, directory / "others.png"),
    )
    return [path for path in paths if path is not None]
