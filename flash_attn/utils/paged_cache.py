"""A cache of keys and values in blocks, which sequences take as they grow and share where they
begin with the same tokens.

```python
cache = PagedKVCache.for_model(model, num_blocks=1024, block_size=16)
a, b = cache.add(prompt_a), cache.add(prompt_b)          # lists of ints; finds known prefixes
logits = cache.step(model, [a, b], [prompt_a[a.length:], prompt_b[b.length:]])   # (2, vocab)
logits = cache.step(model, [a, b], [[token_a], [token_b]])
cache.free(a)
```

A call may mix prompts, parts of prompts and single tokens: what a server with continuous batching
does at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import torch
from torch import Tensor, nn

from flash_attn._arguments import as_int
from flash_attn.utils._block_allocator import ROOT, BlockAllocator, CacheFullError
from flash_attn.utils._decoding import takes_packing
from flash_attn.utils._inference_params import InferenceParams, Packing
from flash_attn.utils._prompts import position_limit

__all__ = ["BlockAllocator", "CacheFullError", "CachedSequence", "PagedKVCache"]


def _as_ints(tokens: Union[Tensor, Sequence[int]]) -> list[int]:
    """Return tokens, of a tensor ``(seqlen,)`` too, as ints."""
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)


class CachedSequence:
    """A sequence in a ``PagedKVCache``.

    Attributes:
        tokens: those whose keys and values the cache has.
        blocks: numbers of the blocks that they lie in, and of those reserved behind.
    """

    def __init__(self):
        self.tokens: list[int] = []
        self.blocks: list[int] = []
        self.is_open = True
        self._nodes: list[int] = []  # of its full blocks
        self._table = torch.zeros(8, dtype=torch.int32)  # its blocks, and zeros

    @property
    def length(self) -> int:
        """Number of tokens whose keys and values the cache has."""
        return len(self.tokens)

    def _set_block(self, place: int, block: int) -> None:
        if place == len(self.blocks):
            self.blocks.append(block)
        else:
            self.blocks[place] = block
        if place == len(self._table):
            self._table = torch.cat((self._table, torch.zeros_like(self._table)))
        self._table[place] = block

    def _row(self, width: int) -> Tensor:
        """Return int32 ``(width,)``, the numbers of its blocks, and zeros."""
        row = self._table[:width]
        return row if len(row) == width else nn.functional.pad(row, (0, width - len(row)))


class PagedKVCache:
    """Keys and values of many sequences in blocks of ``block_size`` tokens.

    Attributes:
        key_value_memory_dict: for each layer's index ``(num_blocks, block_size, 2, heads_k,
            head_dim)``.
        allocator: of the blocks, the same numbers in every layer.
        max_seqlen: tokens that a sequence can have.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        layers: Union[int, Sequence[int]],
        heads_k: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device=None,
        *,
        share_prefixes: bool = True,
        max_seqlen: Optional[int] = None,
    ):
        """Make the cache, not initialised.

        Args:
            num_blocks: number of blocks.
            block_size: tokens of a block.
            layers: their number, or their indices.
            heads_k: heads of keys and values, of this process.
            head_dim: of keys and values.
            share_prefixes: whether sequences that begin with the same tokens share full blocks,
                also with sequences that are gone.
            max_seqlen: tokens that a sequence can have at most; None: what the blocks hold.

        Raises:
            ValueError: a number is not positive.
        """
        sizes = {"num_blocks": num_blocks, "block_size": block_size}
        sizes.update(heads_k=heads_k, head_dim=head_dim)
        for name, size in sizes.items():
            if as_int(name, size) < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (num_blocks, block_size, 2, heads_k, head_dim)
        indices = range(layers) if isinstance(layers, int) else layers
        self.key_value_memory_dict = {
            i: torch.empty(shape, dtype=dtype, device=device) for i in indices
        }
        self.share_prefixes = share_prefixes
        self.allocator = BlockAllocator(num_blocks)
        self.max_seqlen = min(max_seqlen or num_blocks * block_size, num_blocks * block_size)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        num_blocks: int,
        block_size: int = 16,
        dtype: Optional[torch.dtype] = None,
        **options,
    ) -> PagedKVCache:
        """Return a cache for a model whose mixers are ``flash_attn.modules.mha``'s.

        Args:
            dtype: None: that of the output projections.
            options: more arguments of the class. Prefixes are not shared by default where keys
                depend on how long the sequence is ("dynamic" and "longrope" rotary embedding).

        Raises:
            ValueError: the model has no such mixers, or mixers of different heads.
        """
        from flash_attn.modules._heads import HeadAttention

        mixers = [m for m in model.modules() if isinstance(m, HeadAttention)]
        sizes = {(m._heads.num_heads_kv, m.head_dim) for m in mixers}
        if len(sizes) != 1:
            raise ValueError(
                "model must have flash_attn.modules.mha's mixers, all of the same heads, got "
                f"(num_heads_kv, head_dim) {sorted(sizes)}"
            )
        weight = mixers[0].out_proj.weight
        options.setdefault("max_seqlen", position_limit(model))
        rotary = [getattr(m, "rotary_emb", None) for m in mixers]
        is_fixed = not any(getattr(each, "depends_on_length", False) for each in rotary)
        options.setdefault("share_prefixes", is_fixed)
        return cls(
            num_blocks,
            block_size,
            [m.layer_idx for m in mixers],
            *sizes.pop(),
            dtype or weight.dtype,
            weight.device,
            **options,
        )

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that no sequence holds."""
        return self.allocator.num_free

    @property
    def device(self) -> torch.device:
        return next(iter(self.key_value_memory_dict.values())).device

    def add(self, tokens: Union[Tensor, Sequence[int]]) -> CachedSequence:
        """Return a new sequence that has what the cache knows of the beginning of ``tokens``.

        At least the last token is not taken from the cache, so that a call of the model gives its
        logits. Nothing is computed, and no block taken that was free.
        """
        sequence, size = CachedSequence(), self.block_size
        if not self.share_prefixes:
            return sequence
        tokens = _as_ints(tokens)
        node = ROOT
        for first in range(0, len(tokens) - size, size):
            known = self.allocator.find(node, tuple(tokens[first : first + size]))
            if known is None:
                break
            node = known.node
            self.allocator.hold([known.block])
            sequence._set_block(first // size, known.block)
            sequence._nodes.append(node)
        sequence.tokens = tokens[: len(sequence.blocks) * size]
        return sequence

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """Return another sequence of the same tokens. Blocks are copied when one of them writes."""
        self._check_open(sequence)
        other = CachedSequence()
        held = -(-sequence.length // self.block_size)
        for place, block in enumerate(sequence.blocks[:held]):
            other._set_block(place, block)
        self.allocator.hold(other.blocks)
        other.tokens, other._nodes = list(sequence.tokens), list(sequence._nodes)
        return other

    def free(self, sequence: CachedSequence) -> None:
        """Give a sequence's blocks back; it can be used no more. Done twice, it has no effect."""
        if sequence.is_open:
            self.allocator.release(sequence.blocks)
            sequence.blocks, sequence.is_open = [], False

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Forget a sequence's tokens from ``length`` on, and what is reserved.

        Raises:
            ValueError: it has fewer tokens.
        """
        self._check_open(sequence)
        if not 0 <= length <= sequence.length:
            raise ValueError(f"length must be from 0 to {sequence.length}, got {length}")
        held = -(-length // self.block_size)
        self.allocator.release(sequence.blocks[held:])
        del sequence.blocks[held:], sequence.tokens[length:]
        del sequence._nodes[length // self.block_size :]

    def forget_prefixes(self) -> None:
        """Find no known prefix any more: after the model's weights have changed."""
        self.allocator.forget_all()

    def blocks_needed(self, sequence: CachedSequence, count: int) -> int:
        """Return how many free blocks ``count`` more tokens of a sequence take."""
        new = -(-(sequence.length + count) // self.block_size) - len(sequence.blocks)
        return max(new, 0) + (count > 0 and self._must_copy(sequence))

    def reserve(self, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> None:
        """Make room for ``counts[i]`` more tokens of each sequence.

        Raises:
            CacheFullError: there are too few blocks; nothing was changed.
            ValueError: a sequence would get too long, or was freed; nothing was changed.
        """
        for sequence, count in zip(sequences, counts):
            self._check_open(sequence)
            if sequence.length + count > self.max_seqlen:
                raise ValueError(
                    f"{count} tokens after {sequence.length} exceed the {self.max_seqlen} that a "
                    "sequence can have"
                )
        self.allocator.check(sum(map(self.blocks_needed, sequences, counts)))
        for sequence, count in zip(sequences, counts):
            self._reserve(sequence, count)

    def _check_open(self, sequence: CachedSequence) -> None:
        if not sequence.is_open:
            raise ValueError("the sequence was freed")

    def _must_copy(self, sequence: CachedSequence) -> bool:
        """Whether others hold the block that the next token is written to."""
        place = sequence.length // self.block_size
        return place < len(sequence.blocks) and self.allocator.holders(sequence.blocks[place]) > 1

    def _reserve(self, sequence: CachedSequence, count: int) -> None:
        place = sequence.length // self.block_size
        if count > 0 and self._must_copy(sequence):
            old, (new,) = sequence.blocks[place], self.allocator.allocate(1)
            for memory in self.key_value_memory_dict.values():
                memory[new] = memory[old]
            sequence._set_block(place, new)
            self.allocator.release([old])
        if count > 0 and place < len(sequence.blocks):  # it was full, and is written to again
            self.allocator.unregister(sequence.blocks[place])
        for block in self.allocator.allocate(self.blocks_needed(sequence, count)):
            sequence._set_block(len(sequence.blocks), block)

    def _append(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        """Note that a sequence's blocks have more tokens, and let full ones be found."""
        sequence.tokens.extend(tokens)
        if not self.share_prefixes:
            return
        size, nodes = self.block_size, sequence._nodes
        for i in range(len(nodes), sequence.length // size):
            part = tuple(sequence.tokens[i * size : (i + 1) * size])
            parent = nodes[-1] if nodes else ROOT
            nodes.append(self.allocator.register(sequence.blocks[i], parent, part))

    def inference_params(
        self, sequences: Sequence[CachedSequence], counts: Sequence[int]
    ) -> InferenceParams:
        """Return what a model needs to append ``counts[i]`` tokens to each sequence.

        There must be room for them. With one token each the model's input is ``(batch, 1)``,
        otherwise one row, ``(1, total)``, as ``packing`` says.
        """
        widest = max(len(sequence.blocks) for sequence in sequences)
        width = 1 << (widest - 1).bit_length()  # of few sizes: tables of rotary embedding follow it
        table = torch.stack([sequence._row(width) for sequence in sequences]).to(self.device)
        lengths = [sequence.length for sequence in sequences]
        params = InferenceParams(
            max_seqlen=width * self.block_size,
            max_batch_size=len(sequences),
            seqlen_offset=max(lengths),
            key_value_memory_dict=self.key_value_memory_dict,
            block_table=table,
        )
        if all(count == 1 for count in counts):
            as_int32 = {"dtype": torch.int32, "device": self.device}
            params.lengths_per_sample = torch.tensor(lengths, **as_int32)
        else:
            params.packing = Packing(counts, lengths, self.device)
            params.lengths_per_sample = params.packing.starts
        return params

    @torch.inference_mode()
    def step(
        self,
        model: nn.Module,
        sequences: Sequence[CachedSequence],
        tokens: Sequence[Union[Tensor, Sequence[int]]],
    ) -> Tensor:
        """Append tokens to sequences.

        Args:
            model: as ``flash_attn.utils.generation`` calls it, with mixers that use flash attention
                and ``takes_packed_tokens``.
            sequences: of this cache, each once.
            tokens: the next ones of each sequence, at least one.

        Returns:
            Logits after the last token of each sequence, ``(batch, vocab)``.

        Raises:
            CacheFullError: there are too few free blocks; nothing was changed.
            ValueError: a sequence has no new token, is too long, or was freed; the model cannot
                read a paged cache. Nothing was changed.
        """
        tokens = [_as_ints(new) for new in tokens]
        counts = [len(new) for new in tokens]
        if len(counts) != len(sequences) or not counts or min(counts) < 1:
            raise ValueError(
                f"each of {len(sequences)} sequences needs at least one new token, got {counts}"
            )
        if len(set(map(id, sequences))) != len(sequences):
            raise ValueError("a sequence is given twice")
        if not takes_packing(model):
            raise ValueError(
                "a paged cache needs a model with takes_packed_tokens and use_flash_attn=True"
            )
        self.reserve(sequences, counts)
        params = self.inference_params(sequences, counts)
        ids = torch.tensor([token for new in tokens for token in new], device=self.device)
        if params.packing is None:
            ids, position_ids = ids[:, None], params.lengths_per_sample[:, None].long()
        else:
            ids, position_ids = ids[None], params.packing.positions[None]
        logits = model(
            ids, position_ids=position_ids, inference_params=params, num_last_tokens=1
        ).logits
        for sequence, new in zip(sequences, tokens):
            self._append(sequence, new)
        return logits[:, -1]
