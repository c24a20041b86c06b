"""Tables of kernels in Markdown."""

from __future__ import annotations

import re

DTYPES = ("fp16", "bf16")


def markdown(header: list[str], rows: list[list]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def alike(rows: list[list[str]]) -> list[list[str]]:
    """Return ``rows``, which begin with a kernel's name, with one for all dtypes if they agree."""
    groups: dict[tuple, list[str]] = {}
    for kernel, *rest in rows:
        name = re.sub(f"_({'|'.join(DTYPES)})_", "_*_", kernel)
        groups.setdefault((name, *rest), []).append(kernel)
    return [
        [kernel, *rest]
        for (name, *rest), kernels in groups.items()
        for kernel in ([name] if len(kernels) == len(DTYPES) else kernels)
    ]
