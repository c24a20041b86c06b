"""For tests of the repository's scripts, which are no package."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def forget_modules(directory: Path) -> None:
    """Let a later import read the modules of ``directory`` and its packages anew."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and directory in Path(file).parents:
            del sys.modules[name]
