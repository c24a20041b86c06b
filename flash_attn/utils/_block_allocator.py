"""The blocks of a paged cache by number: who holds them, and which tokens they have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import count
from typing import NamedTuple, Optional

ROOT = 0  # the node before the first block of every sequence


class CacheFullError(RuntimeError):
    """A paged cache has too few free blocks; nothing was changed."""


class Prefix(NamedTuple):
    """A block, and the node of the tokens up to its end."""

    block: int
    node: int


class BlockAllocator:
    """Numbers of blocks with reference counts.

    A full block can be registered under its tokens and the node of those before it, so that a
    sequence that begins with the same tokens finds it: by the tokens themselves, not by a hash that
    others could have, too. A registered block that nobody holds stays until its memory is needed,
    the one that was left first going first.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._prefixes: dict[tuple, Prefix] = {}
        self._keys: dict[int, tuple] = {}
        self._nodes = count(ROOT + 1)

    @property
    def num_free(self) -> int:
        """Number of blocks that ``allocate`` can hand out."""
        return len(self._free) + len(self._idle)

    def holders(self, block: int) -> int:
        """Return how many hold a block."""
        return self._holders[block]

    def is_registered(self, block: int) -> bool:
        """Whether a block can be found by its tokens."""
        return block in self._keys

    def check(self, needed: int) -> None:
        """Raise CacheFullError if fewer than ``needed`` blocks are free."""
        if needed > self.num_free:
            raise CacheFullError(
                f"{needed} blocks are needed, {self.num_free} of {self.num_blocks} are free"
            )

    def allocate(self, needed: int) -> list[int]:
        """Return blocks that the caller is the only holder of.

        Raises:
            CacheFullError: there are too few; nothing was changed.
        """
        self.check(needed)
        blocks = []
        for _ in range(needed):
            if not self._free:
                block, _ = self._idle.popitem(last=False)
                self._forget(block)
                self._free.append(block)
            blocks.append(self._free.pop())
            self._holders[blocks[-1]] = 1
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Be one more holder of blocks."""
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)

    def release(self, blocks: Iterable[int]) -> None:
        """Hold blocks no more. Those given first are found the longest."""
        for block in reversed(list(blocks)):
            if self._holders[block] < 1:
                raise ValueError(f"block {block} has no holder")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def find(self, parent: int, tokens: tuple[int, ...]) -> Optional[Prefix]:
        """Return the block of tokens after a node, if one is registered."""
        return self._prefixes.get((parent, tokens))

    def register(self, block: int, parent: int, tokens: tuple[int, ...]) -> int:
        """Let a full block be found, unless another one has its tokens; return their node."""
        key = (parent, tokens)
        known = self._prefixes.get(key)
        if known is not None:
            return known.node
        prefix = Prefix(block, next(self._nodes))
        self._prefixes[key], self._keys[block] = prefix, key
        return prefix.node

    def unregister(self, block: int) -> None:
        """Let a block that is held be found no more."""
        if block in self._keys:
            self._forget(block)

    def forget_all(self) -> None:
        """Let no block be found that is registered now."""
        for block in list(self._keys):
            self._forget(block)
        self._free.extend(self._idle)
        self._idle.clear()

    def _forget(self, block: int) -> None:
        del self._prefixes[self._keys.pop(block)]
