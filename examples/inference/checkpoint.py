"""A model and its tokenizer from a local Hugging Face folder."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Checkpoint:
    """What a folder holds.

    Attributes:
        model: ready to generate.
        tokenizer: of the model.
        vocab_size: tokens that there are.
        stop_tokens: tokens that end a text.
        max_seqlen: tokens of a sequence that the model was made for; None: it does not say.
    """

    model: nn.Module
    tokenizer: Tokenizer
    vocab_size: int
    stop_tokens: frozenset[int]
    max_seqlen: int | None = None

    def check_length(self, num_tokens: int) -> None:
        """Raise ValueError for more tokens than the model was made for."""
        if self.max_seqlen is not None and num_tokens > self.max_seqlen:
            raise ValueError(
                f"{num_tokens} tokens of prompt and result exceed the {self.max_seqlen} that the "
                "model was made for"
            )


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder.

    Raises:
        FileNotFoundError: it has no tokenizer.json.
        ValueError: that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path} is no tokenizer: {error}") from error


def stop_tokens(folder: Path) -> frozenset[int]:
    """Return ``eos_token_id`` of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def check_device(device: str) -> None:
    """Raise ValueError for a device that cannot be used."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch has either, for one it is not made for
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from None


def load(folder: Path, dtype: str = "float32", device: str = "cpu") -> Checkpoint:
    """Load a folder.

    Args:
        folder: config.json, tokenizer.json, and weights in safetensors or .bin files.
        dtype: one of ``DTYPES``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, the model is of a kind that is not known, or the device
            is not there.
        RuntimeError: weights do not fit ``config.json``.
    """
    from flash_attn.models import from_hf

    folder = Path(folder)
    check_device(device)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    tokenizer = read_tokenizer(folder)
    model = from_hf(folder, dtype=DTYPES[dtype], device=device).eval().requires_grad_(False)
    vocab_size = min(model.config.vocab_size, model.lm_head.weight.shape[0])
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ("max_position_embeddings", "n_positions")
    most = next((fields[name] for name in names if fields.get(name)), None)
    return Checkpoint(model, tokenizer, vocab_size, stop_tokens(folder), most)


def load_or_exit(folder: Path, dtype: str, device: str = "cpu") -> Checkpoint:
    """Load a folder for a program, which ends with a sentence and status 1 where it cannot."""
    try:
        return load(folder, dtype, device)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
