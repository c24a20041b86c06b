"""How fast a run is: tokens a second, the share of the device's peak (MFU), memory."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import nn

from training.model import DTYPES, base_model

_MIB = 1 << 20


def flops_per_token(model: nn.Module, seqlen: int) -> float:
    """Return the floating-point operations of a token's forward and backward.

    Six for each weight of a matrix product, the head's included and embeddings' not; and those of
    causal attention: half of what all pairs would take, ``6 · layers · seqlen · width``. What
    activation checkpointing computes again does not count.
    """
    base = base_model(model)
    modules = list(base.modules())
    embeddings = {p for m in modules if isinstance(m, nn.Embedding) for p in m.parameters(False)}
    weights = sum(p.numel() for p in base.parameters() if p.dim() == 2 and p not in embeddings)
    head = getattr(base, "lm_head", None)
    if head is not None and head.weight in embeddings:  # tied: a table and a matrix
        weights += head.weight.numel()
    config = base.config
    return 6 * weights + 6 * config.num_hidden_layers * seqlen * config.hidden_size


def measured_peak(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Return the floating-point operations a second of a large matrix product on this device."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.full((size, size), 0.01, device=device, dtype=DTYPES[precision]) for _ in "ab")
    best, end = float("inf"), time.perf_counter() + seconds
    for _ in range(3):
        best = min(best, _seconds_of_product(a, b, device))
    while time.perf_counter() < end:
        best = min(best, _seconds_of_product(a, b, device))
    return 2 * size**3 / best


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    start = time.perf_counter()
    a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory this process has held, on the GPU or, without, in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024


class Throughput:
    """Tokens a second and MFU between two calls of ``since_last``."""

    def __init__(self, flops: float, peak: float):
        self._flops, self._peak = flops, peak
        self._tokens, self._start = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def pause(self) -> float:
        """Return a mark for ``go_on``: what lies between is no training."""
        return time.perf_counter()

    def go_on(self, mark: float) -> None:
        self._start += time.perf_counter() - mark

    def since_last(self) -> dict[str, float]:
        """Return tokens_per_second, of all processes, and mfu; start anew."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._start, 1e-9)
        self._tokens, self._start = 0, now
        return {"tokens_per_second": rate, "mfu": rate * self._flops / self._peak}
