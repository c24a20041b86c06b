"""One sequence that is being generated: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import torch
from tokenizers import Tokenizer

from flash_attn.utils.generation import Sampling
from flash_attn.utils.paged_cache import CachedSequence

_UNFINISHED = "\ufffd"  # what a part of a character is decoded to


class TokenText:
    """The text of tokens as they come.

    A token may be a part of a character, and a character may look different behind others: text is
    decoded together with the tokens of the piece before, and held back while it may not be whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._before = 0  # tokens in front of those whose text is out already

    def push(self, token: int) -> str:
        """Return the text that a token completes, possibly none."""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        del self._tokens[: self._before]
        self._before = len(self._tokens)
        return text

    def rest(self) -> str:
        """Return the text that was held back, after the last token."""
        return self._new_text()

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._tokens[: self._before])
        return self._tokenizer.decode(self._tokens)[len(known) :]


class StopText:
    """Text up to the first of some strings; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.is_over = False

    def push(self, text: str) -> str:
        """Return the text that can be given away."""
        text = self._held + text
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self._held, self.is_over = "", True
            return text[: min(found)]
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """Return what was held back, where no more text comes."""
        held, self._held = self._held, ""
        return held


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
