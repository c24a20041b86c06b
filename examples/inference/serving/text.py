"""From tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

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
