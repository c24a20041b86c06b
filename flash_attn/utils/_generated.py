"""What generation gives back, and how it tells of its progress."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor


@dataclass
class DecoderOnlyOutput:
    """What ``decode`` returns without transformers.

    Attributes:
        sequences: prompts and new tokens.
        scores: logits of each new token, ``(batch, vocab)``.
    """

    sequences: Union[Tensor, list[Tensor]]
    scores: Optional[tuple[Tensor, ...]] = None


def as_output(sequences, scores):
    """Return transformers' output, which is a mapping too, or one like it without transformers."""
    try:
        from transformers.generation import GenerateDecoderOnlyOutput
    except ImportError:
        return DecoderOnlyOutput(sequences, scores)
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores)


@contextmanager
def timing(is_enabled: bool, device: torch.device):
    """Print how long the block took, with what it left to the device."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now() if is_enabled else 0.0
    yield
    if is_enabled:
        print(f"Prompt processing + decoding time: {(now() - start) * 1000:.1f} ms")


def stream_to(streamer, tokens: Tensor) -> None:
    """Give tokens to an object with ``put``, such as a streamer of transformers, or call it."""
    if streamer is not None:
        getattr(streamer, "put", streamer)(tokens.cpu())
