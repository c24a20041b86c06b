"""Sampled products of attention's features, and how to run one of them through library and
reference."""

from __future__ import annotations

import dataclasses
import functools
import random

import torch
from backends import BF16, CPU, FP16, FP32
from reference import (
    assert_attention_close,
    attention,
    attention_and_gradients,
    gradient_slack,
)
from torch.utils._pytree import tree_map

from flash_attn import flash_attn_func


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem; every field has the library's default where it has one."""

    dtype: torch.dtype = FP32
    batch: int = 1
    seqlens: tuple[int, int] = (129, 257)
    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (64, 64)
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: str = ""  # the dimensions of the slopes: "", "h", "bh"
    sinks: torch.dtype | None = None
    bias: str = ""  # the dimensions of attn_bias that are not broadcast, of "bhqk"; "1": all are
    bias_dtype: str = "q"
    dlse: bool = False
    layout: str = (
        "bshd"  # order in memory; "packed": q, k, v interleaved in one tensor, if they fit
    )
    seed: int = 0

    def __str__(self):
        """The fields that are not the default's, for the name of a test."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("dtype", "seqlens", "heads", "dims") or value != field.default:
                value = "x".join(map(str, value)) if isinstance(value, tuple) else value
                parts.append(f"{field.name}={value}".replace("torch.", ""))
        return ",".join(parts)


CHOICES = {
    "dtype": [FP32, FP16, BF16],
    "batch": [1, 1, 2, 3],
    "seqlens": [
        (1, 1), (1, 257), (3, 31), (31, 3), (113, 127), (127, 113), (128, 128), (129, 257),
        (257, 129), (400, 700), (700, 400), (1, 700), (113, 400), (257, 257), (7, 129),
    ],
    "heads": [(1, 1), (4, 4), (4, 2), (6, 1), (6, 3), (5, 5)],
    "dims": [
        (1, 1), (8, 8), (17, 17), (40, 40), (64, 64), (72, 72), (96, 96), (128, 128), (192, 128),
        (256, 256), (576, 512), (64, 40), (8, 72), (64, 64), (128, 128),
    ],
    "causal": [False, True],
    "window_size": [
        (-1, -1), (-1, -1), (-1, -1), (0, 0), (16, 0), (-1, 7), (50, 30), (100, -1), (3, 200),
    ],
    "softcap": [0.0, 0.0, 0.0, 15.0, 1.5],
    "softmax_scale": [None, None, 0.3],
    "alibi": ["", "", "h", "bh"],
    "sinks": [None, None, FP32, BF16],
    "bias": ["", "", "", "bhqk", "qk", "bk", "hk", "bqk"],
    "bias_dtype": ["q", "fp32"],
    "dlse": [False, True],
    "layout": ["bshd", "bshd", "bhsd", "sbhd", "packed"],
}  # fmt: skip
SWEEP_FACTOR = 3  # of thousands of cases, where a few ratios of largest errors are far out
MAX_COST = 1.5e8  # of batch * heads * seqlen_q * seqlen_k * (d + dv)


def sampled_cases(count, seed, backend=CPU):
    """``count`` random points of the product of CHOICES, as far as ``backend`` has them, in which
    every choice of a field comes up equally often."""
    rng = random.Random(seed)
    columns = {}
    for name, values in {**CHOICES, **backend.choices}.items():
        column = (values * (count // len(values) + 1))[:count]
        rng.shuffle(column)
        columns[name] = column
    cases = []
    for i in range(count):
        case = Case(**{name: column[i] for name, column in columns.items()}, seed=i)
        cost = case.seqlens[0] * case.seqlens[1] * sum(case.dims)
        if cost * case.batch * case.heads[0] > MAX_COST:
            heads = case.heads if cost * case.heads[0] <= MAX_COST else (2, 1)
            case = dataclasses.replace(case, batch=1, heads=heads)
        cases.append(case)
    return cases


def in_layout(layout, tensors):
    """q, k, v of shapes "bshd", equal to those given, in memory as ``Case.layout`` tells."""
    if layout != "packed":
        order = ["bshd".index(c) for c in layout]
        back = [layout.index(c) for c in "bshd"]
        return {n: x.permute(order).contiguous().permute(back) for n, x in tensors.items()}
    if len({(x.shape[1], x.shape[3]) for x in tensors.values()}) > 1:
        return tensors
    heads = [x.shape[2] for x in tensors.values()]
    return dict(zip(tensors, torch.cat(list(tensors.values()), 2).split(heads, 2)))


def make_tensors(case):
    """``(tensors, options, dout, dlse)`` of a case, as ``attention_and_gradients`` takes them."""
    gen = torch.Generator().manual_seed(case.seed)
    (sq, sk), (h, hk), (d, dv) = case.seqlens, case.heads, case.dims

    def normal(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=gen).to(dtype)

    tensors = in_layout(
        case.layout,
        {
            "q": normal(case.batch, sq, h, d),
            "k": normal(case.batch, sk, hk, d),
            "v": normal(case.batch, sk, hk, dv),
        },
    )
    options = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
    }
    if case.alibi:
        shape = (case.batch, h) if case.alibi == "bh" else (h,)
        options["alibi_slopes"] = torch.rand(shape, generator=gen) * 0.3
    if case.sinks is not None:
        tensors["s_aux"] = normal(h, dtype=case.sinks)
    if case.bias:
        extents = zip("bhqk", (case.batch, h, sq, sk))
        shape = [n if letter in case.bias else 1 for letter, n in extents]
        dtype = case.dtype if case.bias_dtype == "q" else FP32
        tensors["attn_bias"] = normal(*shape, dtype=dtype)
    dout = normal(case.batch, sq, h, dv)
    dlse = normal(case.batch, h, sq, dtype=FP32) if case.dlse else None
    return tensors, options, dout, dlse


def cuda_case(**fields):
    """A case that the CUDA kernels have, of a size that the emulated GPU runs in a moment."""
    return Case(**{"dtype": BF16, "seqlens": (128, 192), "heads": (2, 1), **fields})


def qkv(case):
    """q, k, v of a case that has no further tensors."""
    return tuple(make_tensors(case)[0][name] for name in "qkv")


@functools.lru_cache(maxsize=4)
def expected(case):
    """``(exact, plain)``: the reference in fp64, and in the case's dtype. The library computes the
    LSE in fp32 whatever the inputs are, so plain's LSE is that of fp32 arithmetic on the same
    inputs."""
    tensors, options, dout, dlse = make_tensors(case)
    exact = attention_and_gradients(tensors, options, dout, dlse)
    plain = attention_and_gradients(tensors, options, dout, dlse, dtype=case.dtype)
    if case.dtype != FP32:
        plain["lse"] = attention(**{n: t.float() for n, t in tensors.items()}, **options)[1]
    return exact, plain


def flash_forward(tensors, options, **more):
    """The library's ``{"out", "lse"}``."""
    out, lse, _ = flash_attn_func(**tensors, **options, **more, return_attn_probs=True)
    return {"out": out.detach(), "lse": lse.detach()}


def flash_forward_backward(tensors, options, dout, dlse=None, **more):
    """The library's counterpart of ``attention_and_gradients``."""
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    out, lse, _ = flash_attn_func(**leaves, **options, **more, return_attn_probs=True)
    outputs, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    wanted = torch.autograd.grad(outputs, list(leaves.values()), grads)
    gradients = {f"d{n}": g for n, g in zip(leaves, wanted)}
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def assert_results_close(actual, exact, plain, slack=None, factor=2):
    """``assert_attention_close`` of every result; reports all that fail."""
    assert actual.keys() == exact.keys()
    failures = []
    for name in actual:
        own_slack = (slack or {}).get(name, 0.0)
        triple = actual[name], exact[name], plain[name]
        try:
            assert_attention_close(*triple, name, own_slack, factor)
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
    assert not failures, "\n".join(failures)


def run(case, backend):
    """What ``backend`` makes of a case: out, lse and, if it has a backward, the gradients."""
    problem = tree_map(backend.here, make_tensors(case))
    with backend.calls(case.seed):
        if backend.has_backward(case.dims):
            results = flash_forward_backward(*problem)
        else:
            results = flash_forward(*problem[:2])
    return {name: x.cpu() for name, x in results.items()}


def largest_lse(lse):
    """The largest finite LSE, at least 1."""
    finite = lse[lse.isfinite()].abs()
    return max(1.0, finite.max().item() if finite.numel() else 0.0)


def lse_rounding(exact):
    """An error of dattn_bias, which is dS, that does not show in plain PyTorch's: the backward
    makes P of the LSE, whose rounding to fp32 is a relative error of P. Sums of dS average it."""
    if "dattn_bias" not in exact or not exact["dattn_bias"].numel():
        return 0.0
    relative = torch.finfo(FP32).eps / 2 * largest_lse(exact["lse"])
    return relative * exact["dattn_bias"].abs().max().item()


def check(case, factor=2, lse_slack=0.0, backend=CPU):
    """Runs a case on a backend and compares every result with the reference's."""
    tensors, options, dout, _ = make_tensors(case)
    actual = run(case, backend)
    assert actual["out"].dtype == case.dtype
    assert actual["lse"].dtype == FP32
    exact, plain = ({name: r[name] for name in actual} for r in expected(case))
    lse_slack += backend.lse_slack * largest_lse(exact["lse"])
    slack = {"lse": lse_slack}
    if backend.has_backward(case.dims):
        slack |= gradient_slack(tensors, options, dout, exact["out"])
        slack["dattn_bias"] = slack.get("dattn_bias", 0.0) + lse_rounding(exact)
    assert_results_close(actual, exact, plain, slack, factor)
