"""Calls of FlashAttention-3's functions with fp8 tensors, beside the definition in fp64 of the
numbers that they stand for."""

from __future__ import annotations

import dataclasses
import random

import torch
from attention_cases import largest_lse
from backends import BF16, CPU, FP16, FP32
from fa3_cases import reference
from reference import assert_attention_close

from flash_attn import v3

FP8 = torch.float8_e4m3fn
NAN = float("nan")
BLOCK = 128  # rows of one factor
GAP = 16  # elements of NaN between rows


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. ``layout``: "dense", "packed", "cache", "pages" or "packed pages"."""

    layout: str = "dense"
    q_dtype: torch.dtype = FP8
    descale: str = "head"  # "": none, "head", "expanded", "block"
    lengths: tuple = ((70, 70), (33, 90), (90, 33))  # of queries and keys; dense: the first
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    attention_chunk: int = 0
    sinks: bool = False
    num_splits: int = 0
    page_size: int = 16
    leftpad: bool = False
    new: int = 0  # keys that the call appends to a cache
    seed: int = 0

    def __str__(self):
        changed = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        text = ",".join(f"{name}={x}" for name, x, default in changed if x != default)
        return text.replace("torch.", "").replace(" ", "") or "plain"

    @property
    def is_cache(self):
        return self.layout in ("cache", "pages", "packed pages")

    @property
    def out_dtype(self):
        return BF16 if self.q_dtype == FP8 else self.q_dtype


CHOICES = {
    "layout": ["dense", "packed", "cache", "pages", "packed pages"],
    "q_dtype": [FP8, FP8, FP8, BF16, FP16, FP32],
    "descale": ["", "head", "head", "expanded", "block", "block"],
    "lengths": [
        ((1, 1), (1, 200)), ((1, 300), (1, 5), (1, 160)), ((70, 70), (33, 90), (90, 33)),
        ((130, 300), (257, 257)), ((2, 700), (3, 129)), ((64, 150), (0, 20), (20, 0), (129, 128)),
        ((40, 600), (300, 40)),
    ],
    "heads": [(1, 1), (4, 4), (4, 2), (6, 1), (32, 4)],
    "dims": [
        (64, 64), (128, 128), (64, 64), (128, 128), (40, 72), (17, 33), (96, 96), (192, 128),
        (256, 256), (576, 512), (8, 300),
    ],
    "causal": [False, True, True],
    "window_size": [(-1, -1), (-1, -1), (-1, -1), (64, 0), (30, 9), (-1, 20)],
    "softcap": [0.0, 0.0, 3.0],
    "attention_chunk": [0, 0, 0, 0, 48],
    "sinks": [False, False, True],
    "num_splits": [0, 0, 1, 3],
    "page_size": [1, 16, 48, 256],
    "leftpad": [False, True],
    "new": [0, 0, 1, 33],
}  # fmt: skip


def consistent(choice):
    """A choice as the functions take it."""
    if choice["layout"] in ("dense", "packed"):
        choice["new"], choice["leftpad"] = 0, False
    if choice["layout"] in ("cache", "pages"):  # queries of one number
        most = choice["lengths"][0][0]
        choice["lengths"] = tuple((most, keys) for _, keys in choice["lengths"])
    if choice["descale"] == "block":
        choice["attention_chunk"] = 0
    choice["new"] = min(choice["new"], *(keys for _, keys in choice["lengths"]))
    return choice


def sampled_cases(count, seed, **fixed):
    """Random points of the product of CHOICES, each value about as often as it stands there."""
    rng = random.Random(seed)
    columns = {}
    for name, values in CHOICES.items():
        values = fixed.get(name, values)
        columns[name] = (values * (count // len(values) + 1))[:count]
        rng.shuffle(columns[name])
    choices = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    return [Case(**consistent(choice), seed=i) for i, choice in enumerate(choices)]


def amid_nan(x):
    """A copy of x in memory that holds NaN between its rows, before and behind them."""
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + GAP), NAN).to(x.dtype)
    view = buffer[..., GAP // 2 : GAP // 2 + x.shape[-1]]
    view.copy_(x)
    return view


class Factors:
    """The factors of a tensor: fp32 (batch, hk) or (batch, hk, blocks)."""

    def __init__(self, kind, batch, heads, rows, gen):
        blocks = max((rows + BLOCK - 1) // BLOCK, 1)
        shape = {"head": (batch, heads), "block": (batch, heads, blocks), "expanded": (1,)}
        self.given = None
        self.values = torch.ones(batch, heads, blocks)
        if kind:
            given = torch.rand(shape[kind], generator=gen) * 0.7 + 0.3
            self.given = given.expand(batch, heads) if kind == "expanded" else given
            self.values = self.given if kind == "block" else self.given[..., None]
            self.values = self.values.expand(batch, heads, blocks)
        self.is_by_block = kind == "block"

    def of_rows(self, sequence, first, count):
        """(count, heads, 1) of a sequence's rows from ``first`` on."""
        blocks = torch.arange(first, first + count) // BLOCK
        return self.values[sequence][:, blocks].T[..., None]

    def hide(self, used):
        """NaN in place of the factors of blocks that no row is in."""
        if self.is_by_block:
            self.given = self.given.clone()
            for i, rows in enumerate(used):
                self.given[i, :, (rows + BLOCK - 1) // BLOCK :] = NAN


class Problem:
    """The tensors of a case: those that stand for numbers, a list of sequences each."""

    def __init__(self, case):
        self.case = case
        self.gen = torch.Generator().manual_seed(case.seed)
        (h, hk), (d, dv) = case.heads, case.dims
        self.lengths = case.lengths
        if case.layout == "dense":
            self.lengths = case.lengths[:1] * 2
        self.most_q, self.most_k = (max(n) for n in zip(*self.lengths))
        batch = len(self.lengths)
        self.first = [(7 * i + 3) % 40 if case.leftpad else 0 for i in range(batch)]
        self.capacity = self.most_k + max(self.first) + 5  # of a cache's sequence
        if case.layout in ("pages", "packed pages"):
            self.capacity = -(-self.capacity // case.page_size) * case.page_size
        rows_k = self.capacity if case.is_cache else self.most_k
        of_q = case.descale if case.q_dtype == FP8 else ""
        self.q_factors = Factors(of_q, batch, hk, self.most_q, self.gen)
        self.k_factors = Factors(case.descale, batch, hk, rows_k, self.gen)
        self.v_factors = Factors(case.descale, batch, hk, rows_k, self.gen)
        self.q, self.k, self.v = [], [], []
        for sq, sk in self.lengths:
            self.q.append(self.normal(sq, h, d).to(case.q_dtype))
            self.k.append(self.normal(sk, hk, d).to(FP8))
            self.v.append(self.normal(sk, hk, dv).to(FP8))
        self.sinks = self.normal(h).to(case.out_dtype) if case.sinks else None

    def normal(self, *shape):
        return 2 * torch.randn(shape, generator=self.gen)

    def numbers(self, i):
        """q, k and v of sequence i in fp64."""
        q, k, v = (x[i].double() for x in (self.q, self.k, self.v))
        groups = self.case.heads[0] // self.case.heads[1]
        of_q = self.q_factors.of_rows(i, 0, q.shape[0]).repeat_interleave(groups, 1)
        of_k, of_v = (
            x.of_rows(i, self.first[i], k.shape[0]) for x in (self.k_factors, self.v_factors)
        )
        return q * of_q, k * of_k, v * of_v

    def expected(self, dtype):
        """Results by the definition, computed in ``dtype``: out and lse of each sequence."""
        sinks = None if self.sinks is None else self.sinks.to(dtype)
        tensors = ([x.to(dtype) for x in self.numbers(i)] for i in range(len(self.lengths)))
        return [reference(self.case, *x, s_aux=sinks) for x in tensors]

    # --------------------------------------------------------------------------------------------

    def call(self, backend=CPU, **changes):
        """(out, lse) of each sequence by the library."""
        case, here = self.case, backend.here
        options = {
            "causal": case.causal,
            "window_size": case.window_size,
            "softcap": case.softcap,
            "attention_chunk": case.attention_chunk,
            "s_aux": here(self.sinks),
            **changes,
        }
        used = [first + keys for first, (_, keys) in zip(self.first, self.lengths)]
        self.q_factors.hide([queries for queries, _ in self.lengths])
        for name, factors, rows in (
            ("q_descale", self.q_factors, None),
            ("k_descale", self.k_factors, used),
            ("v_descale", self.v_factors, used),
        ):
            if rows is not None:
                factors.hide(rows)
            options.setdefault(name, here(factors.given))
        call = {"dense": self.call_dense, "packed": self.call_packed}
        with backend.calls(case.seed):
            return call.get(case.layout, self.call_cache)(options, here)

    def packed(self, tensors):
        return amid_nan(torch.cat(tensors))

    def cumulative(self, which):
        lengths = [n[which] for n in self.lengths]
        return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)

    def call_dense(self, options, here):
        tensors = (here(amid_nan(torch.stack(x))) for x in (self.q, self.k, self.v))
        out, lse = v3.flash_attn_func(
            *tensors, num_splits=self.case.num_splits, return_attn_probs=True, **options
        )
        return list(zip(out.cpu(), lse.cpu()))

    def call_packed(self, options, here):
        tensors = (here(self.packed(x)) for x in (self.q, self.k, self.v))
        out, lse = v3.flash_attn_varlen_func(
            *tensors,
            *(here(self.cumulative(which)) for which in (0, 1)),
            *(self.most_q, self.most_k),
            num_splits=self.case.num_splits,
            return_attn_probs=True,
            **options,
        )
        return self.sequences(out.cpu(), lse.cpu())

    def sequences(self, out, lse):
        """Results of a packed batch by sequence."""
        lengths = [queries for queries, _ in self.lengths]
        return list(zip(out.split(lengths), lse.split(lengths, 1)))

    def cache_of(self, sequences):
        """A cache with NaN where there is no key, its page table, and the keys still to append."""
        case = self.case
        batch, (_, heads, dim) = len(sequences), sequences[0].shape
        rows = torch.full((batch, self.capacity, heads, dim), NAN).to(FP8)
        new = []
        for row, first, x in zip(rows, self.first, sequences):
            kept = x.shape[0] - case.new
            row[first : first + kept] = x[:kept]
            new.append(x[kept:])
        if case.layout == "cache":
            return amid_nan(rows), None, new
        pages = self.capacity // case.page_size
        gen = torch.Generator().manual_seed(case.seed + 1)
        table = torch.randperm(batch * pages + 3, generator=gen)[: batch * pages]
        cache = torch.full((batch * pages + 3, case.page_size, heads, dim), NAN).to(FP8)
        bytes_of = rows.view(torch.uint8).unflatten(1, (pages, case.page_size)).flatten(0, 1)
        cache.view(torch.uint8)[table] = bytes_of
        return amid_nan(cache), table.view(batch, pages).int(), new

    def call_cache(self, options, here):
        case = self.case
        (k, table, new_k), (v, _, new_v) = self.cache_of(self.k), self.cache_of(self.v)
        lengths = [first + keys - case.new for first, (_, keys) in zip(self.first, self.lengths)]
        options |= {
            "cache_seqlens": here(torch.tensor(lengths, dtype=torch.int32)),
            "num_splits": case.num_splits,
            "return_softmax_lse": True,
            "page_table": here(table),
        }
        if case.leftpad:
            options["cache_leftpad"] = here(torch.tensor(self.first, dtype=torch.int32))
        is_packed = case.layout == "packed pages"
        if case.new:
            join = torch.cat if is_packed else torch.stack
            options |= {"k": here(join(new_k)), "v": here(join(new_v))}
        if is_packed:
            options |= {"cu_seqlens_q": here(self.cumulative(0)), "max_seqlen_q": self.most_q}
            if case.new:
                steps = torch.arange(len(lengths) + 1, dtype=torch.int32) * case.new
                options["cu_seqlens_k_new"] = here(steps)
            q = self.packed(self.q)
        else:
            q = amid_nan(torch.stack(self.q))
        k, v = here(k), here(v)
        out, lse, *_ = v3.flash_attn_with_kvcache(here(q), k, v, **options)
        self.check_appended(table, (k.cpu(), self.k), (v.cpu(), self.v))
        if is_packed:
            return self.sequences(out.cpu(), lse.cpu())
        return list(zip(out.cpu(), lse.cpu()))

    def check_appended(self, table, *caches):
        """The cache holds all keys, and NaN elsewhere still."""
        for cache, sequences in caches:
            rows = cache.view(torch.uint8)
            if table is not None:
                rows = rows[table.long().flatten()].view(len(sequences), -1, *rows.shape[2:])
            for row, first, x in zip(rows, self.first, sequences):
                end = first + x.shape[0]
                assert torch.equal(row[first:end], x.view(torch.uint8))
                for rest in (row[:first], row[end:]):
                    assert rest.view(FP8).float().isnan().all()


def check(case, backend=CPU, **changes):
    """Runs a case and compares its results with the definition's."""
    problem = Problem(case)
    actual = problem.call(backend, **changes)
    exact, rounded, plain = (problem.expected(t) for t in (torch.float64, case.out_dtype, FP32))
    for i, (out, lse) in enumerate(actual):
        assert out.dtype == case.out_dtype
        assert lse.dtype == FP32
        if exact[i][0].numel() == 0:
            continue
        slack = backend.lse_slack * largest_lse(exact[i][1])
        if problem.most_k == 0 and not case.sinks:
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # no key at all
        assert_attention_close(out, exact[i][0], rounded[i][0], f"out[{i}]")
        assert_attention_close(lse, exact[i][1], plain[i][1], f"lse[{i}]", slack)
