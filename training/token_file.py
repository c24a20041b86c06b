"""Token files: a header of 64 bytes, then all tokens in a row, uint16 or uint32, little-endian.

A file is written beside its place and renamed into it when whole, so that what has the name is
whole; its size and the header's checksum are checked where it is opened.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"FLTOKENS"
_VERSION = 1
# magic, version, bytes a token, vocabulary, tokens, CRC-32 of the tokens, the tokenizer's digest;
# then the CRC-32 of all that.
_FIELDS = struct.Struct("<8sIIQQI24s")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
assert _HEADER_BYTES == 64


class TokenFileError(ValueError):
    """A token file is not one, is damaged, or does not fit."""


@dataclass(frozen=True)
class Header:
    """What a token file says of itself. tokenizer: a digest, up to 24 bytes of ASCII."""

    vocab_size: int
    num_tokens: int
    content_crc: int
    tokenizer: str

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    def to_bytes(self) -> bytes:
        fields = _FIELDS.pack(
            _MAGIC, _VERSION, self.dtype.itemsize, self.vocab_size, self.num_tokens,
            self.content_crc, self.tokenizer.encode().ljust(24, b"\0"),
        )  # fmt: skip
        return fields + _CHECKSUM.pack(zlib.crc32(fields))


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the narrower of uint16 and uint32 that holds all tokens."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_tokens(
    path: Path, parts: Iterable[np.ndarray], vocab_size: int, tokenizer: str
) -> Header:
    """Write arrays of tokens in a row. Raises TokenFileError for a token outside the vocabulary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    count, crc, dtype = 0, 0, token_dtype(vocab_size)
    try:
        with partial.open("wb") as file:
            file.write(bytes(_HEADER_BYTES))
            for part in parts:
                if len(part) and not 0 <= part.min() <= part.max() < vocab_size:
                    raise TokenFileError(
                        f"tokens must be below the vocabulary's {vocab_size}, got {part.max()}"
                    )
                data = part.astype(dtype).tobytes()
                file.write(data)
                count, crc = count + len(part), zlib.crc32(data, crc)
            header = Header(vocab_size, count, crc, tokenizer)
            file.seek(0)
            file.write(header.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return header


def read_header(path: Path) -> Header:
    """Return the header. Raises TokenFileError unless it is whole and the file has its length."""
    with path.open("rb") as file:
        data = file.read(_HEADER_BYTES)
    if len(data) < _HEADER_BYTES or not data.startswith(_MAGIC):
        raise TokenFileError(f"{path} is no token file")
    (checksum,) = _CHECKSUM.unpack_from(data, _FIELDS.size)
    if checksum != zlib.crc32(data[: _FIELDS.size]):
        raise TokenFileError(f"the header of {path} is damaged")
    _, version, itemsize, vocab_size, num_tokens, crc, tokenizer = _FIELDS.unpack_from(data)
    if version != _VERSION:
        raise TokenFileError(f"{path} has version {version}; this is version {_VERSION}")
    header = Header(vocab_size, num_tokens, crc, tokenizer.rstrip(b"\0").decode())
    size, expected = path.stat().st_size, _HEADER_BYTES + num_tokens * itemsize
    if itemsize != header.dtype.itemsize or size != expected:
        raise TokenFileError(f"{path} has {size} bytes where its header asks for {expected}")
    return header


def open_tokens(path: Path) -> tuple[Header, np.ndarray]:
    """Return the header and the tokens, mapped into memory, read-only."""
    header = read_header(path)
    if header.num_tokens == 0:
        return header, np.zeros(0, header.dtype)
    return header, np.memmap(path, header.dtype, "r", _HEADER_BYTES, (header.num_tokens,))


def verify_content(path: Path) -> None:
    """Raise TokenFileError unless the tokens are those that were written; reads the whole file."""
    header, tokens = open_tokens(path)
    crc, step = 0, 1 << 24
    for first in range(0, len(tokens), step):
        crc = zlib.crc32(tokens[first : first + step].tobytes(), crc)
    if crc != header.content_crc:
        raise TokenFileError(f"the tokens of {path} are damaged")
