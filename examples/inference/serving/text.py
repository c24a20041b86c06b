"""From tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"  # what a part of a character is decoded to


_CONTEXT = 8  # tokens: more than a character or a decoder's replacement spans


class TokenText:
    """The text of tokens as they come.

    A token may be a part of a character, and a character may look different behind others: text is
    decoded together with the tokens of the piece before, and held back while it may not be whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        """Begin behind the tokens of a prompt: decoders drop the space of a text's first word."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = list(prompt[-_CONTEXT:])
        self._before = len(self._tokens)  # tokens in front of those whose text is still to come

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
        text = self._tokenizer.decode(self._tokens)
        if not text.startswith(known):  # a prompt may end in a part of a character
            known = known.rstrip(_UNFINISHED)
        return text[len(known) :]


def _begun(stop: str, text: str) -> int:
    """Return how many characters of a stop string, but not all, a text ends with."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


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
        keep = max((_begun(stop, text) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """Return what was held back, where no more text comes."""
        held, self._held = self._held, ""
        return held
