"""The columns of attention.csv, written and read."""

from __future__ import annotations

import csv
from pathlib import Path

import machine
from peers.versions import versions

CASE_COLUMNS = (
    "op",
    "dtype",
    "batch",
    "seqlen_q",
    "seqlen_k",
    "nheads",
    "nheads_k",
    "headdim",
    "headdim_v",
    "causal",
    "window",
    "page_size",
    "lengths_of",
)
RESULT_COLUMNS = (
    "peer",
    "median_ms",
    "min_ms",
    "samples",
    "gflops",
    "gexps",
    "gbytes",
    "share_of_tile_peak",
    "ratio_to_sdpa",
    "error_ratio",
    "difference",
)
_INTEGERS = frozenset(CASE_COLUMNS[2:-1]) | {"samples"}
_NUMBERS = frozenset(RESULT_COLUMNS[1:]) - {"samples"}


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write all rows with the machine's columns."""
    with path.open("w", newline="") as file:
        used = versions({row["peer"] for row in rows})
        columns = machine.describe() | {"rivals": used}
        writer = csv.DictWriter(file, (*CASE_COLUMNS, *RESULT_COLUMNS, *columns))
        writer.writeheader()
        writer.writerows(row | columns for row in rows)


def _parse(column: str, text: str):
    if column in _INTEGERS:
        return int(text)
    return float(text) if column in _NUMBERS and text else text


def read_csv(path: Path) -> list[dict]:
    """The rows as they were before writing; an empty number stays an empty text."""
    with path.open(newline="") as file:
        return [{c: _parse(c, text) for c, text in row.items()} for row in csv.DictReader(file)]


def machine_of(row: dict) -> str:
    """A line about the machine that a row of a file was measured on."""
    text = (
        f"{row['cpu']}, {row['cores']} cores, {row['threads']} threads; flash_attn "
        f"{row['flash_attn']} on {row['isa']}; torch {row['torch']} on {row['torch_isa']}"
    )
    return "; ".join(part for part in (text, row["rivals"], row["date"]) if part)


def case_key(row: dict) -> tuple:
    """Equal for the rows of one case."""
    return tuple(row[column] for column in CASE_COLUMNS)


def by_case(rows: list[dict]) -> list[dict[str, dict]]:
    """The rows of each case, by peer, cases in the order of the table."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(case_key(row), {})[row["peer"]] = row
    return list(cases.values())
