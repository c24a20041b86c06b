"""Cases of attention over processes that share sequences, and their comparison with the whole.

The reference is ``reference.py``'s attention of the whole sequences on one process, in fp64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import accumulate

import torch
import torch.distributed as dist
from reference import assert_attention_close, attention_and_gradients
from small_cases import randn

from flash_attn import distributed as shared
from flash_attn.distributed import layout as layouts


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, of a dense batch or, with several lengths, of packed sequences."""

    seqlens_q: tuple = (32,)
    seqlens_k: tuple = ()  # (): as queries
    heads: int = 4
    heads_k: int = 2
    dim: int = 8
    dim_v: int = 8
    batch: int = 2  # of a dense batch
    options: dict = dataclasses.field(default_factory=dict)
    slopes: str = ""  # "heads" or "batch"
    sinks: bool = False
    packed: bool = False
    dlse: bool = True

    @property
    def lengths(self) -> Iterator[tuple[int, int]]:
        return zip(self.seqlens_q, self.seqlens_k or self.seqlens_q)


CAUSAL, WINDOW, BOTH = {"causal": True}, {"window_size": (9, 0)}, {"window_size": (3, 6)}
NARROW = {"window_size": (2, 0)}

DENSE = {
    "full": Case(),
    "causal": Case(options=CAUSAL),
    "one key-value head, v wider": Case(heads_k=1, dim_v=12, options=CAUSAL),
    "window": Case(options=WINDOW),
    "window to both sides": Case(options=BOTH),
    "narrow window": Case(options=NARROW),
    "window of the future": Case(options={"window_size": (0, 12)}),
    "softcap, scale": Case(options={**CAUSAL, "softcap": 2.0, "softmax_scale": 0.6}),
    "alibi": Case(slopes="heads", options=CAUSAL),
    "alibi, full, of each sequence": Case(slopes="batch"),
    "alibi, window": Case(slopes="heads", options=BOTH),
    "sinks": Case(sinks=True, options=CAUSAL),
    "sinks, window": Case(sinks=True, options=NARROW, heads_k=4),
    "fewer queries": Case((13,), (40,), options=CAUSAL),
    "more queries": Case((40,), (13,), options=CAUSAL),  # the first see no key
    "more queries, alibi": Case((24,), (13,), slopes="heads"),
    "more queries, sinks": Case((24,), (11,), sinks=True, options=CAUSAL),
    "uneven": Case((27,), options=CAUSAL),
    "uneven, window, alibi": Case((29,), options=WINDOW, slopes="batch"),
    "fewer tokens than processes": Case((3,), options=CAUSAL),
    "one token": Case((1,)),
    "no query": Case((0,), (8,)),
    "no key": Case((8,), (0,)),
    "out alone": Case(options=CAUSAL, dlse=False),
}

SOME = (9, 0, 24, 1, 3, 17)
PACKED = {
    "full": Case(SOME, packed=True),
    "causal": Case(SOME, packed=True, options=CAUSAL),
    "window": Case(SOME, packed=True, options=WINDOW, heads_k=1),
    "window to both sides": Case(SOME, packed=True, options=BOTH, dim_v=12),
    "alibi": Case(SOME, packed=True, options=CAUSAL, slopes="heads"),
    "alibi, full, of each sequence": Case(SOME, packed=True, slopes="batch"),
    "alibi, window": Case(SOME, packed=True, options=WINDOW, slopes="batch"),
    "sinks": Case(SOME, packed=True, options=CAUSAL, sinks=True),
    "other lengths of keys": Case(
        (5, 12, 0, 7, 20), (9, 4, 6, 0, 20), packed=True, options=CAUSAL, slopes="heads"
    ),
    "no sequence": Case((), packed=True),
    "sequences without tokens": Case((0, 0), packed=True),
}


def tensors_of(case: Case, dtype) -> dict:
    """q, k, v, dout, dlse and so on, whole; packed ones have a dimension of one before tokens."""
    lengths = list(case.lengths)
    total_q, total_k = sum(q for q, _ in lengths), sum(k for _, k in lengths)
    batch = 1 if case.packed else case.batch
    x = {
        "q": randn(batch, total_q, case.heads, case.dim, seed=1, dtype=dtype),
        "k": randn(batch, total_k, case.heads_k, case.dim, seed=2, dtype=dtype),
        "v": randn(batch, total_k, case.heads_k, case.dim_v, seed=3, dtype=dtype),
        "dout": randn(batch, total_q, case.heads, case.dim_v, seed=4, dtype=dtype),
    }
    if case.dlse:
        x["dlse"] = randn(batch, case.heads, total_q, seed=5)
    if case.sinks:
        x["s_aux"] = randn(case.heads, seed=6, dtype=dtype)
    if case.slopes:
        rows = len(lengths) if case.packed else case.batch
        shape = (case.heads,) if case.slopes == "heads" else (rows, case.heads)
        x["alibi_slopes"] = randn(*shape, seed=7).abs() / 4
    return x


def expected(case: Case, x: dict, dtype) -> dict:
    """out, lse and gradients of the whole in a dtype; sequences of a packed batch are joined."""
    results, start_q, start_k = [], 0, 0
    for s, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        rows, keys = slice(start_q, start_q + seqlen_q), slice(start_k, start_k + seqlen_k)
        options = dict(case.options)
        if case.slopes:
            slopes = x["alibi_slopes"]
            one = case.packed and case.slopes == "batch"
            options["alibi_slopes"] = slopes[s : s + 1] if one else slopes
        leaves = {"q": x["q"][:, rows], "k": x["k"][:, keys], "v": x["v"][:, keys]}
        if case.sinks:
            leaves["s_aux"] = x["s_aux"]
        dlse = x["dlse"][..., rows] if case.dlse else None
        dout = x["dout"][:, rows]
        results.append(attention_and_gradients(leaves, options, dout, dlse, dtype))
        start_q, start_k = rows.stop, keys.stop
    if not results:
        return {}
    joined = {}
    for name in results[0]:
        parts = [r[name] for r in results]
        joined[name] = (
            sum(parts) if name == "ds_aux" else torch.cat(parts, 2 if name == "lse" else 1)
        )
    return joined


def places(case: Case, owned, layout: str) -> dict:
    """Where this process' tokens are in the whole, of queries and of keys."""
    found = {}
    for name, seqlens in zip("qk", zip(*case.lengths)):
        starts = [0, *accumulate(seqlens)]
        parts = [layouts._places(n, owned, layout)[owned.rank] + s for n, s in zip(seqlens, starts)]
        found[name] = torch.cat(parts)
    return found or dict.fromkeys("qk", torch.empty(0, dtype=torch.int64))


def int32(seqlens):
    return torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32)


def local_call(function, case: Case, x: dict, group, layout: str, where: dict) -> dict:
    """This process' out, lse and gradients by the function under test."""
    of = {"q": "q", "k": "k", "v": "k", "dout": "q"}
    mine = {name: x[name].index_select(1, where[which]) for name, which in of.items()}
    if case.packed:
        mine = {name: t[0] for name, t in mine.items()}
    leaves = {n: mine[n].requires_grad_() for n in "qkv"}
    options = {**case.options, "alibi_slopes": x.get("alibi_slopes"), "layout": layout}
    if case.sinks:
        leaves["s_aux"] = options["s_aux"] = x["s_aux"].clone().requires_grad_()
    sequences = map(int32, zip(*case.lengths)) if case.seqlens_q else (int32([]), int32([]))
    sequences = sequences if case.packed else ()
    key = "mesh" if function is shared.hybrid_attention else "group"
    out, lse = function(
        *(leaves[n] for n in "qkv"), *sequences, **options, **{key: group}, return_softmax_lse=True
    )
    outputs, grads = [out], [mine["dout"]]
    if case.dlse:
        dlse = x["dlse"].index_select(2, where["q"])
        outputs, grads = [out, lse], [*grads, dlse[0] if case.packed else dlse]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    results = {"out": out.detach(), "lse": lse.detach()}
    results.update({f"d{n}": g for n, g in zip(leaves, found)})
    if case.packed:
        results = {n: t if n == "ds_aux" else t[None] for n, t in results.items()}
    if case.sinks:
        owned = layouts.owners(group)
        everyone = dist.group.WORLD if owned.inner > 1 else owned.group
        dist.all_reduce(results["ds_aux"], group=everyone)
    return results


_wholes: dict = {}


def whole(case: Case, dtype) -> tuple[dict, dict, dict]:
    """The inputs, and the results in fp64 and in a dtype; the same for every function."""
    key = repr(case), dtype
    if key not in _wholes:
        x = tensors_of(case, dtype)
        _wholes[key] = x, *(expected(case, x, t) for t in (torch.float64, dtype))
    return _wholes[key]


def check(function, case: Case, group, layout: str, dtype=torch.float32) -> dict:
    """Compare every result of this process with its part of the whole's; return the results."""
    owned = layouts.owners(group)
    x, exact, plain = whole(case, dtype)
    where = places(case, owned, layout)
    actual = local_call(function, case, x, group, layout, where)
    for name, wanted in exact.items():
        parts = [wanted, plain[name]]
        if name != "ds_aux":
            which = where["q" if name in ("out", "lse", "dq") else "k"]
            parts = [t.index_select(2 if name == "lse" else 1, which) for t in parts]
        assert_attention_close(actual[name], *parts, name)
    return actual
