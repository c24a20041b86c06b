"""Text files and JSON lines to token files, once for each set of sources and tokenizer."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from training.settings import DataSettings, SettingError
from training.token_file import TokenFileError, read_header, write_tokens
from training.tokenizer import TextTokenizer, load_tokenizer, train_bpe

_DOCUMENTS_AT_A_TIME = 256


class CorpusError(ValueError):
    """A source of text cannot be read as it should."""


@dataclass(frozen=True)
class Corpus:
    """The token files of a run; validation is None where nothing is held out."""

    tokenizer: TextTokenizer
    train: Path
    validation: Path | None


def find_files(name: str, patterns: list[str]) -> list[Path]:
    """Return the files of glob patterns, sorted by name. Raises SettingError if one has none."""
    files: set[str] = set()
    for pattern in patterns:
        found = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
        if not found:
            raise SettingError(f"data.{name} must match files, got {pattern!r}, which has none")
        files.update(found)
    return [Path(file) for file in sorted(files)]


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _is_json_lines(path: Path) -> bool:
    return ".jsonl" in path.suffixes[-2:]


def _json_documents(path: Path, json_field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[json_field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CorpusError(
                    f"line {number} of {path} must be a JSON object with data.json_field "
                    f"{json_field!r}: {type(error).__name__}: {error}"
                ) from None
            if not isinstance(text, str):
                raise CorpusError(f"{json_field!r} in line {number} of {path} must be text")
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON may have it
                raise CorpusError(
                    f"{json_field!r} in line {number} of {path} must be Unicode, got half of a "
                    f"surrogate pair, {text[error.start]!a}, at character {error.start}"
                ) from None
            yield text


def documents(files: Iterable[Path], settings: DataSettings) -> Iterator[str]:
    """Yield the documents of files, in their order; empty ones are left out."""
    for path in files:
        if _is_json_lines(path):
            texts = _json_documents(path, settings.json_field)
        else:
            with _open(path) as file:
                text = file.read().decode("utf-8", errors="replace")
            texts = [text] if settings.separator is None else text.split(settings.separator)
        yield from filter(None, texts)


def _held_out(index: int, every: int) -> bool:
    return every > 0 and index % every == every - 1


def _token_parts(texts: Iterable[str], tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    texts, end = iter(texts), np.array([tokenizer.end_of_text], np.int64)
    while batch := list(islice(texts, _DOCUMENTS_AT_A_TIME)):
        for tokens in tokenizer.encode_batch(batch):
            yield tokens
            yield end


def _digest(*things: object) -> str:
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:16]


class _Sources:
    """The files behind the settings, and the documents of either split."""

    def __init__(self, settings: DataSettings):
        self.settings = settings
        self._train = find_files("train", settings.train)
        self._validation = find_files("validation", settings.validation)
        self._hold_out = 0 if self._validation else settings.hold_out
        if self._hold_out:
            self._hold_out = self._at_most_all(self._hold_out)
        self.splits = ("train", "validation") if self._validation or self._hold_out else ("train",)

    def _at_most_all(self, every: int) -> int:
        """Return ``every``, or where there are fewer documents, how many: the last is held out."""
        found = sum(1 for _ in islice(documents(self._train, self.settings), every))
        if found == 1:
            raise SettingError(
                "data.hold_out must be 0 where data.train has one document, got "
                f"{every}: set data.hold_out=0, data.validation, or data.separator (what parts the "
                "documents of a file)"
            )
        return min(every, found)

    def digest(self) -> str:
        """Return what changes with the files and with how documents are made of them."""
        files = [
            [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
            for paths in (self._train, self._validation)
        ]
        settings = self.settings
        return _digest(files, self._hold_out, settings.json_field, settings.separator)

    def documents(self, split: str) -> Iterator[str]:
        """Yield the texts of "train" or "validation"."""
        if split == "validation" and self._validation:
            return documents(self._validation, self.settings)
        texts = enumerate(documents(self._train, self.settings))
        wanted = split == "validation"
        return (text for i, text in texts if _held_out(i, self._hold_out) == wanted)


def prepare(settings: DataSettings, report=lambda text: None) -> Corpus:
    """Return the corpus of the settings; make the files in ``settings.cache`` that are not there.

    Raises SettingError, CorpusError for text that cannot be read, and TokenFileError for a split
    that has no sequence.
    """
    sources = _Sources(settings)
    of_sources = sources.digest()
    cache = Path(settings.cache)
    trained = cache / f"bpe-{_digest(of_sources, settings.vocab_size, settings.end_of_text)}.json"
    if settings.tokenizer == "bpe" and not trained.is_file():
        report(f"training a BPE of {settings.vocab_size} tokens")
        texts = sources.documents("train")
        train_bpe(texts, settings.vocab_size, settings.end_of_text, trained)
    tokenizer = load_tokenizer(settings, trained)
    paths: dict[str, Path | None] = {"train": None, "validation": None}
    for split in sources.splits:
        path = paths[split] = cache / f"{split}-{_digest(of_sources, tokenizer.digest)}.tokens"
        if not _is_whole(path, tokenizer):
            report(f"writing {path}")
            parts = _token_parts(sources.documents(split), tokenizer)
            write_tokens(path, parts, tokenizer.vocab_size, tokenizer.digest)
        _check_length(path, split, settings.seqlen)
    return Corpus(tokenizer, paths["train"], paths["validation"])


def _is_whole(path: Path, tokenizer: TextTokenizer) -> bool:
    if not path.is_file():
        return False
    header = read_header(path)
    return (header.vocab_size, header.tokenizer) == (tokenizer.vocab_size, tokenizer.digest)


def _check_length(path: Path, split: str, seqlen: int) -> None:
    tokens = read_header(path).num_tokens
    if tokens < seqlen + 1:
        more = ""
        if split == "validation":
            more = "; a smaller data.hold_out holds out more documents, 0 none"
        raise TokenFileError(
            f"data.seqlen must be below the {tokens} tokens of the {split} text, got {seqlen}{more}"
        )
