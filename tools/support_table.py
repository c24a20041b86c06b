"""The support table of README.md, from the library's own list of kernels.

    python tools/support_table.py            # rewrite README.md
    python tools/support_table.py --check    # exit with status 1 if it is out of date

The list leaves out instruction sets that this machine's CPU lacks; all of them do the same, so the
table has a line for each operation of the CPU. Of CUDA it has one for each generation of kernels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flash_attn._library import lib

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- support table: made by tools/support_table.py from the library's kernel list -->\n"
END = "<!-- end of support table -->\n"


def table(text: str) -> str:
    """Return the table in Markdown, one line for each backend, generation and operation.

    A backend that this build lacks keeps the lines that it has in ``text``.
    """
    rows = {}
    built = {line.split()[0] for line in lib.kernels().splitlines()}
    for line in lib.kernels().splitlines():
        backend, isa, operation, dtypes, head_dims = line.split()
        if backend != "cpu":
            backend = f"{backend} {isa}"
        limits = head_dims.replace(",v:", ", v ")
        others = rows.get((backend, operation, limits))
        dtypes = dtypes.replace(",", ", ")
        rows[backend, operation, limits] = (
            f"{others}, {dtypes}" if others and dtypes not in others else dtypes
        )
    lines = ["| backend | operation | dtypes | head dims |", "| --- | --- | --- | --- |"]
    for (backend, operation, head_dims), dtypes in rows.items():
        lines.append(f"| {backend} | {operation} | {dtypes} | {head_dims} |")
    for line in text.split(BEGIN)[1].split(END)[0].splitlines()[2:]:
        if line.split()[1] not in built:
            lines.append(line)
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return README.md's text with the table between its two marks."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return head + BEGIN + table(text) + END + tail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = README.read_text()
    wanted = with_table(text)
    if parser.parse_args().check:
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
