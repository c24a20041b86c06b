"""Messages between the processes of a ring."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn.distributed._blocks import Hop

_ready: WeakSet = WeakSet()  # groups whose processes are connected


class Message(NamedTuple):
    """A tensor to or from another process."""

    tensor: Tensor
    rank: int  # of that process in the group


class Batch:
    """Messages under way, and the tensors that they read and write."""

    def __init__(self, group, sent: list[Message], received: list[Message]):
        # Empty tensors are not sent: both sides know their shapes.
        operations = [
            dist.P2POp(operation, m.tensor, dist.get_global_rank(group, m.rank), group)
            for operation, messages in ((dist.isend, sent), (dist.irecv, received))
            for m in messages
            if m.tensor.numel()
        ]
        self._held = sent, received
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        """Return when (on CUDA: let the current stream wait until) all have arrived and left."""
        for work in self._works:
            work.wait()
        self._held = self._works = ()


def make_ready(group, device: torch.device) -> None:
    """Connect the processes of an NCCL group, which its first message asks of all at once."""
    if device.type != "cuda" or group in _ready:
        return
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    _ready.add(group)


class Ring:
    """What a process sends and receives at each stage of a plan; stage 0 has its own keys."""

    def __init__(self, group, rank: int, size: int, hops: list[Hop]):
        self.group, self.rank, self.size, self.hops = group, rank, size, hops

    @property
    def stages(self) -> int:
        return len(self.hops) + 1

    def _shift(self, stage: int) -> int:
        return self.hops[stage - 1].shift if stage else 0

    def source(self, stage: int) -> int:
        """The process whose keys are here."""
        return (self.rank - self._shift(stage)) % self.size

    def _holder(self, source: int, stage: int) -> int:
        return (source + self._shift(stage)) % self.size

    def has(self, stage: int, source: int) -> bool:
        """Whether the keys of a process are with anyone at a stage."""
        if stage >= self.stages:
            return False
        return stage == 0 or self.hops[stage - 1].carried[self._holder(source, stage)]

    def _contributions(self, stage: int, source: int) -> int:
        """Blocks in the gradient of a process' keys that travels, when the stage is over."""
        return self.hops[stage - 1].contributions[self._holder(source, stage)] if stage else 0

    def pass_keys(self, stage: int, held: list[Tensor], new) -> tuple[Batch, list[Tensor]]:
        """Send what is here to who has it next, and receive what is here next.

        Args:
            stage: the one that is over.
            held: k and v.
            new: makes the buffers of the keys of a process.

        Returns:
            the messages, and the buffers, [] if none is received.
        """
        source, sent, received = self.source(stage), [], []
        if self.has(stage + 1, source):
            sent = [Message(x, self._holder(source, stage + 1)) for x in held]
        buffers: list[Tensor] = []
        if stage + 1 < self.stages and self.has(stage + 1, self.source(stage + 1)):
            coming = self.source(stage + 1)
            buffers = new(coming)
            received = [Message(x, self._holder(coming, stage)) for x in buffers]
        return Batch(self.group, sent, received), buffers

    def pass_gradients(self, stage: int, results, new) -> tuple[Batch, list[Tensor], list[Tensor]]:
        """Send the gradient of the keys that are here with them, or home where they go no further.

        Args:
            stage: the one that is over.
            results: ``results(contributions)`` are dk and dv to send.
            new: ``new(source, contributions)`` makes the buffers of those of a process.

        Returns:
            the messages, the buffers of what belongs to the keys of the next stage, and of what has
            come home.
        """
        sent, received = [], []
        source, contributions = self.source(stage), self._contributions(stage, self.source(stage))
        if self.has(stage, source) and contributions:
            onwards = self.has(stage + 1, source)
            peer = self._holder(source, stage + 1) if onwards else source
            sent = [Message(x, peer) for x in results(contributions)]
        coming: list[Tensor] = []
        if stage + 1 < self.stages:
            next_source = self.source(stage + 1)
            if self.has(stage + 1, next_source) and self._contributions(stage, next_source):
                coming = new(next_source, self._contributions(stage, next_source))
                received += [Message(x, self._holder(next_source, stage)) for x in coming]
        home: list[Tensor] = []
        ends = self.has(stage, self.rank) and not self.has(stage + 1, self.rank)
        if ends and self._contributions(stage, self.rank):
            home = new(self.rank, self._contributions(stage, self.rank))
            received += [Message(x, self._holder(self.rank, stage)) for x in home]
        return Batch(self.group, sent, received), coming, home
