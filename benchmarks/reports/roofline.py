"""What bounds each kernel and how near it comes: docs/roofline.md, and a picture.

A kernel's bound is the time that the machine needs at least for the kernel's products, exponentials
and bytes, by the limits measured in turns with the kernel. The page says how they are combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from measuring.table import by_case, machine_of

from reports.figures import finish, pyplot

# AMX multiplies bf16 alone: an fp16 number is two of them, an fp32 number three, and this many
# products of parts make one product: for fp16 four of Q K^T, three of P V.
_AMX_PRODUCTS = {"bfloat16": 1, "float16": 3.5, "float32": 6}
_LONGEST = 8192  # of the dense kernels on the page: longer ones are not measured everywhere
_INTRODUCTION = """\
# Roofline: what bounds each kernel

Made by `python benchmarks/report.py roofline`; do not edit.

A call needs at least the longest of three times. The rates are measured on the same machine, in
turns with the kernel and on as many threads ([limits.cpp](../benchmarks/native/limits.cpp)):

- **products**: operations of the matrix products at the peak of the unit that multiplies. A score
  takes 2 (d + dv) forward, 2 (3 d + 2 dv) backward; a causal mask leaves half of the scores, a
  window those inside. The unit is FMA; for bf16 also AVX-512-BF16 dot products; and AMX where the
  CPU has it, for fp16 at 1/3.5 and for fp32 at a sixth of its peak, since so many bf16 products
  make one.
- **exp**: one exponential a score, at the rate of a vectorized fp32 2^x in L1. It runs on the FMA
  units: where these do the products, too, the two times add up; beside AMX they overlap.
- **bytes**: each input read and each result written once, at the rate of a plain read of a decode
  case's keys and values.

"Of the bound" is that time divided by the measured one; only noise exceeds 100 %. What is missing
goes to packing operands, the softmax besides exponentials, and blocks that a causal mask cuts.
"""


@dataclass(frozen=True)
class Limits:
    """Rates of a machine, in 10^9 a second; 0 where not measured."""

    fma: float
    dot: float
    amx: float
    exps: float
    read: float

    def multiply(self, dtype: str) -> tuple[float, str]:
        """The fastest unit for products of a dtype: its rate and name."""
        rates = {"FMA": self.fma, "AMX": self.amx / _AMX_PRODUCTS[dtype]}
        if dtype == "bfloat16":
            rates["AVX-512-BF16"] = self.dot
        name = max(rates, key=rates.__getitem__)
        return rates[name], name


@dataclass(frozen=True)
class Bound:
    """Milliseconds that a call takes at least, by cause; 0 where the limit was not measured."""

    products: float
    exps: float
    bytes: float
    unit: str

    @property
    def compute(self) -> float:
        """Of products and exponentials together."""
        overlap = self.unit == "AMX"
        return max(self.products, self.exps) if overlap else self.products + self.exps

    @property
    def total(self) -> float:
        return max(self.compute, self.bytes)

    @property
    def cause(self) -> str:
        if self.bytes >= self.compute:
            return "memory bandwidth"
        if self.unit == "AMX" and self.exps > self.products:
            return "exp throughput"
        return f"{self.unit} peak" if self.unit == "AMX" else f"{self.unit} and exp throughput"


def _peak(case: dict[str, dict], rows: Sequence[dict], peer: str, column: str) -> float:
    """A limit as measured in turns with the case, or over the whole run."""
    if peer in case:
        return case[peer][column]
    rates = [row[column] for row in rows if row["peer"] == peer]
    return median(rates) if rates else 0.0


def limits_of(case: dict[str, dict], rows: Sequence[dict]) -> Limits:
    """The limits that hold for a case."""
    names = ("fma_peak", "dot_peak", "amx_peak")
    flops = [_peak(case, rows, name, "gflops") for name in names]
    exps = _peak(case, rows, "exp_peak", "gexps")
    reads = [row["gbytes"] for row in rows if row["peer"] == "read" and row["gbytes"]]
    read = case["read"]["gbytes"] if "read" in case else max(reads, default=0.0)
    return Limits(*flops, exps, read)


def bound_of(row: dict, limits: Limits) -> Bound:
    """The bound of a kernel's row; its work is its rates times its time."""
    rate, unit = limits.multiply(row["dtype"])

    def least(column: str, limit: float) -> float:
        return row[column] / limit * row["median_ms"] if limit else 0.0

    return Bound(
        least("gflops", rate), least("gexps", limits.exps), least("gbytes", limits.read), unit
    )


def _name(row: dict) -> str:
    heads = f"{row['nheads']}/{row['nheads_k']}" if row["nheads"] != row["nheads_k"] else ""
    mask = "causal" if row["causal"] else "full"
    if row["window"]:
        mask = f"window {row['window']}"
    parts = [row["op"], row["dtype"], f"d = {row['headdim']}", f"S = {row['seqlen_k']}"]
    if row["op"] == "decode":
        pages = f"pages of {row['page_size']}" if row["page_size"] else "contiguous"
        parts += [f"batch {row['batch']}", heads, pages]
    else:
        parts += [heads, row["lengths_of"], mask]
    return ", ".join(part for part in parts if part)


def chosen(cases: list[dict[str, dict]]) -> list[dict[str, dict]]:
    """The cases of the page: of dense ones the longest of each kind, and all others."""
    longest: dict[tuple, dict[str, dict]] = {}
    for case in cases:
        row = case["flash_attn"]
        if row["op"] in ("fwd", "bwd") and not row["window"]:
            kind = tuple(row[c] for c in ("op", "dtype", "headdim", "causal"))
            kind += (row["nheads"] != row["nheads_k"],)
            known = longest.get(kind)
            longer = known is None or row["seqlen_k"] > known["flash_attn"]["seqlen_k"]
            if longer and row["seqlen_k"] <= _LONGEST:
                longest[kind] = case
        else:
            longest[(_name(row),)] = case
    return list(longest.values())


def section(rows: list[dict]) -> str:
    """The page's part about one machine: its limits, and a line a kernel."""
    cases = [case for case in by_case(rows) if "flash_attn" in case]
    first, whole = rows[0], limits_of({}, rows)
    lines = [f"## {first['cpu']}, {first['isa']}, {first['threads']} threads", ""]
    lines += [f"flash_attn {first['flash_attn']}, measured {first['date']}.", ""]
    lines += ["| limit | |", "| --- | --- |", f"| FMA, fp32 | {whole.fma:.0f} GFLOP/s |"]
    if whole.dot:
        lines.append(f"| AVX-512-BF16 dot products | {whole.dot:.0f} GFLOP/s |")
    if whole.amx:
        lines.append(f"| AMX, bf16, random data | {whole.amx:.0f} GFLOP/s |")
    lines += [f"| 2^x | {whole.exps:.1f} G/s |", f"| read | {whole.read:.1f} GB/s |", ""]
    lines.append(
        "| kernel | ms | GFLOP/s | GB/s | products | exp | bytes | bounded by | of the bound |"
    )
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
    for case in chosen(cases):
        row = case["flash_attn"]
        bound = bound_of(row, limits_of(case, rows))
        time = row["median_ms"]
        shares = " | ".join(f"{x / time:.0%}" for x in (bound.products, bound.exps, bound.bytes))
        lines.append(
            f"| {_name(row)} | {time:.4g} | {row['gflops']:.0f} | {row['gbytes']:.1f} | {shares} "
            f"| {bound.cause} | **{bound.total / time:.0%}** |"
        )
    lines += ["", "Products, exp, bytes: the least time for each, in percent of the measured one."]
    return "\n".join(lines)


_MARKS = {"fwd": "o", "bwd": "s", "decode": "v", "varlen": "^"}
_DTYPE_COLOURS = {"float32": "#3b6ea5", "bfloat16": "#c1440e", "float16": "#2a9d8f"}


def save_picture(rows: list[dict], path: Path) -> Path | None:
    """GFLOP/s over operations per byte, under the roofs of this machine."""
    cases = [case for case in by_case(rows) if "flash_attn" in case]
    limits = limits_of({}, rows)
    if (plt := pyplot()) is None:
        return None
    figure, axis = plt.subplots(figsize=(7.5, 4.8))
    points = [(c["flash_attn"]["gflops"], c["flash_attn"]["gbytes"]) for c in chosen(cases)]
    intensities = [flops / size for flops, size in points if size]
    span = [min(0.5, *intensities), 1.5 * max(intensities, default=100.0)]
    roofs = {"FMA": limits.fma, "AVX-512-BF16": limits.dot, "AMX": limits.amx}
    for name, roof in roofs.items():
        if not roof:
            continue
        edge = max(roof / limits.read, span[0]) if limits.read else span[0]
        axis.plot([edge, span[1]], [roof, roof], color="#222222", linewidth=1)
        axis.text(span[1], roof, f" {name}", va="center", fontsize=8)
    if limits.read:
        end = max(roofs.values()) / limits.read
        axis.plot([span[0], end], [span[0] * limits.read, end * limits.read], "--", color="#222222")
    seen = set()
    for case in chosen(cases):
        row = case["flash_attn"]
        if not row["gbytes"]:
            continue
        kind = (row["op"], row["dtype"])
        label = " ".join(kind) if kind not in seen else None
        seen.add(kind)
        style = {"marker": _MARKS[row["op"]], "color": _DTYPE_COLOURS[row["dtype"]]}
        x = row["gflops"] / row["gbytes"]
        axis.plot(x, row["gflops"], linestyle="", markersize=5, alpha=0.75, label=label, **style)
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_minor_formatter("")
    axis.grid(alpha=0.25)
    finish(plt, figure, machine_of(rows[0]), path)
    return path


def page(machines: list[list[dict]]) -> str:
    """The text of docs/roofline.md, of the rows of each machine."""
    return "\n".join([_INTRODUCTION, *map(section, machines)]) + "\n"
