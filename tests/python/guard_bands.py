"""Tensors amid NaN, for tests that operators neither use nor write what lies beside them."""

from __future__ import annotations

import math

import torch


class Guarded:
    """A copy of a tensor in a buffer of NaN, with NaN before, behind and between its rows.

    Args:
        x: what is copied.
        before: elements before the first; a multiple of 16 keeps it aligned.
        gap: elements between rows, which are those of the last dimension.
    """

    def __init__(self, x: torch.Tensor, before: int = 16, gap: int = 16):
        width = (x.shape[-1] if x.dim() else 1) + gap
        rows = math.prod(x.shape[:-1])
        self.buffer = torch.full((before + rows * width + 64,), math.nan, dtype=x.dtype)
        rows_of_buffer = self.buffer[before : before + rows * width].view(*x.shape[:-1], width)
        self.x = rows_of_buffer[..., : width - gap].view(x.shape)
        self.x.copy_(x)

    def assert_untouched(self) -> None:
        """Fail if anything but the tensor was written to."""
        values = self.x.clone()
        self.x.fill_(math.nan)
        assert self.buffer.isnan().all()
        self.x.copy_(values)
