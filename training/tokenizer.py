"""Text to tokens and back: bytes, a BPE trained on the corpus, or a tokenizer's local folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from training.settings import DataSettings, SettingError

# Of a tokenizer's folder.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class TextTokenizer(Protocol):
    """end_of_text: the token after each document. digest: tells tokenizers apart."""

    vocab_size: int
    end_of_text: int
    digest: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Write what the tokenizers library and transformers read: tokenizer.json and more."""


class ByteTokenizer:
    """A token is a byte of UTF-8; byte 0, which text does not have, ends a document."""

    vocab_size = 256
    end_of_text = 0
    digest = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(map(int, tokens)).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        characters = _byte_characters()
        vocabulary = {character: byte for byte, character in enumerate(characters)}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        _write(folder, tokenizer.to_str(), characters[self.end_of_text])


def _byte_characters() -> list[str]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones for
    themselves, the others, in their order, from U+0100 on (Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def _write(folder: Path, content: str, end_of_text: str) -> None:
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
    }
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")


class BpeTokenizer:
    """A tokenizer.json, run by the tokenizers library."""

    def __init__(self, path: Path, end_of_text: str):
        from tokenizers import Tokenizer

        content = path.read_bytes()
        self._path, self._text = path, end_of_text
        self._tokenizer = Tokenizer.from_str(content.decode())
        self.vocab_size = self._tokenizer.get_vocab_size()
        token = self._tokenizer.token_to_id(end_of_text)
        if token is None:
            raise SettingError(f"data.end_of_text must be a token of {path}, got {end_of_text!r}")
        self.end_of_text = token
        self.digest = hashlib.sha256(content + end_of_text.encode()).hexdigest()[:24]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def save(self, folder: Path) -> None:
        if self._path.name != "tokenizer.json":  # of the corpus
            _write(folder, self._tokenizer.to_str(), self._text)
            return
        for name in _FILES:
            if (file := self._path.with_name(name)).is_file():
                shutil.copyfile(file, folder / name)


def train_bpe(texts: Iterable[str], vocab_size: int, end_of_text: str, path: Path) -> None:
    """Train a byte-level BPE (GPT-2's splitting) on texts and write its tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(tokenizer.to_str())
    partial.replace(path)


def load_tokenizer(settings: DataSettings, trained: Path) -> TextTokenizer:
    """Return the tokenizer of the settings; ``trained`` is where the corpus' own BPE lies."""
    if settings.tokenizer == "bytes":
        return ByteTokenizer()
    if settings.tokenizer == "bpe":
        return BpeTokenizer(trained, settings.end_of_text)
    return BpeTokenizer(Path(settings.tokenizer_folder) / "tokenizer.json", settings.end_of_text)
