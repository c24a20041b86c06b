"""The few figures that a grid comes down to, as Markdown.

Ratios are of medians in the same run: above 1, this package is faster. The means are geometric,
over S >= 512 of the dense cases with as many KV heads as query heads, full and causal.
"""

from __future__ import annotations

from statistics import geometric_mean, median

from measuring.table import by_case

from reports.figures import LABELS
from reports.roofline import bound_of, limits_of

_SHORTEST = 512
_OTHERS = ("sdpa_flash", "sdpa_math", "onednn", "openvino", "ggml")
_MEASURED_LONG = 8192


def _is_dense(row: dict) -> bool:
    return row["op"] in ("fwd", "bwd") and not row["window"] and row["nheads"] == row["nheads_k"]


def _ratio(case: dict[str, dict], peer: str) -> float:
    return case[peer]["median_ms"] / case["flash_attn"]["median_ms"]


def _mean(cases: list[dict[str, dict]], peer: str) -> str:
    ratios = [_ratio(case, peer) for case in cases if peer in case]
    return f"{geometric_mean(ratios):.2f} x" if ratios else "-"


def speed_table(cases: list[dict[str, dict]]) -> list[str]:
    """Against every other, a line a pass and dtype."""
    present = [p for p in ("sdpa", *_OTHERS) if any(p in case for case in cases)]
    lines = ["| | " + " | ".join(f"{LABELS[p]}" for p in present) + " |"]
    lines.append("| --- |" + " --- |" * len(present))
    kinds = dict.fromkeys((c["flash_attn"]["op"], c["flash_attn"]["dtype"]) for c in cases)
    for op, dtype in kinds:
        part = [
            case
            for case in cases
            if _is_dense(row := case["flash_attn"])
            and (row["op"], row["dtype"]) == (op, dtype)
            and row["seqlen_k"] >= _SHORTEST
        ]
        if part:
            means = " | ".join(_mean(part, peer) for peer in present)
            lines.append(f"| {op} {dtype} | {means} |")
    return lines if len(lines) > 2 else []


def peak_lines(cases: list[dict[str, dict]], rows: list[dict]) -> list[str]:
    """Share of the multiplying unit's peak at S = 8192, head dim 128, no mask."""
    lines = []
    for case in cases:
        row = case["flash_attn"]
        wanted = (_MEASURED_LONG, 128, 0)
        if _is_dense(row) and (row["seqlen_k"], row["headdim"], row["causal"]) == wanted:
            rate, unit = limits_of(case, rows).multiply(row["dtype"])
            if rate:
                text = f"{row['gflops']:.0f} GFLOP/s, {row['gflops'] / rate:.0%} of the {unit} peak"
                lines.append(f"- {row['op']} {row['dtype']}, S = 8192, d = 128, full: {text}")
    return lines


def decode_lines(cases: list[dict[str, dict]], rows: list[dict]) -> list[str]:
    """Share of a plain read, and against torch."""
    lines = []
    for case in cases:
        row = case["flash_attn"]
        if row["op"] != "decode":
            continue
        pages = f"pages of {row['page_size']}" if row["page_size"] else "contiguous"
        name = f"decode {row['dtype']}, batch {row['batch']}, S = {row['seqlen_k']}, {pages}"
        text = f"{row['gbytes']:.1f} GB/s"
        if "read" in case:
            bound = bound_of(row, limits_of(case, rows))
            text += f", {bound.bytes / row['median_ms']:.0%} of a plain read"
        if "sdpa" in case:
            text += f", {_ratio(case, 'sdpa'):.2f} x torch SDPA"
        lines.append(f"- {name}: {text}")
    return lines


def other_lines(cases: list[dict[str, dict]]) -> list[str]:
    """Windows against none, ragged batches, grouped heads."""
    lines = []
    for case in cases:
        row = case["flash_attn"]
        if "no_window" in case:
            text = f"{_ratio(case, 'no_window'):.1f} x faster than without the window"
            lines.append(f"- window {row['window']}, S = {row['seqlen_k']}, {row['dtype']}: {text}")
        elif row["op"] == "varlen" and "sdpa" in case:
            text = f"{_ratio(case, 'sdpa'):.2f} x torch SDPA, one sequence after another"
            name = f"varlen {row['dtype']}, {row['batch']} {row['lengths_of']}"
            lines.append(f"- {name}: {text}")
    for dtype in dict.fromkeys(case["flash_attn"]["dtype"] for case in cases):
        for op in ("fwd", "bwd"):
            part = [
                c
                for c in cases
                if (row := c["flash_attn"])["nheads"] != row["nheads_k"]
                and (row["op"], row["dtype"]) == (op, dtype)
            ]
            if part:
                lines.append(f"- 32/8 heads, {op} {dtype}: {_mean(part, 'sdpa')} torch SDPA")
    return lines


def slower_lines(cases: list[dict[str, dict]]) -> list[str]:
    """The points where torch, by its own choice of backend, is faster."""
    slower = [case for case in cases if "sdpa" in case and _ratio(case, "sdpa") < 1]
    lines = [f"Points where torch SDPA is faster: {len(slower)} of {len(cases)}."]
    for case in sorted(slower, key=lambda case: _ratio(case, "sdpa")):
        row = case["flash_attn"]
        mask = "causal" if row["causal"] else "full"
        pages = f" pages of {row['page_size']}" if row["page_size"] else ""
        name = f"{row['op']} {row['dtype']} batch {row['batch']} S = {row['seqlen_k']}"
        name += f" d = {row['headdim']} {row['nheads']}/{row['nheads_k']} {mask}{pages}"
        lines.append(f"- {name}: {_ratio(case, 'sdpa'):.2f} x")
    return lines


def summarize(rows: list[dict]) -> str:
    """All of it, for one machine."""
    cases = [case for case in by_case(rows) if "flash_attn" in case]
    first = rows[0]
    parts = [f"## {first['cpu']}, {first['isa']}, {first['threads']} threads"]
    facts = [f"torch {first['torch']}", first["rivals"], first["date"]]
    peaks = [row["gflops"] for row in rows if row["peer"] == "fma_peak"]
    if peaks:
        facts.append(f"FMA peak {median(peaks):.0f} GFLOP/s")
    parts.append("; ".join(fact for fact in facts if fact))
    parts.append("\n".join(speed_table(cases)))
    bullets = peak_lines(cases, rows) + decode_lines(cases, rows) + other_lines(cases)
    parts.append("\n".join(bullets))
    parts.append("\n".join(slower_lines(cases)))
    return "\n\n".join(part for part in parts if part)
