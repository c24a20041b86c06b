"""For tests of the repository's scripts, which are no package."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def forget_modules(directory: Path) -> None:
    """Let a later import read the modules of ``directory`` anew."""
    for path in directory.glob("*.py"):
        sys.modules.pop(path.stem, None)
