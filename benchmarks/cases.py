"""What is measured: one ``Case`` a row of the table, and the tensors it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OPS = ("fwd", "bwd", "fwd_bwd", "decode", "varlen")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One measurement. seqlen_q is 1 for decode; for varlen both are the longest sequence's."""

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

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def has_gradient(self) -> bool:
        return self.op in ("bwd", "fwd_bwd")

    def lengths(self) -> list[int]:
        """Sequence lengths of a varlen batch, from the longest down to an eighth of it."""
        steps = max(self.batch - 1, 1)
        shortest = max(self.seqlen_k // 8, 1)
        return [self.seqlen_k - (self.seqlen_k - shortest) * i // steps for i in range(self.batch)]

    def flops(self) -> float:
        """Floating-point operations of the matrix products; a causal mask counts as half."""
        d, dv = self.headdim, self.headdim_v
        per_score = {"fwd": 2 * (d + dv), "bwd": 2 * (3 * d + 2 * dv)}
        per_score["fwd_bwd"] = per_score["fwd"] + per_score["bwd"]
        scores = self.batch * self.seqlen_q * self.seqlen_k
        if self.op == "varlen":
            scores = sum(n * n for n in self.lengths())
        half = 0.5 if self.causal and self.op != "decode" else 1.0
        return half * self.nheads * scores * per_score.get(self.op, per_score["fwd"])

    def score_bytes(self) -> int:
        """Bytes of a seqlen_q x seqlen_k matrix for all heads; plain attention keeps several."""
        batch = 1 if self.op == "varlen" else self.batch
        itemsize = torch.empty(0, dtype=self.torch_dtype).element_size()
        return batch * self.nheads * self.seqlen_q * self.seqlen_k * itemsize

    def __str__(self) -> str:
        heads = (
            f"{self.nheads}" if self.nheads == self.nheads_k else f"{self.nheads}/{self.nheads_k}"
        )
        seqlen = f"{self.seqlen_k}"
        if self.seqlen_q != self.seqlen_k:
            seqlen = f"{self.seqlen_q}x{self.seqlen_k}"
        d = (
            f"{self.headdim}"
            if self.headdim == self.headdim_v
            else f"{self.headdim}/{self.headdim_v}"
        )
        mask = "causal" if self.causal and self.op != "decode" else "full"
        return f"{self.op:7} {self.dtype:8} b={self.batch} s={seqlen} h={heads} d={d} {mask}"


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


def make_inputs(case: Case) -> Inputs:
    """Standard normal tensors, the same for the same case."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(case.torch_dtype)

    rows_q, rows_k = (case.batch, case.seqlen_q), (case.batch, case.seqlen_k)
    if case.op == "varlen":
        rows_q = rows_k = (sum(case.lengths()),)
    return Inputs(
        q=normal(*rows_q, case.nheads, case.headdim),
        k=normal(*rows_k, case.nheads_k, case.headdim),
        v=normal(*rows_k, case.nheads_k, case.headdim_v),
        dout=normal(*rows_q, case.nheads, case.headdim_v),
    )
