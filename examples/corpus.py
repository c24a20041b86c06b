"""Real text that is on every machine: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_HELD_OUT = 20  # every twentieth file is for validation


def source_files() -> list[Path]:
    """The files, by name; tests are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts) and path.is_file()
    )


def load_corpus() -> tuple[Tensor, Tensor]:
    """Training and validation bytes, uint8, of different files."""
    texts = [path.read_bytes() for path in source_files()]
    held_out = b"".join(texts[::_HELD_OUT])
    del texts[::_HELD_OUT]
    return tuple(
        torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (b"".join(texts), held_out)
    )


def random_batch(
    text: Tensor, batch: int, seqlen: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random places of the text: bytes and, for each, the byte after it; int64 (batch, seqlen)."""
    starts = torch.randint(len(text) - seqlen, (batch, 1), generator=generator)
    windows = text[starts + torch.arange(seqlen + 1)].long()
    return windows[:, :-1], windows[:, 1:]
