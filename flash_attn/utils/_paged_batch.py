"""Generation of a batch over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from torch import Tensor, nn

from flash_attn.utils._prompts import Prompts
from flash_attn.utils.paged_cache import CachedSequence, PagedKVCache


class PagedBatch:
    """A model with a paged cache for a batch of prompts, as ``Decoding`` drives it.

    All blocks are reserved at the first call, so that none is missing later.
    """

    def __init__(
        self, model: nn.Module, cache: PagedKVCache, prompts: Prompts, limits: Sequence[int]
    ):
        """Check that the sequences, of ``limits`` tokens each in the end, fit into the cache.

        Raises:
            ValueError: one is longer than any sequence can be.
        """
        if not isinstance(cache, PagedKVCache):
            raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
        if max(limits) - 1 > cache.max_seqlen:
            raise ValueError(
                f"{max(limits)} tokens (max_length, or prompt and max_new_tokens) exceed the "
                f"{cache.max_seqlen} that a sequence of the cache can have"
            )
        self._model, self._cache, self._limits = model, cache, limits
        self._prompts = [row.tolist() for row in prompts.rows]
        self._sequences: list[CachedSequence] = []

    def prefill(self) -> Tensor:
        """Run what the cache does not have of the prompts: logits ``(batch, vocab)``."""
        cache = self._cache
        self._sequences = sequences = [cache.add(prompt) for prompt in self._prompts]
        # The last token of a sequence is not run through the model.
        new = [limit - 1 - s.length for s, limit in zip(sequences, self._limits)]
        cache.reserve(sequences, new)
        tokens = [prompt[s.length :] for s, prompt in zip(sequences, self._prompts)]
        return cache.step(self._model, sequences, tokens)

    def step(self, tokens: Tensor, is_over: Optional[Tensor]) -> Tensor:
        """Run one more token of each sequence that is not over: logits ``(batch, vocab)``."""
        over = [False] * len(tokens) if is_over is None else is_over.tolist()
        going = [i for i, ends in enumerate(over) if not ends]
        for i, ends in enumerate(over):
            if ends:
                self._cache.free(self._sequences[i])
        new = tokens.tolist()
        logits = self._cache.step(
            self._model, [self._sequences[i] for i in going], [[new[i]] for i in going]
        )
        if len(going) == len(over):
            return logits
        whole = logits.new_zeros(len(over), logits.shape[-1])
        whole[going] = logits
        return whole

    def close(self) -> None:
        """Give all blocks back; the cache still knows full ones by their tokens."""
        for sequence in self._sequences:
            self._cache.free(sequence)
