"""Calls that every process of a group makes alike, or that fail on every one.

A process that raised while the others wait for its keys would leave them waiting. So before
anything is sent, each tells the others what it was called with: a vector of a few numbers.
"""

from __future__ import annotations

import struct
from typing import Callable, NamedTuple, Optional

import torch
import torch.distributed as dist

from flash_attn.utils.distributed import all_gather_raw, group_rank, group_size

_CELLS = 32  # of the vector; the same for every kind of call, so that those can be told apart
_FAILED = -1
_KINDS = ("ring attention", "packed ring attention", "Ulysses attention",
          "packed Ulysses attention", "hybrid attention", "sharing of tokens")  # fmt: skip


class Call(NamedTuple):
    """What a process tells of its call."""

    kind: str
    same: dict  # name -> number or bool, equal on every process
    own: dict  # name -> int, of this process

    def encoded(self) -> list[int]:
        numbers = [_KINDS.index(self.kind)]
        for x in (*self.same.values(), *self.own.values()):
            numbers.append(struct.unpack("q", struct.pack("d", x))[0] if _is_float(x) else int(x))
        return numbers + [0] * (_CELLS - len(numbers))


def _is_float(x) -> bool:
    return isinstance(x, float)


def exchange_device(group, device: Optional[torch.device]) -> torch.device:
    """Where small tensors are exchanged: on the CPU if the group can, which waits for no kernel."""
    backends = dist.get_backend_config(group)
    if "cpu:" in backends or backends == "gloo":
        return torch.device("cpu")
    return device if device is not None and device.type != "cpu" else torch.device("cuda")


def agreed(make: Callable[[], Call], group, device) -> list[dict]:
    """Return ``own`` of every process' call, after all were found to be alike.

    Args:
        make: makes this process' call; may raise.
        group: of two processes or more.
        device: of the call's tensors.

    Raises:
        ValueError: another process' call failed or differs, on every process.
        Exception: what ``make`` raised, on this process.
    """
    call, error = None, None
    try:
        call = make()
        cells = call.encoded()
    except Exception as raised:  # raised again below, when the others know
        error, cells = raised, [_FAILED] * _CELLS
    vector = torch.tensor([cells], dtype=torch.int64, device=exchange_device(group, device))
    rows = all_gather_raw(vector, group)[0].tolist()
    if any(row[0] == _FAILED for row in rows):
        _raise_failure(error, group)
    _check_alike(call, rows)
    own = list(call.own)
    first = 1 + len(call.same)
    return [dict(zip(own, row[first:])) for row in rows]


def _raise_failure(error: Optional[Exception], group) -> None:
    """Raise this process' error, or tell that of another one."""
    sentences: list = [None] * group_size(group)
    dist.all_gather_object(sentences, None if error is None else str(error), group=group)
    if error is not None:
        raise error
    rank = next(r for r, sentence in enumerate(sentences) if sentence is not None)
    raise ValueError(f"process {rank} of the group refused its arguments: {sentences[rank]}")


def _check_alike(call: Call, rows: list[list[int]]) -> None:
    for rank, row in enumerate(rows):
        if row[0] != rows[0][0]:
            raise ValueError(
                f"process {rank} of the group called {_KINDS[row[0]]}, process 0 "
                f"{_KINDS[rows[0][0]]}"
            )
        for cell, (name, x) in enumerate(call.same.items(), start=1):
            if row[cell] != rows[0][cell]:
                here, first = (_decoded(x, r[cell]) for r in (row, rows[0]))
                raise ValueError(
                    f"{name} must be the same on every process of the group, got {here} on process "
                    f"{rank} and {first} on process 0"
                )


def _decoded(example, cell: int):
    if _is_float(example):
        return struct.unpack("d", struct.pack("q", cell))[0]
    return bool(cell) if isinstance(example, bool) else cell


def rank_and_size(group) -> tuple[int, int]:
    """Return this process' place in the group and the group's size."""
    return group_rank(group), group_size(group)
