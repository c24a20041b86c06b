"""What is measured: one ``Case`` a row of the table, and the tensors it needs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

OPS = ("fwd", "bwd", "fwd_bwd", "decode", "varlen")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Work:
    """What a call does: operations of matrix products, exponentials, bytes that must move."""

    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Case:
    """One measurement. seqlen_q is 1 for decode; for varlen both are the longest sequence's.

    Attributes:
        window: of a causal case, how many keys before its own position a query sees; 0: all.
        page_size: of a decode case's cache; 0: not paged.
        lengths_of: where the lengths of a varlen batch come from.
        ragged: these lengths, if they are not the even ones of ``lengths()``.
    """

    op: str
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    headdim: int
    headdim_v: int
    causal: bool
    window: int = 0
    page_size: int = 0
    lengths_of: str = ""
    ragged: tuple[int, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return torch.empty(0, dtype=self.torch_dtype).element_size()

    @property
    def has_gradient(self) -> bool:
        return self.op in ("bwd", "fwd_bwd")

    @property
    def is_masked(self) -> bool:
        """A causal decode of one query masks nothing."""
        return self.causal and self.op != "decode"

    def lengths(self) -> list[int]:
        """Sequence lengths of a varlen batch; without ``ragged``, evenly down to an eighth."""
        if self.ragged:
            return list(self.ragged)
        steps = max(self.batch - 1, 1)
        shortest = max(self.seqlen_k // 8, 1)
        return [self.seqlen_k - (self.seqlen_k - shortest) * i // steps for i in range(self.batch)]

    def scores(self) -> float:
        """Visible scores of all heads; a causal mask counts as half, a window exactly."""
        if self.window and self.is_masked:
            seen = min(self.window + 1, self.seqlen_k)
            per_head = self.batch * (seen * (seen + 1) / 2 + (self.seqlen_k - seen) * seen)
            return self.nheads * per_head
        per_head = self.batch * self.seqlen_q * self.seqlen_k
        if self.op == "varlen":
            per_head = sum(n * n for n in self.lengths())
        return self.nheads * per_head * (0.5 if self.is_masked else 1.0)

    def flops(self) -> float:
        """Floating-point operations of the matrix products."""
        d, dv = self.headdim, self.headdim_v
        per_score = {"fwd": 2 * (d + dv), "bwd": 2 * (3 * d + 2 * dv)}
        per_score["fwd_bwd"] = per_score["fwd"] + per_score["bwd"]
        return self.scores() * per_score.get(self.op, per_score["fwd"])

    def work(self) -> Work:
        """All of a call's work; bytes are those of each input and each result, once."""
        exps = self.scores() * (2 if self.op == "fwd_bwd" else 1)
        rows_q, rows_k = self.batch * self.seqlen_q, self.batch * self.seqlen_k
        if self.op == "varlen":
            rows_q = rows_k = sum(self.lengths())
        width = self.headdim + self.headdim_v
        queries, keys = rows_q * self.nheads * width, rows_k * self.nheads_k * width
        elements = (queries + keys) * (2 if self.has_gradient else 1)
        return Work(self.flops(), exps, elements * self.itemsize)

    def score_bytes(self) -> int:
        """Bytes of a seqlen_q x seqlen_k matrix for all heads; plain attention keeps several."""
        batch = 1 if self.op == "varlen" else self.batch
        return batch * self.nheads * self.seqlen_q * self.seqlen_k * self.itemsize

    def __str__(self) -> str:
        heads = _pair(self.nheads, self.nheads_k)
        seqlen = f"{self.seqlen_k}"
        if self.seqlen_q != self.seqlen_k:
            seqlen = f"{self.seqlen_q}x{self.seqlen_k}"
        mask = f"window {self.window}" if self.window else "causal" if self.is_masked else "full"
        text = f"{self.op:7} {self.dtype:8} b={self.batch} s={seqlen} h={heads} "
        text += f"d={_pair(self.headdim, self.headdim_v)} {mask}"
        return (
            text
            + (f" pages of {self.page_size}" if self.page_size else "")
            + (f" {self.lengths_of}" if self.lengths_of else "")
        )


def _pair(first: int, second: int) -> str:
    return f"{first}" if first == second else f"{first}/{second}"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case in this package's layout.

    q (batch, seqlen_q, nheads, headdim), k and v likewise, dout as the output; varlen: without the
    batch, sequences one after another.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Standard normal tensors, the same for the same case on the same device.

    In a large batch to decode from, all sequences hold the keys and values of one, each shifted.
    """
    shape = (case.op, case.dtype, case.batch, case.seqlen_q, case.seqlen_k, case.nheads)
    rows = tuple(case.lengths()) if case.op == "varlen" else ()
    return _inputs(*shape, case.nheads_k, case.headdim, case.headdim_v, rows, device)


@functools.lru_cache(maxsize=1)  # cases that differ in the mask or the pages alone share them
def _inputs(
    op, dtype, batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v, lengths, device
):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])

    def cache(*shape):
        one = normal(*shape)
        many = one.new_empty(batch, *shape)
        for i, sequence in enumerate(many):
            sequence.copy_(one.roll(i * 127, dims=0))
        return many

    rows_q, rows_k = (batch, seqlen_q), (batch, seqlen_k)
    if op == "varlen":
        rows_q = rows_k = (sum(lengths),)
    keys_of = cache if op == "decode" else normal
    keys_rows = rows_k[1:] if op == "decode" else rows_k
    return Inputs(
        q=normal(*rows_q, nheads, headdim),
        k=keys_of(*keys_rows, nheads_k, headdim),
        v=keys_of(*keys_rows, nheads_k, headdim_v),
        dout=normal(*rows_q, nheads, headdim_v),
    )
