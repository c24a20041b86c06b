"""What is made of results: pictures beside them, docs/roofline.md, a summary as Markdown.

    python benchmarks/report.py pictures             # of all of benchmarks/results
    python benchmarks/report.py roofline             # docs/roofline.md
    python benchmarks/report.py summary build/bench/*

A folder of results has attention.csv, emulator.csv or cuda.csv, as the benchmarks write them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from measuring.table import read_csv
from reports import cuda_figure, emulator_figure, grid_figures, roofline, summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def draw(folder: Path) -> Iterator[Path | None]:
    """Draw what a folder's tables allow."""
    if (table := folder / "attention.csv").is_file():
        rows = read_csv(table)
        yield from grid_figures.save_grid(rows, folder)
        yield roofline.save_picture(rows, folder / "roofline.png")
    for name, figure in (("emulator", emulator_figure), ("cuda", cuda_figure)):
        if (table := folder / f"{name}.csv").is_file():
            yield figure.save(table)


def main(argv: list[str] | None = None) -> int:
    """Make one of the three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pictures", "roofline", "summary"))
    parser.add_argument("folders", nargs="*", type=Path, help="of results; all if none is given")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "roofline.md")
    options = parser.parse_args(argv)
    folders = options.folders or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    if options.what == "pictures":
        for path in filter(None, (path for folder in folders for path in draw(folder))):
            print(f"wrote {os.path.relpath(path)}")
        return 0
    machines = [
        read_csv(table) for folder in folders if (table := folder / "attention.csv").is_file()
    ]
    if options.what == "summary":
        print("\n\n".join(map(summary.summarize, machines)))
    else:
        options.page.write_text(roofline.page(machines))
        print(f"wrote {os.path.relpath(options.page)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
