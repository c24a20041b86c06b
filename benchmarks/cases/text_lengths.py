"""Lengths of real texts for varlen batches: the Python standard library of this interpreter.

A token is a word, a number or a single other character.
"""

from __future__ import annotations

import functools
import re
import sysconfig
from pathlib import Path

_TOKEN = re.compile(rb"\w+|[^\w\s]")
_PARAGRAPH = re.compile(rb"\n\s*\n")
_LONGEST = 4096  # where a trainer would cut a document
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_EVERY = 7  # one file in so many, so that neighbours come from different packages


@functools.cache
def _texts() -> list[bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not _LEFT_OUT & set(path.relative_to(root).parts) and path.is_file()
    )
    return [path.read_bytes() for path in files[::_EVERY]]


def _count(text: bytes) -> int:
    return len(_TOKEN.findall(text))


def _until(lengths, total: int) -> tuple[int, ...]:
    """Lengths from the first on, as long as their sum stays within ``total``."""
    taken = []
    for length in lengths:
        if sum(taken) + length > total:
            break
        taken.append(length)
    return tuple(taken)


def documents(total: int = 16384) -> tuple[int, ...]:
    """Tokens of whole modules, at most 4096 each: a few long ones, many short ones."""
    return _until((min(n, _LONGEST) for text in _texts() if (n := _count(text))), total)


def paragraphs(total: int = 4096) -> tuple[int, ...]:
    """Tokens of blocks between empty lines: most are under a hundred."""
    blocks = (block for text in _texts() for block in _PARAGRAPH.split(text))
    return _until((n for block in blocks if (n := _count(block))), total)


DISTRIBUTIONS = {"documents": documents, "paragraphs": paragraphs}
