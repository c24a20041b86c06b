"""The results of a case in fp64, and the error of plain formulas in the case's own dtype."""

from __future__ import annotations

import torch
from cases.case import Case, Inputs
from torch import Tensor

_ROWS = 256  # of queries at a time


def _softmax_rows(scores: Tensor, first_row: int, offset: int, causal: bool) -> Tensor:
    if causal:
        rows, columns = scores.shape[-2:]
        hidden = torch.arange(columns) > torch.arange(first_row, first_row + rows)[:, None] + offset
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1)


def _attend(q, k, v, dout, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, dq, dk, dv) of one sequence, by the formulas, block of queries by block of queries.

    q (nheads, seqlen_q, headdim); k, v with as many heads.
    """
    scale, offset = q.shape[-1] ** -0.5, k.shape[1] - q.shape[1]
    out, dq = dout.new_empty(dout.shape), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        p = _softmax_rows(q[:, rows] * scale @ k.mT, start, offset, causal)
        out[:, rows] = p @ v
        dp = dout[:, rows] @ v.mT
        ds = p * (dp - (dout[:, rows] * out[:, rows]).sum(-1, keepdim=True)) * scale
        dq[:, rows] = ds @ k
        dk += ds.mT @ q[:, rows]
        dv += p.mT @ dout[:, rows]
    return out, dq, dk, dv


def _sequences(case: Case, inputs: Inputs):
    """Per sequence: q, k, v, dout as (nheads, seqlen, headdim)."""
    tensors = (inputs.q, inputs.k, inputs.v, inputs.dout)
    if case.op == "varlen":
        parts = zip(*(x.split(case.lengths()) for x in tensors))
    else:
        parts = zip(*(x.unbind(0) for x in tensors))
    for part in parts:
        yield (x.transpose(0, 1) for x in part)


def results(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a peer returns for the case, computed in ``dtype``."""
    groups, causal = case.nheads // case.nheads_k, case.causal and case.op != "decode"
    all_results = []
    for q, k, v, dout in _sequences(case, inputs):
        q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
        k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
        out, dq, dk, dv = _attend(q, k, v, dout, causal)
        dk, dv = (x.unflatten(0, (-1, groups)).sum(1) for x in (dk, dv))
        all_results.append([x.transpose(0, 1) for x in (out, dq, dk, dv)])
    join = torch.cat if case.op == "varlen" else torch.stack
    joined = tuple(join(parts) for parts in zip(*all_results))
    first, last = {"bwd": (1, 4), "fwd_bwd": (0, 4)}.get(case.op, (0, 1))
    return joined[first:last]


class RefCheck:
    """Errors of a case's results against fp64; at most twice that of plain attention is allowed."""

    def __init__(self, case: Case, inputs: Inputs):
        self._exact = results(case, inputs, torch.float64)
        plain = results(case, inputs, case.torch_dtype)
        unit = torch.finfo(case.torch_dtype).eps
        self.limits = [
            2 * error + unit * float(exact.abs().max())
            for error, exact in zip(self._errors(plain), self._exact)
        ]

    def _errors(self, actual) -> list[float]:
        return [float((a.detach().double() - e).abs().max()) for a, e in zip(actual, self._exact)]

    def ratio(self, actual) -> float:
        """Largest error of a peer's results as a fraction of what is allowed; infinite for NaN."""
        ratios = [error / limit for error, limit in zip(self._errors(actual), self.limits)]
        return max(r if r == r else float("inf") for r in ratios)
