"""What a figure was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
from pathlib import Path

import torch

import flash_attn
from flash_attn import _library


def cpu_model() -> str:
    """Name of the CPU as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def slug() -> str:
    """A directory name for results: CPU, instruction set and threads."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|processor|@.*", " ", cpu_model(), flags=re.IGNORECASE)
    text = f"{words} {_library.cpu_isa()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe() -> dict[str, str | int]:
    """CPU, cores this process may use, threads, instruction set in use and versions."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": _library.cpu_isa(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "flash_attn": flash_attn.__version__,
        "date": datetime.date.today().isoformat(),
    }


def summary() -> str:
    """``describe()`` as one line."""
    m = describe()
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads; flash_attn {m['flash_attn']} on "
        f"{m['isa']}; torch {m['torch']} on {m['torch_isa']}; Python {platform.python_version()}"
    )


if __name__ == "__main__":
    print(slug() if "--slug" in sys.argv else summary())
