"""For tests of the repository's scripts, which are no package, and those that run in a process of
their own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from flash_attn import _library

ROOT = Path(__file__).resolve().parents[2]


def forget_modules(directory: Path) -> None:
    """Let a later import read the modules of ``directory`` and its packages anew."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and directory in Path(file).parents:
            del sys.modules[name]


def import_script(path: Path) -> ModuleType:
    """The module that a script is, by its name; what it does as a program is left out."""
    sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(path.stem)
    finally:
        sys.path.remove(str(path.parent))


def report_of_emulated_driver(script: str, *arguments: str) -> dict:
    """The JSON object that a script prints in a process whose CUDA driver is the emulated GPU."""
    driver = _library.library_path().parent / "libgpu_emulator.so"
    env = {**os.environ, "FLASH_ATTENTION_CUDA_DRIVER": str(driver)}
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
