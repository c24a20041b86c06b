"""Calls of FlashAttention-3's functions beside the reference: chunks, used rows, queries of
values."""

from __future__ import annotations

import dataclasses

import torch
from attention_cases import assert_results_close, largest_lse
from backends import CPU, FP32
from reference import INF, einsum, gradient_slack

from flash_attn.v3 import flash_attn_func, flash_attn_varlen_func


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of sequences, padded or packed."""

    dtype: torch.dtype = FP32
    lengths: tuple = ((70, 70), (33, 90), (90, 33))  # of queries and keys
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (32, 32)
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    attention_chunk: int = 0
    sinks: bool = False
    used: bool = False  # fewer rows than there are
    qv: bool = False
    is_dense: bool = False
    seed: int = 0

    def __str__(self):
        fields = dataclasses.fields(self)
        changed = [(f.name, getattr(self, f.name)) for f in fields]
        changed = [(n, v) for (n, v), f in zip(changed, fields) if v != f.default]
        return ",".join(f"{n}={v}" for n, v in changed).replace("torch.", "") or "plain"


def sees(case, seqlen_q, seqlen_k):
    """Which keys a query sees, ``(seqlen_q, seqlen_k)``: the last ones have the same position."""
    left, right = (INF if w < 0 else w for w in case.window_size)
    row = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)
    mask = (key - row <= (0 if case.causal else right)) & (row - key <= left)
    if case.attention_chunk:
        chunk = case.attention_chunk
        mask &= row.div(chunk, rounding_mode="floor") == key.div(chunk, rounding_mode="floor")
    return mask


def reference(case, q, k, v, qv=None, s_aux=None):
    """``(out, lse)`` of one sequence, ``(s, h, dv)`` and ``(h, s)``; empty rows are 0 and -inf."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    depth = q.shape[-1] + (0 if qv is None else qv.shape[-1])
    scores = einsum("ihd,jhd->hij", q * depth**-0.5, k)
    if qv is not None:
        scores = scores + einsum("ihd,jhd->hij", qv * depth**-0.5, v)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    mask = sees(case, q.shape[0], k.shape[0])
    scores = scores.masked_fill(~mask, -INF)
    if s_aux is not None:
        sink = s_aux.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, sink], -1)
    empty = ~mask.any(-1) if s_aux is None else torch.zeros(q.shape[0], dtype=torch.bool)
    lse = scores.logsumexp(-1).masked_fill(empty, -INF)
    probs = scores.softmax(-1)[..., : k.shape[0]].masked_fill(empty[:, None], 0.0)
    return einsum("hij,jhd->ihd", probs, v), lse


class Problem:
    """The tensors of a case, packed; dense ones are all of one length."""

    def __init__(self, case):
        self.case = case
        gen = torch.Generator().manual_seed(case.seed)
        (h, hk), (d, dv) = case.heads, case.dims
        sq, sk = (sum(n) for n in zip(*case.lengths))

        def normal(*shape):
            return torch.randn(shape, generator=gen).to(case.dtype)

        self.tensors = {"q": normal(sq, h, d), "k": normal(sk, hk, d), "v": normal(sk, hk, dv)}
        if case.qv:
            self.tensors["qv"] = normal(sq, h, dv)
        if case.sinks:
            self.tensors["s_aux"] = normal(h)
        self.dout, self.dlse = normal(sq, h, dv), torch.randn(h, sq, generator=gen)
        self.used = case.lengths
        if case.used:  # also none and all
            fractions = [(0.6, 0.5), (1.0, 0.0), (0.0, 1.0), (0.3, 1.0)]
            self.used = tuple(
                (int(a * x), int(b * y))
                for (x, y), (a, b) in zip(case.lengths, fractions * len(case.lengths))
            )

    def expected(self, dtype):
        """Results and gradients by the reference, each in ``dtype``."""
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in self.tensors.items()}
        outs, lses, start_q, start_k = [], [], 0, 0
        for (sq, sk), (uq, uk) in zip(self.case.lengths, self.used):
            rows, keys = slice(start_q, start_q + uq), slice(start_k, start_k + uk)
            q, k, v = leaves["q"][rows], leaves["k"][keys], leaves["v"][keys]
            qv = leaves["qv"][rows] if "qv" in leaves else None
            out, lse = reference(self.case, q, k, v, qv, leaves.get("s_aux"))
            rest = -INF if "s_aux" not in leaves else leaves["s_aux"].detach()[:, None]
            unused = torch.zeros(lse.shape[0], sq - uq, dtype=lse.dtype)
            outs += [out, out.new_zeros(sq - uq, *out.shape[1:])]
            lses += [lse, unused + rest]
            start_q, start_k = start_q + sq, start_k + sk
        return self.with_gradients(leaves, torch.cat(outs), torch.cat(lses, 1), dtype)

    def with_gradients(self, leaves, out, lse, dtype):
        dlse = self.dlse.to(lse.dtype)
        if self.case.used:  # rows that are not used are nobody's: only what they are is tested
            dlse = torch.zeros_like(dlse)
        grads = torch.autograd.grad(
            [out, lse], list(leaves.values()), [self.dout.to(dtype), dlse], allow_unused=True
        )
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values())]
        named = {f"d{n}": g for n, g in zip(leaves, grads)}
        return {"out": out.detach(), "lse": lse.detach(), **named}

    def slack(self, out):
        """Of gradients, where chunks leave a query one or two keys: reference.gradient_slack."""
        if self.case.attention_chunk not in (1, 2):
            return {}
        one = {"causal": False, "window_size": (0, 0)}
        rows = {name: x[None] for name, x in self.tensors.items() if name in "qkv"}
        slack = gradient_slack(rows, one, self.dout[None], out[None])
        return {name: slack[name] for name in ("dq", "dk")}

    def cumulative(self):
        return tuple(
            torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in zip(*self.case.lengths)
        )

    def call(self, backend=CPU, **more):
        """The library's results and gradients, in the shapes of ``expected``."""
        case, here = self.case, backend.here
        leaves = {n: here(t).detach().requires_grad_() for n, t in self.tensors.items()}
        options = {
            "causal": case.causal,
            "window_size": case.window_size,
            "softcap": case.softcap,
            "attention_chunk": case.attention_chunk,
            "return_attn_probs": True,
            **more,
        }
        given = dict(leaves)
        if case.is_dense:
            (lengths,) = set(case.lengths)
            batch = len(case.lengths)
            for name, x in given.items():
                if name != "s_aux":
                    seqlen = lengths[name in "kv"]
                    given[name] = x.unflatten(0, (batch, seqlen))
        with backend.calls(case.seed):
            if case.is_dense and not case.used:
                out, lse = flash_attn_func(**given, **options)
            else:
                out, lse = self.call_varlen(given, options, here)
            if case.is_dense:
                assert lse.shape == (batch, case.heads[0], lengths[0])
                out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
            assert out.dtype == case.dtype
            assert lse.dtype == FP32
            results = self.with_gradients(leaves, out, lse, case.dtype)
        return {name: x.cpu() for name, x in results.items()}

    def call_varlen(self, given, options, here):
        case = self.case
        if case.used:
            for name, used in zip(("seqused_q", "seqused_k"), zip(*self.used)):
                options[name] = here(torch.tensor(used, dtype=torch.int32))
        if case.is_dense:
            sequences = (None,) * 4
        else:
            longest = (max(n) for n in zip(*case.lengths))
            sequences = (*map(here, self.cumulative()), *longest)
        q, k, v = (given.pop(name) for name in "qkv")
        return flash_attn_varlen_func(q, k, v, *sequences, **given, **options)


def check(case, backend=CPU, **more):
    """Runs a case and compares every result and gradient with the reference's."""
    problem = Problem(case)
    actual = problem.call(backend, **more)
    exact, plain = problem.expected(torch.float64), problem.expected(case.dtype)
    if case.dtype != FP32:  # softmax_lse is computed in fp32 whatever the inputs are
        plain["lse"] = problem.expected(FP32)["lse"]
    slack = {"lse": backend.lse_slack * largest_lse(exact["lse"]), **problem.slack(exact["out"])}
    assert_results_close(actual, exact, plain, slack)


def as_reference(lse):
    """softmax_lse with +inf in empty rows, as the reference of FlashAttention-2 has it."""
    assert not (lse == INF).any()
    return lse.masked_fill(lse == -INF, INF)
