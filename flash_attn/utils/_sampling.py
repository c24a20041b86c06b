"""From logits to tokens: penalties, filters, and the draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from flash_attn._arguments import as_int, check_tensors, number


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set all but the ``top_k`` largest logits of each row to -inf, in place.

    Args:
        logits: ``(..., vocab)``.
        top_k: 0 or at least vocab: nothing is done. Equals of the last of them stay.
    """
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return
    smallest = logits.topk(top_k, dim=-1).values[..., -1:]
    logits.masked_fill_(logits < smallest, float("-inf"))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Set the least likely logits of each row to -inf, in place, as long as the rest keeps a
    probability of ``top_p``; the most likely one stays.

    Args:
        logits: ``(..., vocab)``.
        top_p: 0 or less, or 1 or more: nothing is done.
    """
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ascending, places = logits.sort(dim=-1)
    is_rest = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
    is_rest[..., -1] = False
    logits.masked_fill_(torch.zeros_like(is_rest).scatter(-1, places, is_rest), float("-inf"))


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Set logits less likely than ``min_p`` times the most likely one to -inf, in place.

    Args:
        logits: ``(..., vocab)``.
        min_p: from 0, where nothing is done, to 1.
    """
    if min_p > 0.0:
        log_p = torch.log_softmax(logits, -1)
        logits.masked_fill_(
            log_p
            < log_p.amax(-1, keepdim=True)
            + torch.log(torch.tensor(min_p, dtype=log_p.dtype, device=log_p.device)),
            float("-inf"),
        )


def penalize_repetition(logits: Tensor, is_seen: Tensor, penalty: float) -> Tensor:
    """Return logits whose seen tokens are less likely (https://arxiv.org/abs/1909.05858).

    Args:
        logits: ``(..., vocab)``.
        is_seen: bool, of the same shape.
        penalty: positive logits are divided by it, negative ones multiplied.
    """
    return torch.where(is_seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _over_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Return what has the softmax of ``logits / temperature``: 0 for each row's largest.

    Raises:
        ValueError: a row has no softmax: its logits have NaN or inf, or are all -inf.
    """
    largest = logits.amax(-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        is_wrong = ~largest.isfinite()
        raise ValueError(
            f"logits must have a finite maximum in each row, got {largest[is_wrong][0].item()}"
        )
    below = logits - largest
    # 0 and -inf stay what they are, also where the temperature or its inverse is 0 or inf in
    # logits' dtype.
    stays = (below == 0.0) | below.isinf()
    return torch.where(stays, below, below / temperature)


@dataclass
class Sampling:
    """How a token is chosen.

    Attributes:
        top_k: 1: the most likely token (greedy); 0: from all.
        top_p: from the most likely tokens that have this probability together; 0: from all.
        temperature: logits are divided by it; 0: greedy.
        min_p: from tokens that have this share of the most likely one's probability; 0: from all.
        repetition_penalty: of the tokens of prompt and result; 1: none.
        generator: draws the random numbers; None: torch's default one.

    Raises:
        ValueError: one is out of range.
    """

    top_k: int = 1
    top_p: float = 0.0
    temperature: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    generator: Optional[torch.Generator] = None

    def __post_init__(self):
        self.top_k = as_int("top_k", self.top_k)
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = number(name, getattr(self, name))
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
            setattr(self, name, value)
        self.temperature = number("temperature", self.temperature)
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        self.repetition_penalty = number("repetition_penalty", self.repetition_penalty)
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be finite and positive, got {self.repetition_penalty}"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.top_k == 1 or self.temperature == 0.0

    @property
    def penalizes(self) -> bool:
        """Whether the tokens before matter beside the logits."""
        return self.repetition_penalty != 1.0

    def penalized(self, logits: Tensor, is_seen: Optional[Tensor]) -> Tensor:
        """Return the logits after the repetition penalty."""
        if not self.penalizes:
            return logits
        return penalize_repetition(logits, is_seen, self.repetition_penalty)

    def probabilities(self, logits: Tensor, is_seen: Optional[Tensor] = None) -> Tensor:
        """Return the distribution that tokens are drawn from.

        Args:
            logits: ``(..., vocab)``.
            is_seen: bool, of the same shape: tokens that ``repetition_penalty`` is for.

        Returns:
            Of logits' shape, fp32 (fp64 for fp64); one-hot if greedy.

        Raises:
            ValueError: not greedy, and a row's logits have NaN or inf, or are all -inf.
        """
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = self.penalized(logits.to(dtype), is_seen)
        if self.is_greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = _over_temperature(logits, self.temperature)
        modify_logits_for_top_k_filtering(logits, self.top_k)
        modify_logits_for_top_p_filtering(logits, self.top_p)
        modify_logits_for_min_p_filtering(logits, self.min_p)
        return logits.softmax(-1)

    def __call__(self, logits: Tensor, is_seen: Optional[Tensor] = None) -> Tensor:
        """Choose a token of each row: int64 ``logits.shape[:-1]``."""
        if self.is_greedy:
            return self.penalized(logits, is_seen).argmax(-1)
        return self.draw(self.probabilities(logits, is_seen))

    def draw(self, probabilities: Tensor) -> Tensor:
        """Draw a token of each row of ``(..., vocab)``: int64."""
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        return rows.multinomial(1, generator=self.generator).view(probabilities.shape[:-1])


def sample(
    logits: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    *,
    min_p: float = 0.0,
    generator: Optional[torch.Generator] = None,
) -> Tensor:
    """Choose a token of each row of logits.

    Args:
        logits: ``(..., vocab)``.

    The other arguments are those of ``Sampling``.

    Returns:
        int64 ``logits.shape[:-1]``.

    Raises:
        ValueError: an argument is out of range.
    """
    check_tensors(logits=logits)
    return Sampling(top_k, top_p, temperature, min_p, generator=generator)(logits)
