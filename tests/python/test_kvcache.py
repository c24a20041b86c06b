"""flash_attn_with_kvcache: what it appends, what it leaves alone, and the attention that it
returns."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from attention_cases import BF16, FP16, FP32
from reference import INF, assert_attention_close, attention

from flash_attn import flash_attn_func, flash_attn_with_kvcache

pytestmark = pytest.mark.usefixtures("isa")

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


def sampled_cases(count, seed):
    """Random points of the product of CHOICES, made consistent."""
    rng = random.Random(seed)
    columns = {}
    for name, values in CHOICES.items():
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

    def __init__(self, case):
        self.case = case
        self.gen = torch.Generator().manual_seed(case.seed)
        (h, hk), (d, dv) = case.heads, case.dims
        self.q = self.normal(case.batch, case.seqlen_q, h, d)
        self.k = self.v = None
        if case.seqlen_new:
            self.k = self.normal(case.batch, case.seqlen_new, hk, d)
            self.v = self.normal(case.batch, case.seqlen_new, hk, dv)
        self.lengths = self.random_lengths()
        self.first = [0] * case.batch
        if case.leftpad:
            self.first = [min(n, self.random_int(0, 40)) for n in self.lengths]
        self.make_places()
        self.k_buffer, self.k_cache = self.make_cache(hk, d)
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
        case = self.case
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
        arguments |= changes
        return flash_attn_with_kvcache(
            self.q, self.k_cache, self.v_cache, **arguments, return_softmax_lse=True
        )

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
        assert_attention_close(lse[i], exact[1][0], plain_lse[0], f"lse of {i}")


def check(case):
    problem = Problem(case)
    before = problem.k_buffer.clone(), problem.v_buffer.clone()
    out, lse = problem.call()
    assert out.shape == (*problem.q.shape[:3], case.dims[1])
    assert out.dtype == case.dtype
    assert lse.shape == (case.batch, case.heads[0], case.seqlen_q)
    assert lse.dtype == FP32
    check_attention(problem, out, lse)
    check_appended(problem, *before)


@pytest.mark.parametrize("case", sampled_cases(60, seed=1), ids=str)
def test_feature_product(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(800, seed=2), ids=str)
def test_feature_product_at_length(case):
    check(case)


@pytest.mark.parametrize("rotary", ["interleaved", "halves"])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (20, 3)}])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_rotary(rotary, mask, dtype):
    options = {"dtype": dtype, "rotary": rotary, "seqlen_q": 7, "seqlen_new": 7, **mask}
    check(Case(**options, rotary_dim=64))
    check(Case(**options, rotary_dim=16, leftpad=True))
    check(Case(**options, rotary_dim=32, page_size=16))


@pytest.mark.parametrize("rotary", ["interleaved", "halves"])
@pytest.mark.parametrize("rotary_dim", [2, 6, 10, 14, 18, 34])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_rotary_dim(rotary, rotary_dim, dtype):
    """Any even number up to headdim, also one that fills no vector."""
    options = {"dtype": dtype, "rotary": rotary, "rotary_dim": rotary_dim, "seqlen_new": 3}
    check(Case(**options, seqlen_q=3, causal=True))
    check(Case(**options, seqlen_q=1, page_size=16, capacity=200))
    check(Case(**options, seqlen_q=40, dims=(rotary_dim, 40), window_size=(20, 3)))
    check(Case(**options, seqlen_q=2, dims=(rotary_dim + 1, 8)))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
@pytest.mark.parametrize("num_splits", [0, 1, 3, 8])
def test_paged(page_size, num_splits):
    options = {"page_size": page_size, "num_splits": num_splits, "seqlen_new": 5}
    check(Case(**options, seqlen_q=5, causal=True))
    check(Case(**options, seqlen_q=1, window_size=(90, 0), heads=(8, 1)))


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 8, 128])
@pytest.mark.parametrize("seqlen_q", [1, 9])
def test_splits(num_splits, seqlen_q):
    """Also with more splits than there are keys, and with empty caches."""
    options = {"num_splits": num_splits, "seqlen_q": seqlen_q}
    check(Case(**options, capacity=700, seed=1))
    check(Case(**options, capacity=20, seqlen_new=1, causal=True, sinks=True, seed=2))
    check(Case(**options, capacity=300, window_size=(10, 0), softcap=3.0, alibi="bh", seed=3))


def test_splits_agree():
    problem = Problem(Case(capacity=700, lengths="int", seqlen_q=5, causal=True))
    out, lse = problem.call(num_splits=1)
    for num_splits in (0, 2, 3, 8, 32):
        other_out, other_lse = problem.call(num_splits=num_splits)
        torch.testing.assert_close(other_out, out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other_lse, lse, rtol=1e-6, atol=1e-6)


def test_empty_cache():
    q = torch.randn(2, 3, 4, 40)
    cache = torch.full((2, 20, 2, 40), NAN)
    lengths = torch.zeros(2, dtype=torch.int32)
    for num_splits in (0, 1, 3):
        out, lse = flash_attn_with_kvcache(
            q,
            cache,
            cache,
            cache_seqlens=lengths,
            num_splits=num_splits,
            return_softmax_lse=True,
        )
        assert (out == 0).all()
        assert (lse == INF).all()


def test_returns_out_alone_by_default():
    q, cache = torch.randn(2, 1, 4, 40), torch.randn(2, 20, 2, 40)
    out = flash_attn_with_kvcache(q, cache, cache)
    assert torch.equal(out, flash_attn_with_kvcache(q, cache, cache, return_softmax_lse=True)[0])


def test_cache_seqlens_int_equals_tensor():
    problem = Problem(Case(lengths="int", seqlen_new=4, causal=True, seqlen_q=4))
    as_int = problem.call()
    lengths = torch.tensor(problem.lengths, dtype=torch.int32)
    as_tensor = problem.call(cache_seqlens=lengths)
    assert torch.equal(as_int[0], as_tensor[0])
    assert torch.equal(as_int[1], as_tensor[1])


def test_one_split_equals_flash_attn_func():
    """Bitwise: a cache is nothing but keys and values."""
    q = torch.randn(2, 40, 4, 64)
    k, v = torch.randn(2, 2, 300, 2, 64).unbind(0)
    expected = flash_attn_func(q, k, v, causal=True)
    actual = flash_attn_with_kvcache(q, k, v, causal=True, num_splits=1)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("page_size", [0, 16])
def test_token_by_token_equals_all_at_once(page_size):
    """Decoding with rotary embedding, as a model does it."""
    total, h, d = 40, 4, 32
    gen = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, total, h, d, generator=gen).unbind(0)
    angles = torch.rand(total, d // 2, generator=gen)
    table = None
    cache_shape = (1, total, h, d)
    if page_size:
        table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
        cache_shape = (3, page_size, h, d)
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "block_table": table}
    if page_size:
        pad = torch.zeros(3 * page_size - total, d // 2)
        rotary["rotary_cos"] = torch.cat([angles.cos(), pad])
        rotary["rotary_sin"] = torch.cat([angles.sin(), pad])
    caches = [torch.full(cache_shape, NAN) for _ in range(4)]
    together = flash_attn_with_kvcache(q, *caches[:2], k, v, cache_seqlens=0, causal=True, **rotary)
    for t in range(total):
        now = slice(t, t + 1)
        out = flash_attn_with_kvcache(
            q[:, now], *caches[2:], k[:, now], v[:, now], cache_seqlens=t, causal=True, **rotary
        )
        torch.testing.assert_close(out, together[:, now], rtol=1e-5, atol=1e-5)
    assert torch.equal(as_bytes(caches[0]), as_bytes(caches[2]))
    assert torch.equal(as_bytes(caches[1]), as_bytes(caches[3]))


def test_strided_inputs():
    """Caches laid out (b, hk, s, d), and new keys that are slices of one packed projection."""
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3, 8, 64, generator=gen)
    q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]
    dense = torch.randn(2, 2, 50, 2, 64, generator=gen)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense]
    dense = [x.clone() for x in dense]
    arguments = {"cache_seqlens": 30, "causal": True}
    expected = flash_attn_with_kvcache(
        q.contiguous(), *dense, k.contiguous(), v.contiguous(), **arguments
    )
    actual = flash_attn_with_kvcache(q, *strided, k, v, **arguments)
    assert torch.equal(actual, expected)
    assert all(torch.equal(x, y) for x, y in zip(strided, dense))
