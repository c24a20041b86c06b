"""The tables of docs/hopper.md."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import sm_pipes
import warpgroups
from markdown_table import markdown
from warpgroups import ROWS, Kernel

TILE_SIZE = Path(__file__).resolve().parent.parent / "csrc/flash_attn/src/hopper/tile_size.h"

# The most that is published for H100 and H200 SXM, TFLOP/s, by head dims, causal or not, and
# queries and keys, of 16384 tokens and 2048 / d heads: FlashAttention-3's and cuDNN's own figures
# and runs of others.
BEST_KNOWN = {
    (64, 64): {False: {2048: 460, 16384: 497}, True: {2048: 371, 16384: 473}},
    (128, 128): {False: {2048: 633, 16384: 702}, True: {2048: 521, 16384: 673}},
    (192, 128): {True: {2048: 522}},
    (256, 256): {False: {2048: 707, 16384: 756}, True: {2048: 537, 16384: 642}},
}
SLOWNESS = 1.5
LENGTHS = (2048, 16384)
TOKENS = 16384
HIDDEN = 2048  # heads times head dim


def members(text: str) -> dict[str, str]:
    """Return designated initialisers by name."""
    return dict(re.findall(r"\.(\w+) = ([\w:]+)", text))


@cache
def tile_table(name: str = "kTiles") -> dict[tuple[int, int, str], dict[str, str]]:
    """Return the rows of a table by head dims and class of scores, with struct Tile's defaults."""
    text = TILE_SIZE.read_text()
    struct = text.split("struct Tile {")[1].split("\n};")[0]
    defaults = dict(re.findall(r"(\w+) = ([\w:]+);", struct))
    rows = {}
    for row in re.findall(r"\{([^{}]*)\}", text.split(f" {name}[] = {{")[1].split("\n};")[0]):
        tile = {**defaults, **members(row)}
        scores = tile["scores"].split("::k")[1].lower()
        rows[int(tile["head_dim"]), int(tile["head_dim_v"]), scores] = tile
    return rows


def tile_of(kernel: Kernel) -> dict[str, str]:
    """Return a kernel's row."""
    table = tile_table("kFp8Tiles" if is_fp8(kernel) else "kTiles")
    return table[kernel.head_dim, kernel.head_dim_v, kernel.name.rsplit("_", 1)[1]]


def is_fp8(kernel: Kernel) -> bool:
    return kernel.element_bytes == 1


def listed(kernels: list[Kernel]) -> list[Kernel]:
    """Return those of one 16-bit dtype, and of fp8."""
    return [kernel for kernel in kernels if "_bf16_" in kernel.name or is_fp8(kernel)]


def tiles(kernels: list[Kernel]) -> str:
    """Return the table of tiles, with what they take of registers and shared memory."""
    rows = []
    for kernel in listed(kernels):
        scores = kernel.name.rsplit("_", 1)[1]
        tile = tile_of(kernel)
        d, dv, m, n = kernel.head_dim, kernel.head_dim_v, kernel.m, kernel.n
        q_slots, slots = int(tile["q_stages"]), int(tile["stages"])
        o_rows = m if tile["o_apart"] == "true" else 0
        elements = (q_slots * m * d, slots * n * d, slots * n * dv)
        kib = [count * kernel.element_bytes / 1024 for count in elements] + [o_rows * dv * 2 / 1024]
        held = [n // 2, dv // 2, n // 4 * kernel.element_bytes // 2]
        if is_fp8(kernel) and overlap(tile) != "apart":  # P V has accumulators of its own
            held.insert(2, int(tile["pv_columns"]) // 2)
        shares = (
            f"{kernel.registers}",
            " + ".join(map(str, held)),
            str(kernel.registers - sum(held)),
        )
        rows.append(
            [dims(kernel), scores, f"{kernel.warpgroups} * {ROWS}", n, *shares]
            + [f"{part:g}" if part else "Q's" for part in kib]
            + [f"{sum(kib):g}", tile["cluster"], overlap(tile), polynomial(tile)]
        )
    header = [
        "d",
        "scores",
        "queries",
        "keys",
        "registers",
        "S + O + P",
        "left",
        "Q, KiB",
        "K",
        "V",
    ]
    return markdown([*header, "O", "all", "cluster", "overlap", "exp2 by FMA"], rows)


def dims(kernel: Kernel) -> str:
    d, dv = kernel.head_dim, kernel.head_dim_v
    return (f"{d}/{dv}" if d != dv else f"{d}") + (", fp8" if is_fp8(kernel) else "")


def overlap(tile: dict[str, str]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", tile["overlap"].split("::k")[1]).lower()


def polynomial(tile: dict[str, str]) -> str:
    return f"1 of {tile['polynomial']}" if tile.get("polynomial", "0") != "0" else "none"


def loops(kernels: list[Kernel]) -> str:
    """Return the table of what a warpgroup's block asks of an SM, in bf16."""
    rows = []
    for kernel in listed(kernels):
        for block, lines in (("full", kernel.full), ("cut", kernel.cut)):
            trip = sm_pipes.trip(lines)
            cycles = trip.cycles("9.0")
            counts = [
                f"{trip.counts[column]}" + (f" ({cycles[column]})" if column in cycles else "")
                for column in sm_pipes.COLUMNS
            ]
            rows.append([f"`{kernel.name}`", block, *counts, cycles["issue"]])
    return markdown(["kernel", "block", *sm_pipes.COLUMNS, "issued"], rows)


def speeds(kernels: list[Kernel]) -> str:
    """Return the table of what the model makes of the loops of kernels without modified scores."""
    header = [
        "kernel",
        "tensor",
        "next",
        "shared memory",
        "L2, B a cycle",
        "simulated",
        "tensor busy",
        f"latencies * {SLOWNESS:g}",
    ]
    header += [
        "cut block",
        "tile",
        *(f"full, {n}" for n in LENGTHS),
        *(f"causal, {n}" for n in LENGTHS),
    ]
    plain = [kernel for kernel in listed(kernels) if not kernel.name.endswith("_modified")]
    return markdown(header, [speed_row(kernel) for kernel in plain])


def speed_row(kernel: Kernel) -> list:
    its = warpgroups.speed(kernel)
    products = kernel.warpgroups * kernel.products
    cycles = sm_pipes.trip(kernel.full).cycles("9.0")
    others = {pipe: count * kernel.warpgroups for pipe, count in cycles.items() if pipe != "tensor"}
    busiest = max(others, key=others.get)
    known = {} if is_fp8(kernel) else BEST_KNOWN.get((kernel.head_dim, kernel.head_dim_v), {})
    rates = []
    for causal in (False, True):
        if causal and kernel.name.endswith("_unmasked"):
            rates += [""] * len(LENGTHS)
            continue
        for seqlen in LENGTHS:
            heads = HIDDEN // kernel.head_dim * (TOKENS // seqlen)
            rate = round(warpgroups.teraflops(kernel, its, seqlen, heads, causal))
            best = known.get(causal, {}).get(seqlen)
            rates.append(f"{rate} ({best})" if best else rate)
    shares = f"{products / its.full:.0%}"
    slow = f"{products / warpgroups.full_block(kernel, SLOWNESS):.0%}"
    copies = f"{kernel.copied / int(tile_of(kernel)['cluster']) / its.full:.0f}"
    shared = warpgroups.shared_memory(kernel)
    row = [f"`{kernel.name}`", products, f"{busiest} {others[busiest]}", shared, copies]
    return [*row, round(its.full), shares, slow, round(its.cut), round(its.tile), *rates]
