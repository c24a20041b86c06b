"""The table of CUDA kernels in docs/cuda.md, from what ptxas told the build.

    python tools/kernel_table.py build/release/cuda/kernels.csv            # rewrite docs/cuda.md
    python tools/kernel_table.py build/release/cuda/kernels.csv --print
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cuda.md"
BEGIN = "<!-- kernels: made by tools/kernel_table.py -->\n"
END = "<!-- end of kernels -->\n"


def table(path: Path) -> str:
    """Return the table in Markdown."""
    lines = [
        "| kernel | registers | stack, bytes | spilled, bytes | fatbin, KiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    with path.open() as file:
        for row in csv.DictReader(file):
            spilled = int(row["spill_stores"]) + int(row["spill_loads"])
            kib = round(int(row["bytes"]) / 1024)
            lines.append(
                f"| `{row['kernel']}` | {row['registers']} | {row['stack']} | {spilled} | {kib} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="kernels.csv of a build")
    parser.add_argument("--print", action="store_true", help="to the terminal, not into the file")
    options = parser.parse_args()
    if options.print:
        print(table(options.csv), end="")
        return 0
    head, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(head + BEGIN + table(options.csv) + END + rest.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
