"""Valid calls of every entry point, and ways to break them.

An entry point takes its arguments from a pool: one valid, random, small call with a value for each
name that a function of this package gives to an argument. ``break_argument`` replaces one of them
by something malformed, or by something unusual that may still be valid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable

import torch

import flash_attn
import flash_attn_2_cuda
from flash_attn import flash_attn_interface
from flash_attn._library import bind

MARGIN = 16  # elements before and after a tensor in its storage, which no call may touch


def tensor(r, shape, dtype=torch.float32):
    """A tensor of random numbers in the middle of a larger storage."""
    numel = math.prod(shape)
    generator = torch.Generator().manual_seed(r.randrange(2**31))
    storage = torch.randn(numel + 2 * MARGIN, generator=generator).to(dtype)
    return storage[MARGIN : MARGIN + numel].view(shape)


def indices(values):
    return torch.tensor(values, dtype=torch.int32)


def permutation(r, count):
    return indices(r.sample(range(count), count))


def round_up(x, m):
    return (x + m - 1) // m * m


def shapes(r, packed):
    """Head counts, head dims and dtype, with the arguments that depend on nothing else."""
    hk = r.choice([1, 2])
    h = hk if packed else hk * r.choice([1, 2])
    d = r.choice([1, 3, 8, 16, 20])
    dv = d if packed else r.choice([d, 2, 8])
    dtype = r.choice([torch.float32, torch.float16, torch.bfloat16])
    window = (r.choice([-1, -1, 0, 2, 9]), r.choice([-1, -1, 0, 1, 9]))
    p_dropout = r.choice([0.0, 0.0, 0.3])
    options = {
        "softmax_scale": r.choice([0.5, 1.0]),
        "is_causal": r.choice([False, True]),
        "window_left": window[0],
        "window_right": window[1],
        "window_size": window,
        "softcap": r.choice([0.0, 0.0, 5.0]),
        "deterministic": r.choice([False, True]),
        "generator": None,
        "num_splits": r.choice([0, 0, 1, 3]),
        "zero_tensors": r.choice([False, True]),
        "p_dropout": p_dropout,
        "return_softmax": p_dropout > 0 and r.choice([False, True]),
        "s_aux": r.choice([None, tensor(r, (h,), r.choice([dtype, torch.float32]))]),
        "rng_state": torch.tensor([r.randrange(2**40), 5]),
    }
    options["ds_aux"] = None if options["s_aux"] is None else tensor(r, (h,))
    return h, hk, d, dv, dtype, options


def add_score_tensors(r, pool, b, h, rows, cols, dtype):
    pool["alibi_slopes"] = r.choice([None, tensor(r, (h,)), tensor(r, (b, h))])
    shape = tuple(r.choice([1, size]) for size in (b, h, rows, cols))
    pool["attn_bias"] = r.choice([None, tensor(r, shape, r.choice([dtype, torch.float32]))])
    pool["dattn_bias"] = None if pool["attn_bias"] is None else tensor(r, shape)
    pool["s_dmask"] = None
    if pool["return_softmax"]:
        pool["s_dmask"] = tensor(r, (b, h, round_up(rows, 128), round_up(cols, 128)), dtype)


def dense_pool(r, packed=False):
    h, hk, d, dv, dtype, pool = shapes(r, packed)
    b, sq = r.choice([0, 1, 1, 2, 2, 2]), r.choice([0, 1, 3, 5])
    sk = sq if packed else r.choice([0, 1, 4, 7])
    for name, shape in {
        "q": (b, sq, h, d),
        "k": (b, sk, hk, d),
        "v": (b, sk, hk, dv),
        "qkv": (b, sq, 3, h, d),
        "kv": (b, sk, 2, hk, d),
        "out": (b, sq, h, dv),
    }.items():
        pool[name] = tensor(r, shape, dtype)
    for name, like in {"dq": "q", "dk": "k", "dv": "v", "dout": "out"}.items():
        pool[name] = tensor(r, pool[like].shape, dtype)
    pool["softmax_lse"] = tensor(r, (b, h, sq))
    pool["dlse"] = r.choice([None, tensor(r, (b, h, sq))])
    pool["softmax_d"] = tensor(r, (b, h, round_up(sq, 128)))
    add_score_tensors(r, pool, b, h, sq, sk, dtype)
    return pool


def offsets(lengths):
    return indices([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def varlen_pool(r, packed=False, paged=False):
    h, hk, d, dv, dtype, pool = shapes(r, packed)
    b = r.choice([0, 1, 2, 2, 3, 3])
    sq = [r.choice([0, 1, 3, 5]) for _ in range(b)]
    sk = sq if packed else [r.choice([0, 1, 4, 7]) for _ in range(b)]
    total_q = sum(sq) + (0 if packed else r.choice([0, 0, 2]))
    total_k = sum(sk) + (0 if packed else r.choice([0, 0, 2]))
    pool.update(cu_seqlens_q=offsets(sq), cu_seqlens_k=offsets(sk), cu_seqlens=offsets(sq))
    pool["max_seqlen_q"] = max(sq, default=0)
    pool["max_seqlen_k"] = max(sk, default=0) + (0 if packed else r.choice([0, 3]))
    pool["max_seqlen"] = pool["max_seqlen_q"]
    pool.update(seqused_k=None, leftpad_k=None, block_table=None)
    if r.choice([False, True]):
        sk = [r.randrange(length + 1) for length in sk]
        pool["seqused_k"] = indices(sk)
    if r.choice([False, True]):
        pool["leftpad_k"] = indices([r.randrange(length + 1) for length in sk])
    k_rows = (total_k,)
    if paged:
        pages = 8 * b
        k_rows = (pages, r.choice([1, 2, 4]))
        pool["block_table"] = permutation(r, pages).view(b, 8)
    for name, shape in {
        "q": (total_q, h, d),
        "k": (*k_rows, hk, d),
        "v": (*k_rows, hk, dv),
        "qkv": (total_q, 3, h, d),
        "kv": (total_k, 2, hk, d),
        "out": (total_q, h, dv),
    }.items():
        pool[name] = tensor(r, shape, dtype)
    for name, like in {"dq": "q", "dk": "k", "dv": "v", "dout": "out"}.items():
        pool[name] = tensor(r, pool[like].shape, dtype)
    pool["softmax_lse"] = tensor(r, (h, total_q))
    pool["dlse"] = r.choice([None, tensor(r, (h, total_q))])
    pool["softmax_d"] = tensor(r, (h, total_q + 128 * b))
    add_score_tensors(r, pool, b, h, pool["max_seqlen_q"], pool["max_seqlen_k"], dtype)
    return pool


def paged_varlen_pool(r):
    return varlen_pool(r, paged=r.choice([False, True]))


def cache_pool(r):
    h, hk, d, dv, dtype, pool = shapes(r, False)
    b, sq, new = r.choice([0, 1, 2, 2, 3, 3]), r.choice([0, 1, 3]), r.choice([0, 1, 3])
    paged, append = r.choice([False, True]), r.choice([False, True])
    page_size = r.choice([1, 2, 4])
    rows, cache_b = (8 * page_size, 8 * b) if paged else (r.choice([4, 9]), b + 1)
    new = min(new, rows)
    names = ("k_new", "v_new", "rotary_cos", "rotary_sin", "cache_batch_idx", "block_table")
    pool.update(dict.fromkeys(names))
    if paged:
        pool["block_table"] = permutation(r, 8 * b).view(b, 8)
    elif r.choice([False, True]):
        pool["cache_batch_idx"] = permutation(r, cache_b)[:b]
    seqlens = [r.randrange(rows - new + 1) for _ in range(b)]
    pool["cache_seqlens"] = indices(seqlens)
    pool["cache_leftpad"] = r.choice([None, indices([r.randrange(n + 1) for n in seqlens])])
    pool["q"] = tensor(r, (b, sq, h, d), dtype)
    pool["k_cache"] = tensor(r, (cache_b, page_size if paged else rows, hk, d), dtype)
    pool["v_cache"] = tensor(r, (cache_b, page_size if paged else rows, hk, dv), dtype)
    if append:
        pool["k_new"] = tensor(r, (b, new, hk, d), dtype)
        pool["v_new"] = tensor(r, (b, new, hk, dv), dtype)
        if d > 1 and r.choice([False, True]):
            half = r.randrange(1, d // 2 + 1)
            pool["rotary_cos"] = tensor(r, (rows + sq, half), dtype)
            pool["rotary_sin"] = tensor(r, (rows + sq, half), dtype)
    pool["rotary_interleaved"] = r.choice([False, True])
    pool["return_softmax_lse"] = r.choice([False, True])
    pool["alibi_slopes"] = r.choice([None, tensor(r, (h,)), tensor(r, (b, h))])
    pool["out"] = tensor(r, (b, sq, h, dv), dtype)
    pool["softmax_lse"] = tensor(r, (b, h, sq))
    return pool


def read_cache_pool(r):
    return {**cache_pool(r), "rotary_cos": None, "rotary_sin": None}


def combine_pool(r):
    splits, b, s, h, dv = (r.choice([1, 2, 3]) for _ in range(5))
    return {
        "out_partial": tensor(r, (splits, b, s, h, dv)),
        "lse_partial": tensor(r, (splits, b, s, h)),
        "out": tensor(r, (b, s, h, dv), r.choice([torch.float16, torch.float32])),
        "lse": r.choice([None, tensor(r, (b, s, h))]),
    }


@dataclass
class Entry:
    """A function, the pool of its arguments, their names in order, and those that it writes to.

    ``keywords``: arguments are passed by keyword, renamed by KEYWORDS; else all by position.
    """

    name: str
    function: Callable[..., Any]
    pool: Callable[[Any], dict]
    arguments: list[str]
    written: tuple[str, ...] = ()
    keywords: bool = False
    renamed: dict[str, str] = field(default_factory=dict)

    def draw(self, r) -> dict:
        pool = self.pool(r)
        return {name: pool[name] for name in self.arguments}

    def own_name(self, name: str) -> str:
        """The function's name for an argument of the pool."""
        if self.keywords:
            return self.renamed.get(name, KEYWORDS.get(name, name))
        return {"k_new": "k", "v_new": "v"}.get(name, name)

    def call(self, arguments: dict):
        if not self.keywords:
            return self.function(*arguments.values())
        return self.function(**{self.own_name(n): value for n, value in arguments.items()})


KEYWORDS = {
    "p_dropout": "dropout_p",
    "is_causal": "causal",
    "window_left": "window_size_left",
    "window_right": "window_size_right",
    "k_new": "k",
    "v_new": "v",
}
LIBRARY_NAMES = {"k_new": "k", "v_new": "v", "rotary_interleaved": "is_rotary_interleaved"}
_PUBLIC = "p_dropout softmax_scale is_causal window_size softcap alibi_slopes deterministic "
_PUBLIC += "return_softmax s_aux attn_bias"
_MASK = "is_causal window_left window_right softcap"
_CACHE_TENSORS = "cache_seqlens rotary_cos rotary_sin cache_batch_idx cache_leftpad block_table"
_FWD_LIB = "q k v out softmax_lse s_dmask rng_state alibi_slopes s_aux attn_bias"
_BWD_LIB = "dout q k v out softmax_lse dq dk dv softmax_d rng_state alibi_slopes s_aux attn_bias "
_BWD_LIB += "dlse ds_aux dattn_bias"
_CU = "cu_seqlens_q cu_seqlens_k"
_MAX = "max_seqlen_q max_seqlen_k"
_FWD = f"p_dropout softmax_scale {_MASK} alibi_slopes return_softmax s_aux attn_bias"
_BWD = "dout q k v out softmax_lse dq dk dv"
_BWD_TAIL = (
    f"p_dropout softmax_scale {_MASK} alibi_slopes deterministic rng_state dlse s_aux ds_aux "
)
_BWD_TAIL += "attn_bias dattn_bias"
_KEYS = "block_table leftpad_k seqused_k"
GRADIENTS = ("dq", "dk", "dv", "ds_aux", "dattn_bias")
OPERATORS = [
    ("_flash_attn_forward", f"q k v {_FWD}", dense_pool, ()),
    (
        "_flash_attn_varlen_forward",
        f"q k v {_CU} {_MAX} {_FWD} {_KEYS} zero_tensors num_splits",
        paged_varlen_pool,
        (),
    ),
    ("_flash_attn_backward", f"{_BWD} {_BWD_TAIL}", dense_pool, GRADIENTS),
    (
        "_flash_attn_varlen_backward",
        f"{_BWD} {_CU} {_MAX} {_BWD_TAIL} zero_tensors",
        varlen_pool,
        GRADIENTS,
    ),
]
_CACHE_TAIL = f"{_CACHE_TENSORS} alibi_slopes softmax_scale {_MASK} rotary_interleaved num_splits "
_CACHE_TAIL += "s_aux"
_FWD_WRITES = ("out", "softmax_lse", "s_dmask")
_BWD_WRITES = (*GRADIENTS, "softmax_d")


def _public(name, arguments, pool, **options):
    function = getattr(flash_attn, name)
    renamed = {"return_softmax": "return_attn_probs"}
    return Entry(name, function, pool, arguments.split(), keywords=True, renamed=renamed, **options)


def _operator(name, arguments, pool, written=()):
    """The functions of FlashAttention-2's four operators."""
    function = getattr(flash_attn_interface, name)
    return Entry(name, function, pool, arguments.split(), written, keywords=True)


def _torch_operator(name, arguments, pool, written=()):
    function = getattr(torch.ops.flash_attn, name)
    return Entry(f"torch.ops.{name}", function, pool, arguments.split(), written, keywords=True)


def _positional(module, prefix, name, arguments, pool, written):
    function = getattr(module, name)
    return Entry(f"{prefix}.{name}", function, pool, arguments.split(), written)


def _extension(name, arguments, pool, written):
    return _positional(flash_attn_2_cuda, "flash_attn_2_cuda", name, arguments, pool, written)


def _library(name, arguments, pool, written):
    """A function of the C interface, its arguments bound in this order."""
    names = (LIBRARY_NAMES.get(argument, argument) for argument in arguments.split())
    function = bind(name, " ".join(names))
    return Entry(f"lib.{name}", function, pool, arguments.split(), written)


ENTRIES = [
    _public("flash_attn_func", f"q k v {_PUBLIC}", dense_pool),
    _public("flash_attn_kvpacked_func", f"q kv {_PUBLIC}", lambda r: dense_pool(r, packed=True)),
    _public("flash_attn_qkvpacked_func", f"qkv {_PUBLIC}", lambda r: dense_pool(r, packed=True)),
    _public(
        "flash_attn_varlen_func",
        f"q k v {_CU} {_MAX} {_PUBLIC} block_table",
        paged_varlen_pool,
    ),
    _public(
        "flash_attn_varlen_kvpacked_func",
        f"q kv {_CU} {_MAX} {_PUBLIC}",
        lambda r: varlen_pool(r, packed=True),
    ),
    _public(
        "flash_attn_varlen_qkvpacked_func",
        f"qkv cu_seqlens max_seqlen {_PUBLIC}",
        lambda r: varlen_pool(r, packed=True),
    ),
    _public(
        "flash_attn_with_kvcache",
        f"q k_cache v_cache k_new v_new {_CACHE_TENSORS} softmax_scale is_causal window_size "
        "softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse s_aux",
        cache_pool,
        written=("k_cache", "v_cache"),
    ),
    *(_operator(*operator) for operator in OPERATORS),
    *(_torch_operator(*operator) for operator in OPERATORS),
    _torch_operator(
        "_flash_attn_kvcache_forward", f"q k_cache v_cache {_CACHE_TAIL}", read_cache_pool
    ),
    _torch_operator(
        "_flash_attn_kvcache_append_forward",
        f"q k_cache v_cache k_new v_new {_CACHE_TAIL}",
        cache_pool,
        ("k_cache", "v_cache"),
    ),
    _extension(
        "fwd",
        f"q k v out alibi_slopes p_dropout softmax_scale {_MASK} return_softmax generator",
        dense_pool,
        ("out",),
    ),
    _extension(
        "varlen_fwd",
        f"q k v out {_CU} seqused_k leftpad_k block_table alibi_slopes {_MAX} p_dropout "
        f"softmax_scale zero_tensors {_MASK} return_softmax generator num_splits",
        paged_varlen_pool,
        ("out",),
    ),
    _extension(
        "bwd",
        "dout q k v out softmax_lse dq dk dv alibi_slopes p_dropout softmax_scale "
        f"{_MASK} deterministic generator rng_state",
        dense_pool,
        ("dq", "dk", "dv"),
    ),
    _extension(
        "varlen_bwd",
        f"dout q k v out softmax_lse dq dk dv {_CU} alibi_slopes {_MAX} p_dropout softmax_scale "
        f"zero_tensors {_MASK} deterministic generator rng_state",
        varlen_pool,
        ("dq", "dk", "dv"),
    ),
    _extension(
        "fwd_kvcache",
        f"q k_cache v_cache k_new v_new {_CACHE_TENSORS} alibi_slopes out softmax_scale {_MASK} "
        "rotary_interleaved num_splits",
        cache_pool,
        ("k_cache", "v_cache", "out"),
    ),
    _library("mha_fwd", f"{_FWD_LIB} p_dropout softmax_scale {_MASK}", dense_pool, _FWD_WRITES),
    _library(
        "mha_varlen_fwd",
        f"{_FWD_LIB} {_CU} seqused_k leftpad_k block_table {_MAX} p_dropout softmax_scale "
        f"zero_tensors {_MASK} num_splits",
        paged_varlen_pool,
        _FWD_WRITES,
    ),
    _library(
        "mha_bwd",
        f"{_BWD_LIB} p_dropout softmax_scale {_MASK} deterministic",
        dense_pool,
        _BWD_WRITES,
    ),
    _library(
        "mha_varlen_bwd",
        f"{_BWD_LIB} {_CU} {_MAX} p_dropout softmax_scale zero_tensors {_MASK} deterministic",
        varlen_pool,
        _BWD_WRITES,
    ),
    _library(
        "mha_fwd_kvcache",
        f"q k_cache v_cache k_new v_new out softmax_lse {_CACHE_TENSORS} alibi_slopes s_aux "
        f"softmax_scale {_MASK} rotary_interleaved num_splits",
        cache_pool,
        ("k_cache", "v_cache", "out", "softmax_lse"),
    ),
    _library("combine", "out_partial lse_partial out lse", combine_pool, ("out", "lse")),
]


# ------------------------------------------------------------------------------------------------
# Ways to break an argument.

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
NUMBERS = [-1, 0, 1, 2, 7, 127, 129, 1000, 0.5, -0.5, 1.5, 1e300, -1e-300]
NUMBERS += [math.nan, math.inf, -math.inf, 2**31, 2**63 - 1, -(2**63), 2**70]
OBJECTS = [None, "text", b"bytes", [1, 2], (1, 2), {}, object(), True, 3, 0.5, 1j]


def change_dtype(r, t):
    return t.to(r.choice(DTYPES))


def change_rank(r, t):
    if t.dim() > 0 and t.shape[0] > 0 and r.choice([False, True]):
        return t[0]
    extra = r.choice([1, 1, 3])
    return t[(None,) * extra]


def change_size(r, t):
    """Another extent of one dimension; the contents that fit are kept."""
    if t.dim() == 0:
        return t[None]
    dim, size = r.randrange(t.dim()), list(t.shape)
    size[dim] = r.choice([0, max(size[dim] - 1, 0), size[dim] + 1, 2 * size[dim] + 2])
    if r.randrange(10) == 0:
        dim, size[-1] = t.dim() - 1, 577
    new = torch.zeros(size, dtype=t.dtype)
    common = [slice(0, min(a, b)) for a, b in zip(size, t.shape)]
    new[tuple(common)] = t[tuple(common)]
    return new


def change_strides(r, t):
    if t.dim() == 0:
        return t.expand(2)
    dim = r.randrange(t.dim())
    kind = r.randrange(3)
    if kind == 0:
        return t.transpose(dim, r.randrange(t.dim()))
    if kind == 1 and t.shape[dim] > 0:
        return t.narrow(dim, 0, 1).expand_as(t)
    return torch.stack([t, t], dim=-1)[..., 0]


def misalign(r, t):
    if t.numel() == 0 or t.element_size() == 1:
        return t
    memory = torch.zeros(t.numel() * t.element_size() + 1, dtype=torch.uint8)
    shifted = memory[1:].numpy().data
    return torch.frombuffer(shifted, dtype=t.dtype).view(t.shape)


def change_values(r, t):
    """Numbers that are not numbers; indices that point elsewhere."""
    if t.numel() == 0 or t.dtype.is_complex:
        return t
    t = t.clone(memory_format=torch.contiguous_format)
    flat = t.view(-1)
    if t.dtype.is_floating_point:
        flat[r.randrange(t.numel())] = r.choice([math.nan, math.inf, -math.inf])
    elif r.choice([False, True]) and t.dtype == torch.int32:
        flat[:] = torch.tensor([r.randrange(-3, 20) for _ in range(t.numel())])
    elif t.dtype == torch.int32:
        at = r.randrange(t.numel())
        near = int(flat[at]) + r.choice([-1, 1, 2])
        flat[at] = r.choice([-1, 1000, -(2**31), 2**31 - 1, max(min(near, 2**31 - 1), -(2**31))])
    return t


def change_sign_bit(r, t):
    if t.dtype.is_complex or t.dtype in (torch.bool, torch.float8_e4m3fn):
        return t
    return torch._neg_view(t)


def change_kind(r, t):
    kind = r.randrange(4)
    if kind == 0:
        return t.to("meta")
    if kind == 1 and t.dim() > 0:
        return t.to_sparse()
    if kind == 2 and t.dtype in (torch.float32, torch.int32):
        return t.resolve_neg().numpy()
    return r.choice(OBJECTS)


TENSOR_CHANGES = [
    change_dtype,
    change_rank,
    change_size,
    change_strides,
    misalign,
    change_values,
    change_sign_bit,
    change_kind,
]


def break_argument(r, arguments: dict) -> str:
    """Replace one argument and return its name."""
    name = r.choice(list(arguments))
    value = arguments[name]
    others = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x is not value]
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
        if others and r.randrange(8) == 0:
            arguments[name] = r.choice(others)
        else:
            arguments[name] = r.choice(TENSOR_CHANGES)(r, value)
    elif value is None:
        arguments[name] = r.choice([*others, *OBJECTS, *NUMBERS])
    elif isinstance(value, tuple):
        arguments[name] = r.choice([(r.choice(NUMBERS), r.choice(NUMBERS)), (1,), (1, 2, 3), "ab"])
    else:
        arguments[name] = r.choice([*NUMBERS, *OBJECTS, torch.tensor(2), torch.tensor([1, 2])])
    return name
