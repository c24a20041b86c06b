"""One sequence that is being generated: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import torch

from flash_attn.utils.generation import Sampling
from flash_attn.utils.paged_cache import CachedSequence
from serving.text import StopText, TokenText


class Event(NamedTuple):
    """What a step of the scheduler did for a generation.

    Attributes:
        generation: whose.
        token: the new one; None with ``error``.
        text: that can be given away now.
        finish_reason: ``"stop"`` or ``"length"`` with the last token.
        error: why there will be no more.
    """

    generation: Generation
    token: Optional[int] = None
    text: str = ""
    finish_reason: Optional[str] = None
    error: Optional[BaseException] = None


@dataclass(eq=False)
class Generation:
    """A sequence that is being generated.

    Attributes:
        index: its place among the choices of its request.
        prompt: tokens, at least one.
        max_tokens: new tokens at most.
        sampling: how they are chosen.
        text: of the new tokens.
        stop_text: strings that end it.
        stop_tokens: tokens that end it; they have no text.
        sink: called with each ``Event``, on the scheduler's thread or where that hands them to.
        siblings: of the same prompt, to be split off once it has gone through the model.
        new_tokens: those generated so far.
        num_reused: tokens of the prompt that the cache had.
    """

    index: int
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    text: TokenText
    stop_text: StopText
    stop_tokens: frozenset[int] = frozenset()
    sink: Callable[[Event], object] = lambda event: None
    siblings: list[Generation] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    num_reused: Optional[int] = None
    is_cancelled: bool = False
    is_over: bool = False
    cached: Optional[CachedSequence] = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and result so far."""
        return len(self.prompt) + len(self.new_tokens)

    @property
    def num_pending(self) -> int:
        """Tokens that the cache does not have yet."""
        return self.num_tokens - (self.cached.length if self.cached else 0)

    @property
    def tokens(self) -> list[int]:
        """Prompt and result so far."""
        return self.prompt + self.new_tokens

    def pending(self, count: int) -> list[int]:
        """Return the next tokens that the cache is to have."""
        first = self.cached.length - len(self.prompt)
        if first >= 0:
            return self.new_tokens[first : first + count]
        return self.tokens[first + len(self.prompt) :][:count]

    def is_seen(self, vocab_size: int) -> Optional[torch.Tensor]:
        """Return which tokens it has, bool ``(vocab,)``, where sampling asks for that."""
        if not self.sampling.penalizes:
            return None
        seen = torch.zeros(vocab_size, dtype=torch.bool)
        seen[torch.tensor(self.tokens)] = True
        return seen

    def append(self, token: int) -> Event:
        """Take a new token, and say what follows from it."""
        self.new_tokens.append(token)
        reason, text = None, ""
        if token in self.stop_tokens:
            reason = "stop"
        else:
            text = self.stop_text.push(self.text.push(token))
            if self.stop_text.is_over:
                reason = "stop"
            elif len(self.new_tokens) >= self.max_tokens:
                reason = "length"
        if reason is not None and not self.stop_text.is_over:
            text += self.stop_text.push(self.text.rest())
            if self.stop_text.is_over:
                reason = "stop"
            text += self.stop_text.rest()
        self.is_over = reason is not None
        return Event(self, token, text, reason)
