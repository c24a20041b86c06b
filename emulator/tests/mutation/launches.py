"""Cases of tools/mutate.py out of the calls of tools/gpu_launches.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Callable

import torch

import flash_attn

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))
import gpu_launches

TOLERANCE = 0.03


def _is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    same = torch.isclose(actual.float(), expected.float(), rtol=0, atol=TOLERANCE, equal_nan=True)
    return bool(same.all())


def run_of(*names: str) -> Callable[[], bool]:
    """A case's ``run``: the calls of these names give what they give on the CPU, whose backend has
    the expected results: what is deleted is CUDA's."""
    calls = [gpu_launches.calls("bf16", "cpu")[name] for name in names]
    expected = [call() for call in calls]
    # Entered for good: the tool sets the options that change.
    library = os.environ.get("GPU_EMULATOR_LIBRARY")
    flash_attn.emulator("sm_80", library=library, threads=1).__enter__()

    def run() -> bool:
        results = [(call(), exact) for call, exact in zip(calls, expected)]
        return all(_is_close(x, y) for actual, exact in results for x, y in zip(actual, exact))

    return run
