"""Fused operators beside the same by PyTorch's operations, eager and compiled, on the CPU.

    python benchmarks/benchmark_ops.py --op cross_entropy linear_cross_entropy --out ops.csv

Calls are measured in turns, so that whatever else the machine does meets all of them alike; a row
of the CSV has their medians. ``share_of_copy``: the bytes that the operator must move, divided by
its time, over the rate at which torch copies as many.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable, Optional

import torch
import torch.nn.functional as F

from flash_attn.losses.cross_entropy import linear_cross_entropy_loss
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

COLUMNS = "operator,direction,shape,dtype,ours_ms,eager_ms,compiled_ms,share_of_copy"


@dataclass
class Case:
    """A row: functions of no arguments that do the same."""

    operator: str
    direction: str  # fwd, or fwd_bwd
    shape: str
    dtype: torch.dtype
    ours: Callable
    eager: Callable
    compiled: Optional[Callable] = None
    bytes: int = 0  # that must be moved; 0: arithmetic is the bound


def both_directions(operator, shape, leaves, ours, eager, bytes, compiles) -> Iterator[Case]:
    """Yield an operator's forward, and forward with backward.

    Args:
        leaves: tensors that require gradients.
        ours, eager: functions of no arguments that return a loss.
        bytes: of each direction.
        compiles: whether torch.compile takes part, too.
    """
    compiled = torch.compile(eager) if compiles else None

    def forward(function):
        with torch.no_grad():
            function()

    def with_backward(function):
        for x in leaves:
            x.grad = None
        function().backward()

    for direction, step, moved in zip(("fwd", "fwd_bwd"), (forward, with_backward), bytes):
        functions = (f and (lambda f=f, step=step: step(f)) for f in (ours, eager, compiled))
        yield Case(operator, direction, shape, leaves[0].dtype, *functions, moved)


def cross_entropy(dtype, scale, compiles) -> Iterator[Case]:
    """Logits are read once a direction, and their gradient is written."""
    for rows, classes in ((8192, 32768), (1024, 131072)):
        rows = max(rows // scale, 1)
        logits = torch.randn(rows, classes, dtype=dtype).requires_grad_()
        labels = torch.randint(0, classes, (rows,))
        yield from both_directions(
            "cross_entropy",
            f"{rows}x{classes}",
            [logits],
            lambda x=logits, y=labels: cross_entropy_loss(x, y)[0].mean(),
            lambda x=logits, y=labels: F.cross_entropy(x, y),
            [logits.nbytes, 3 * logits.nbytes],
            compiles,
        )


def linear_cross_entropy(dtype, scale, compiles) -> Iterator[Case]:
    rows, features, classes = max(8192 // scale, 1), 256, 32768
    hidden = torch.randn(rows, features, dtype=dtype).requires_grad_()
    weight = (torch.randn(classes, features) / 16).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (rows,))
    yield from both_directions(
        "linear_cross_entropy",
        f"{rows}x{features}x{classes}",
        [hidden, weight],
        lambda: linear_cross_entropy_loss(hidden, weight, labels),
        lambda: F.cross_entropy(F.linear(hidden, weight), labels),
        [0, 0],
        compiles,
    )


OPERATORS = {"cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy}


def medians(functions, rounds) -> list[float]:
    """Return the median time of each function, ms; the first round does not count."""
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for of_function, function in zip(times, functions):
            start = time.perf_counter()
            function()
            of_function.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(x[1:]) for x in times]


def row(case: Case, rounds: int) -> list:
    """Measure a case."""
    functions = [f for f in (case.ours, case.eager, case.compiled) if f is not None]
    if case.bytes:  # a copy reads and writes them
        source = torch.ones(case.bytes // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        functions.append(lambda: target.copy_(source))
    ours, eager, *others = medians(functions, rounds)
    compiled = f"{others[0]:.1f}" if case.compiled else ""
    share = f"{others[-1] / ours:.2f}" if case.bytes else ""
    name = str(case.dtype).removeprefix("torch.")
    return [case.operator, case.direction, case.shape, name, f"{ours:.1f}", f"{eager:.1f}",
            compiled, share]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shrink", type=int, default=1, help="divide the rows by this")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    parser.add_argument("--out", help="a CSV file; otherwise it is printed")
    arguments = parser.parse_args()
    with open(arguments.out, "w") if arguments.out else sys.stdout as out:
        writer = csv.writer(out)
        writer.writerow(COLUMNS.split(","))
        for name in arguments.op:
            for dtype in arguments.dtype:
                cases = OPERATORS[name](getattr(torch, dtype), arguments.shrink, arguments.compile)
                for case in cases:
                    writer.writerow(row(case, arguments.rounds))
                    out.flush()


if __name__ == "__main__":
    main()
