"""Sampled calls of flash_attn_with_kvcache, and how to run one of them through library and
reference."""

from __future__ import annotations

import dataclasses
import random

import torch
from attention_cases import largest_lse
from backends import BF16, CPU, FP16, FP32
from reference import assert_attention_close, attention

from flash_attn import flash_attn_with_kvcache

NAN = float("nan")
GUARD = 2  # rows before and after the cache's own; they hold NaN and must stay as they are


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of flash_attn_with_kvcache."""

    dtype: torch.dtype = FP32
    batch: int = 3
    seqlen_q: int = 1
    seqlen_new: int = 0
    capacity: int = 300
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""
    sinks: bool = False
    lengths: str = "tensor"  # cache_seqlens: "tensor", "int" or "none" (the whole cache)
    rotary: str = ""  # "", "interleaved" or "halves"
    rotary_dim: int = 16
    batch_idx: bool = False
    leftpad: bool = False
    page_size: int = 0  # 0: not paged
    num_splits: int = 0
    latent: bool = False  # values are the first columns of keys, in the same memory
    seed: int = 0

    def __str__(self):
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                value = "x".join(map(str, value)) if isinstance(value, tuple) else value
                parts.append(f"{field.name}={value}".replace("torch.", ""))
        return ",".join(parts) or "plain"


CHOICES = {
    "dtype": [FP32, FP16, BF16],
    "batch": [1, 2, 3, 5],
    "seqlen_q": [1, 1, 1, 2, 7, 40, 129],
    "seqlen_new": [0, 1, 1, 5, 33],
    "capacity": [130, 300, 700],
    "heads": [(1, 1), (4, 4), (4, 2), (6, 1), (8, 1)],
    "dims": [(64, 64), (128, 128), (40, 40), (192, 128), (256, 256), (17, 17), (576, 512)],
    "causal": [False, True, True],
    "window_size": [(-1, -1), (-1, -1), (-1, -1), (64, 0), (30, 9), (-1, 20)],
    "softcap": [0.0, 0.0, 5.0],
    "alibi": ["", "", "", "h", "bh"],
    "sinks": [False, False, True],
    "lengths": ["tensor", "tensor", "int", "none"],
    "rotary": ["", "interleaved", "halves"],
    "rotary_dim": [2, 16, 18, 64],
    "batch_idx": [False, True],
    "leftpad": [False, True],
    "page_size": [0, 0, 0, 1, 16, 64, 256],
    "num_splits": [0, 0, 1, 3, 8],
}


def sampled_cases(count, seed, backend=CPU):
    """Random points of the product of CHOICES, as far as ``backend`` has them, made consistent."""
    rng = random.Random(seed)
    columns = {}
    for name, values in {**CHOICES, **backend.cache_choices}.items():
        column = (values * (count // len(values) + 1))[:count]
        rng.shuffle(column)
        columns[name] = column
    cases = []
    for i in range(count):
        choice = {name: column[i] for name, column in columns.items()}
        if choice["page_size"]:
            choice["batch_idx"] = False
        if choice["lengths"] == "none":
            choice["seqlen_new"] = 0
        if choice["seqlen_new"] == 0 or choice["dims"][0] < choice["rotary_dim"]:
            choice["rotary"] = ""
        cases.append(Case(**choice, seed=i))
    return cases


def rotate(x, cos, sin, interleaved):
    """``x`` ``(rows, h, d)`` rotated by ``cos``, ``sin`` ``(rows, rotary_dim / 2)`` in x's
    dtype."""
    half = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned, rest], dim=-1)


class Problem:
    """The tensors of a case. The cache holds NaN wherever no cached token is."""

    def __init__(self, case, backend=CPU):
        self.case = case
        self.backend = backend
        self.gen = torch.Generator().manual_seed(case.seed)
        (h, hk), (d, dv) = case.heads, case.dims
        self.q = self.normal(case.batch, case.seqlen_q, h, d)
        self.k = self.v = None
        if case.seqlen_new:
            self.k = self.normal(case.batch, case.seqlen_new, hk, d)
            self.v = self.normal(case.batch, case.seqlen_new, hk, dv)
            if case.latent:
                self.v = self.k[..., :dv]
        self.lengths = self.random_lengths()
        self.first = [0] * case.batch
        if case.leftpad:
            self.first = [min(n, self.random_int(0, 40)) for n in self.lengths]
        self.make_places()
        self.k_buffer, self.k_cache = self.make_cache(hk, d)
        if case.latent:
            self.v_buffer, self.v_cache = self.k_buffer[..., :dv], self.k_cache[..., :dv]
        else:
            self.v_buffer, self.v_cache = self.make_cache(hk, dv)
        self.slopes = None
        if case.alibi:
            shape = (case.batch, h) if case.alibi == "bh" else (h,)
            self.slopes = torch.rand(shape, generator=self.gen) * 0.3
        self.sinks = self.normal(h) if case.sinks else None
        self.cos = self.sin = None
        if case.rotary:
            angles = torch.rand(case.capacity + 300, case.rotary_dim // 2, generator=self.gen)
            self.cos, self.sin = (f(6.3 * angles).to(case.dtype) for f in (torch.cos, torch.sin))

    def normal(self, *shape):
        return torch.randn(shape, generator=self.gen).to(self.case.dtype)

    def random_int(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.gen))

    def random_lengths(self):
        case = self.case
        room = case.capacity - case.seqlen_new
        if case.lengths == "none":
            return [case.capacity] * case.batch
        if case.lengths == "int":
            return [self.random_int(0, room)] * case.batch
        return [self.random_int(0, room) for _ in range(case.batch)]

    def make_places(self):
        """``places[i]``: the index into the flattened cache of every token that sequence i has room
        for."""
        case = self.case
        if case.page_size:
            pages = -(-case.capacity // case.page_size)
            self.rows = case.batch * pages + 2
            order = torch.randperm(self.rows, generator=self.gen)[: case.batch * pages]
            self.block_table = order.view(case.batch, pages).to(torch.int32)
            self.batch_idx, self.row_length = None, case.page_size
            index = torch.arange(case.capacity)
            page = self.block_table.long()[:, index // case.page_size]
            self.places = page * case.page_size + index % case.page_size
            return
        self.rows = case.batch + 2 if case.batch_idx else case.batch
        self.row_length, self.block_table, self.batch_idx = case.capacity, None, None
        row = torch.arange(case.batch)
        if case.batch_idx:
            row = torch.randperm(self.rows, generator=self.gen)[: case.batch]
            self.batch_idx = row.to(torch.int32)
        self.places = row[:, None] * case.capacity + torch.arange(case.capacity)

    def make_cache(self, hk, d):
        """``(buffer, cache)``: the cache is a view of the buffer without its guard rows."""
        shape = (self.rows, self.row_length + 2 * GUARD, hk, d)
        buffer = torch.full(shape, NAN, dtype=self.case.dtype)
        cache = buffer[:, GUARD:-GUARD]
        for i, (first, last) in enumerate(zip(self.first, self.lengths)):
            for place in self.places[i, first:last].tolist():
                cache[place // self.row_length, place % self.row_length] = self.normal(hk, d)
        return buffer, cache

    def cached(self, cache, i, first, last):
        """Tokens [first, last) of sequence i, ``(last - first, hk, d)``."""
        place = self.places[i, first:last]
        return cache[place // self.row_length, place % self.row_length]

    def call(self, **changes):
        """``(out, lse)`` of the backend. Appends to the caches."""
        case, here = self.case, self.backend.here
        arguments = {
            "k": self.k,
            "v": self.v,
            "rotary_cos": self.cos,
            "rotary_sin": self.sin,
            "cache_batch_idx": self.batch_idx,
            "block_table": self.block_table,
            "causal": case.causal,
            "window_size": case.window_size,
            "softcap": case.softcap,
            "rotary_interleaved": case.rotary == "interleaved",
            "alibi_slopes": self.slopes,
            "num_splits": case.num_splits,
            "s_aux": self.sinks,
        }
        if case.leftpad:
            arguments["cache_leftpad"] = torch.tensor(self.first, dtype=torch.int32)
        if case.lengths == "int":
            arguments["cache_seqlens"] = self.lengths[0]
        # A paged cache has no length of its own: its last page may be larger than the capacity.
        elif case.lengths == "tensor" or case.page_size:
            arguments["cache_seqlens"] = torch.tensor(self.lengths, dtype=torch.int32)
        arguments = {name: here(x) for name, x in (arguments | changes).items()}
        buffers = [here(self.k_buffer)]
        buffers.append(buffers[0][..., : case.dims[1]] if case.latent else here(self.v_buffer))
        caches = (buffer[:, GUARD:-GUARD] for buffer in buffers)
        with self.backend.calls(case.seed):
            results = flash_attn_with_kvcache(
                here(self.q), *caches, **arguments, return_softmax_lse=True
            )
        self.k_buffer.copy_(buffers[0])
        self.v_buffer.copy_(buffers[1])
        return tuple(x.cpu() for x in results)

    def query(self, i, dtype):
        """Rows of q of sequence i in ``dtype``, rotated: by their own positions if there is a mask,
        else by the position of the first new token."""
        case = self.case
        q = self.q[i].to(dtype)
        if not case.rotary:
            return q
        local = case.causal or case.window_size != (-1, -1)
        steps = torch.arange(case.seqlen_q) if local else torch.zeros(case.seqlen_q).long()
        position = self.lengths[i] + steps
        return rotate(q, self.cos[position], self.sin[position], case.rotary == "interleaved")

    def new_keys(self, i, dtype):
        k = self.k[i].to(dtype)
        if not self.case.rotary:
            return k
        position = self.lengths[i] + torch.arange(self.case.seqlen_new)
        interleaved = self.case.rotary == "interleaved"
        return rotate(k, self.cos[position], self.sin[position], interleaved)


def as_bytes(x):
    return x.contiguous().view(torch.uint8)


def check_appended(problem, before_k, before_v):
    """New tokens stand at their places; every other byte of the buffers is as it was."""
    case = problem.case
    for i, length in enumerate(problem.lengths):
        last = length + case.seqlen_new
        if not case.seqlen_new:
            continue
        appended = problem.cached(problem.k_cache, i, length, last)
        if case.rotary:
            exact, plain = problem.new_keys(i, torch.float64), problem.new_keys(i, case.dtype)
            assert_attention_close(appended, exact, plain, f"appended k of {i}")
            rest = 2 * problem.cos.shape[1]
            assert torch.equal(appended[..., rest:], problem.k[i][..., rest:])
        else:
            assert torch.equal(appended, problem.k[i])
        assert torch.equal(problem.cached(problem.v_cache, i, length, last), problem.v[i])
        for cache in (problem.k_cache, problem.v_cache):
            place = problem.places[i, length:last]
            cache[place // problem.row_length, place % problem.row_length] = NAN
    assert torch.equal(as_bytes(problem.k_buffer), as_bytes(before_k))
    assert torch.equal(as_bytes(problem.v_buffer), as_bytes(before_v))


def check_attention(problem, out, lse):
    """``out`` and ``lse`` against the reference on the tokens that the cache holds now."""
    case = problem.case
    for i, length in enumerate(problem.lengths):
        last = length + case.seqlen_new
        k = problem.cached(problem.k_cache, i, problem.first[i], last)[None]
        v = problem.cached(problem.v_cache, i, problem.first[i], last)[None]
        slopes = problem.slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[i : i + 1]
        options = {
            "causal": case.causal,
            "window_size": case.window_size,
            "softcap": case.softcap,
            "alibi_slopes": slopes,
            "s_aux": problem.sinks,
        }

        def run(dtype, k=k, v=v, options=options, i=i):
            q = problem.query(i, dtype)[None]
            return attention(q, k.to(dtype), v.to(dtype), **options)

        exact, plain, plain_lse = run(torch.float64), run(case.dtype), run(FP32)[1]
        if case.rotary:
            plain_lse = plain[1]  # the rotated query is rounded to its dtype
        assert_attention_close(out[i], exact[0][0], plain[0][0], f"out of {i}")
        slack = problem.backend.lse_slack * largest_lse(exact[1])
        assert_attention_close(lse[i], exact[1][0], plain_lse[0], f"lse of {i}", slack)


def check(case, backend=CPU):
    """Runs a case on a backend: what it returns, what it appends and what it leaves alone."""
    problem = Problem(case, backend)
    before = problem.k_buffer.clone(), problem.v_buffer.clone()
    out, lse = problem.call()
    assert out.shape == (*problem.q.shape[:3], case.dims[1])
    assert out.dtype == case.dtype
    assert lse.shape == (case.batch, case.heads[0], case.seqlen_q)
    assert lse.dtype == FP32
    check_attention(problem, out, lse)
    check_appended(problem, *before)
