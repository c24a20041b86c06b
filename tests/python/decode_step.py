"""A step of decoding all of whose inputs are tensors on one device, as CUDA graphs want it."""

from __future__ import annotations

import torch

from flash_attn import flash_attn_with_kvcache


class DecodeStep:
    """One query and one new row for each of four sequences, in pages; all of it in tensors."""

    def __init__(self, device, seed=0):
        gen = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=gen).bfloat16().to(device)

        self.q, self.k, self.v = normal(4, 1, 8, 128), normal(4, 1, 2, 128), normal(4, 1, 2, 128)
        self.caches = normal(400, 16, 2, 128), normal(400, 16, 2, 128)
        self.angles = normal(1600, 64), normal(1600, 64)
        self.lengths = torch.zeros(4, dtype=torch.int32, device=device)
        self.pages = torch.zeros(4, 100, dtype=torch.int32, device=device)
        self.set((100, 1500, 0, 700), seed=0)

    def set(self, lengths, seed):
        """Other lengths and pages."""
        order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
        self.pages.copy_(order.int().view(4, 100))
        self.lengths.copy_(torch.tensor(lengths))

    def __call__(self):
        return flash_attn_with_kvcache(
            *(self.q, *self.caches, self.k, self.v, *self.angles),
            cache_seqlens=self.lengths,
            block_table=self.pages,
            causal=True,
        )
