"""Prompts of a batch, of one length or of several, and what is asked to follow them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Optional, Union

import torch
from torch import Tensor, nn

from flash_attn._arguments import as_int, check_optional, check_tensors, wrong_kind
from flash_attn.utils._sampling import Sampling


def _check_tokens(name: str, ids: Tensor, dims: int) -> None:
    shape = "(batch, seqlen)" if dims == 2 else "(seqlen,)"
    if ids.dim() != dims or 0 in ids.shape:
        raise ValueError(f"{name} must be {shape} with at least one token, got {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int32 or int64, got {ids.dtype}")


def _as_lengths(lengths, batch: int, seqlen: int) -> list[int]:
    values = lengths.tolist() if isinstance(lengths, Tensor) else [index(n) for n in lengths]
    if not isinstance(values, list) or len(values) != batch:
        raise ValueError(f"lengths must have an entry for each of {batch} rows of input_ids")
    if min(values) < 1 or max(values) > seqlen:
        raise ValueError(f"lengths must be from 1 to input_ids' {seqlen} tokens, got {values}")
    return values


class Prompts:
    """The prompts of a batch.

    Attributes:
        rows: int64 ``(seqlen,)`` each.
        lengths: of the rows.
        are_one_tensor: whether all have one length and came as one tensor, as results then do.
    """

    def __init__(self, input_ids: Union[Tensor, Sequence[Tensor]], lengths=None):
        """Read prompts.

        Args:
            input_ids: int32 or int64 ``(batch, seqlen)``, or a sequence of ``(seqlen,)``.
            lengths: tokens of each row of ``(batch, seqlen)``, what is behind them is padding;
                None: all.

        Raises:
            ValueError: there is no token, or a shape or dtype is another.
        """
        self.are_one_tensor = isinstance(input_ids, Tensor) and lengths is None
        if isinstance(input_ids, Tensor):
            _check_tokens("input_ids", input_ids, 2)
            ids = input_ids.long()
            if lengths is None:
                lengths = [ids.shape[1]] * len(ids)
            self.lengths = _as_lengths(lengths, *ids.shape)
            self.rows = [row[:length] for row, length in zip(ids, self.lengths)]
            return
        if lengths is not None:
            raise ValueError("lengths needs input_ids to be one tensor (batch, seqlen)")
        if not isinstance(input_ids, (list, tuple)) or not input_ids:
            raise wrong_kind("input_ids", input_ids, "a torch.Tensor or a list of them")
        check_tensors(**{f"input_ids[{i}]": row for i, row in enumerate(input_ids)})
        for i, row in enumerate(input_ids):
            _check_tokens(f"input_ids[{i}]", row, 1)
        self.rows = [row.long() for row in input_ids]
        self.lengths = [len(row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.rows[0].device

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def are_even(self) -> bool:
        """Whether all have one length."""
        return min(self.lengths) == self.longest

    def packed(self) -> Tensor:
        """Return int64 ``(1, total)``, one prompt after the other."""
        return torch.cat(self.rows)[None]

    def padded(self, token: int = 0) -> Tensor:
        """Return int64 ``(batch, longest)``, filled up with ``token`` on the right."""
        return nn.utils.rnn.pad_sequence(self.rows, batch_first=True, padding_value=token)


def _as_tokens(name: str, ids) -> tuple[int, ...]:
    """Return an int, a sequence of ints, a tensor or None as a tuple."""
    if ids is None:
        return ()
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    tokens = (
        tuple(index(i) for i in ids) if isinstance(ids, (list, tuple)) else (as_int(name, ids),)
    )
    if any(token < 0 for token in tokens):
        raise ValueError(f"{name} must not be negative, got {list(tokens)}")
    return tokens


@dataclass
class Request:
    """What is asked to follow the prompts.

    Attributes:
        limits: tokens of each sequence, prompt and result together.
        sampling: how tokens are chosen.
        stop: tokens that end a sequence; they are its last one.
        pad: the token behind the end of a sequence while others go on.
        teacher: int64 ``(batch, seqlen)``, tokens to take rather than choose, as long as it goes.
        vocab_size: how many logits are tokens; None: all.
    """

    limits: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[int, ...] = ()
    pad: int = 0
    teacher: Optional[Tensor] = None
    vocab_size: Optional[int] = None

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.limits)


def position_limit(model: nn.Module) -> Optional[int]:
    """Return how many positions a model embeds; None: any."""
    for name in ("max_positions", "max_position_embeddings"):  # a table may have others, too
        counts = (getattr(module, name, None) for module in model.modules())
        counts = [n for n in counts if isinstance(n, int) and n > 0]
        if counts:
            return min(counts)
    return None


# What libraries call arguments that are others here.
_ELSEWHERE = {
    "attention_mask": "give prompts of different lengths as a list of tensors, or filled up on the "
    "right with lengths",
    "do_sample": "top_k=0 draws from all tokens, top_k=1, the default, takes the most likely one",
    "max_tokens": "max_new_tokens bounds those after the prompt",
    "num_beams": "there is no beam search",
    "num_return_sequences": "repeat the prompt",
}


def check_names(function: str, options: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError for an argument that a function does not have."""
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        instead = _ELSEWHERE.get(unknown, f"it has {', '.join(sorted(known))}")
        raise TypeError(f"{function} has no argument {unknown!r}: {instead}")


def _limits(prompts: Prompts, max_length, max_new_tokens) -> list[int]:
    if (max_length is None) == (max_new_tokens is None):
        raise ValueError(
            f"give either max_length or max_new_tokens, got {max_length} and {max_new_tokens}"
        )
    if max_length is None:
        new = as_int("max_new_tokens", max_new_tokens)
        if new < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {new}")
        return [length + new for length in prompts.lengths]
    max_length = as_int("max_length", max_length)
    if max_length <= prompts.longest:
        raise ValueError(
            f"max_length ({max_length}) must exceed the prompt's {prompts.longest} tokens"
        )
    return [max_length] * len(prompts)


def make_request(
    model: nn.Module,
    prompts: Prompts,
    max_length: Optional[int],
    sampling: Sampling,
    *,
    eos_token_id=None,
    pad_token_id: Optional[int] = None,
    teacher_outputs: Optional[Tensor] = None,
    vocab_size: Optional[int] = None,
    max_new_tokens: Optional[int] = None,
) -> Request:
    """Return a request that the model can serve.

    Raises:
        ValueError: an argument is out of range, or the sequences get longer than the positions
            that the model embeds.
    """
    limits, most = _limits(prompts, max_length, max_new_tokens), position_limit(model)
    if most is not None and max(limits) > most:
        raise ValueError(
            f"{max(limits)} tokens (max_length, or prompt and max_new_tokens) exceed the "
            f"{most} positions that the model embeds"
        )
    check_optional(teacher_outputs=teacher_outputs)
    if teacher_outputs is not None:
        _check_tokens("teacher_outputs", teacher_outputs, 2)
        if len(teacher_outputs) != len(prompts):
            raise ValueError(
                f"teacher_outputs must have a row for each of {len(prompts)} prompts, got "
                f"{tuple(teacher_outputs.shape)}"
            )
        teacher_outputs = teacher_outputs.long()
    if vocab_size is not None and as_int("vocab_size", vocab_size) < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    stop, pad = _as_tokens("eos_token_id", eos_token_id), _as_tokens("pad_token_id", pad_token_id)
    pad = (*pad, *stop, 0)[0]
    return Request(limits, sampling, stop, pad, teacher_outputs, vocab_size)
