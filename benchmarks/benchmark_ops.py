"""Fused operators beside torch's eager and compiled compositions of them, in turns; a CSV table.

    python benchmarks/benchmark_ops.py [--op rotary ...] [--dtype bfloat16 ...] [--out DIR]

A case is timed in turns (ours, eager, compiled, a copy), so that whatever else the machine does
meets all alike; printed and kept are medians, in milliseconds. ``share_of_copy`` is the rate of the
bytes that the operator must move, as a fraction of that of torch's copy of as many bytes between
tensors of these sizes: 1 is the memory's bound. Compiling takes a while: ``--compile``.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import torch
import torch.nn.functional as F

from flash_attn.layers import rotary
from flash_attn.losses.cross_entropy import linear_cross_entropy_loss
from flash_attn.ops import activations
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
from flash_attn.ops.triton.rotary import apply_rotary

COLUMNS = (
    "operator", "direction", "shape", "dtype", "ours_ms", "eager_ms", "compiled_ms",
    "share_of_copy",
)  # fmt: skip
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass
class Case:
    """One comparison.

    ours, eager: take no arguments.
    bytes: that must be read and written; 0: arithmetic is the bound.
    """

    direction: str
    shape: str
    ours: Callable
    eager: Callable
    bytes: int


def normal(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def gradients(function: Callable, *inputs: torch.Tensor) -> Callable:
    """Return a function that makes the gradients of a function's results, of ones."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    douts = [torch.ones_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)


def both_directions(ours, eager, inputs, shape: str, forward: int, backward: int):
    """Yield the cases of a differentiable function; forward, backward: bytes."""
    yield Case("forward", shape, lambda: ours(*inputs), lambda: eager(*inputs), forward)
    yield Case("backward", shape, gradients(ours, *inputs), gradients(eager, *inputs), backward)


# ------------------------------------------------------------------------------------------------
# The operators: each a function that yields its cases of a dtype. Add yours to OPERATORS.


def of_rotary(dtype: torch.dtype) -> Iterator[Case]:
    """Queries of a batch, in place and not, in both orders of pairs; queries and keys packed."""
    batch, seqlen, heads = 2, 4096, 16
    for headdim in (64, 128):
        x = normal(dtype, batch, seqlen, heads, headdim)
        cos, sin = (normal(dtype, seqlen, headdim // 2) for _ in range(2))
        moved = 2 * x.nbytes + cos.nbytes + sin.nbytes
        for interleaved in (False, True):
            order = ", interleaved" if interleaved else ""
            for inplace in (False, True):
                place = ", in place" if inplace else ""

                def ours(x=x, cos=cos, sin=sin, interleaved=interleaved, inplace=inplace):
                    return apply_rotary(x, cos, sin, interleaved=interleaved, inplace=inplace)

                def eager(x=x, cos=cos, sin=sin, interleaved=interleaved):
                    return rotary.apply_rotary_emb_torch(x, cos, sin, interleaved)

                shape = f"{batch}x{seqlen}x{heads}x{headdim}{order}{place}"
                yield Case("forward", shape, ours, eager, moved)
    yield from _of_packed_rotary(dtype, batch, seqlen, heads)


def _of_packed_rotary(dtype, batch, seqlen, heads, headdim=64) -> Iterator[Case]:
    qkv = normal(dtype, batch, seqlen, 3, heads, headdim)
    cos, sin = (normal(dtype, seqlen, headdim // 2) for _ in range(2))

    def eager():
        q, k, v = qkv.unbind(2)
        turned = (rotary.apply_rotary_emb_torch(x, cos, sin) for x in (q, k))
        return torch.stack((*turned, v), 2)

    shape = f"{batch}x{seqlen}x3x{heads}x{headdim}, in place"
    moved = 2 * qkv.nbytes * 2 // 3 + cos.nbytes + sin.nbytes
    yield Case("forward", shape, lambda: rotary.apply_rotary_emb_qkv_(qkv, cos, sin), eager, moved)


def of_swiglu(dtype: torch.dtype) -> Iterator[Case]:
    """The halves of one product."""
    rows, cols = 4096, 4096
    x, y = normal(dtype, rows, 2 * cols).chunk(2, dim=-1)
    size = rows * cols * x.itemsize
    eager = lambda x, y: F.silu(x) * y  # noqa: E731
    yield from both_directions(
        activations.swiglu, eager, (x, y), f"{rows}x{cols}", 3 * size, 5 * size
    )


def of_bias_gelu(dtype: torch.dtype) -> Iterator[Case]:
    """With the gradient of the bias."""
    rows, cols = 4096, 4096
    x, bias = normal(dtype, rows, cols), normal(dtype, cols)
    eager = lambda x, bias: F.gelu(x + bias, approximate="tanh")  # noqa: E731
    yield from both_directions(
        activations.bias_gelu, eager, (x, bias), f"{rows}x{cols}", 2 * x.nbytes, 3 * x.nbytes
    )


def of_layer_norm(dtype: torch.dtype) -> Iterator[Case]:
    """Norms alone, and of a sum that is returned too, with and without dropout."""
    rows = 8192
    for n in (1024, 4096):
        x, residual, weight, bias = (normal(dtype, *s) for s in ((rows, n), (rows, n), (n,), (n,)))
        shape, size = f"{rows}x{n}", x.nbytes
        layer_norm = lambda x, w, b: layer_norm_fn(x, w, b, eps=1e-5)  # noqa: E731
        plain = lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)  # noqa: E731
        yield from both_directions(layer_norm, plain, (x, weight, bias), shape, 2 * size, 3 * size)
        for p in (0.0, 0.1):
            inputs, text = (x, residual, weight, bias), f"{shape}, sum" + (", dropout" if p else "")
            functions = _norms_of_sums(p)
            backward = (4 + (p > 0)) * size
            yield from both_directions(*functions, inputs, text, 4 * size, backward)
        inputs, text = (x, residual, weight), f"{shape}, RMS of sum"
        yield from both_directions(*_rms_norms_of_sums(), inputs, text, 4 * size, 4 * size)


def _norms_of_sums(p: float) -> tuple[Callable, Callable]:
    def eager(x, residual, weight, bias):
        y = (F.dropout(x, p) if p else x) + residual
        return F.layer_norm(y, y.shape[-1:], weight, bias), y

    def ours(x, residual, weight, bias):
        return layer_norm_fn(x, weight, bias, residual, eps=1e-5, dropout_p=p, prenorm=True)

    return ours, eager


def _rms_norms_of_sums() -> tuple[Callable, Callable]:
    def ours(x, residual, weight):
        return rms_norm_fn(x, weight, None, residual, eps=1e-5, prenorm=True)

    def eager(x, residual, weight):
        y = x + residual
        return F.rms_norm(y, y.shape[-1:], weight, 1e-5), y

    return ours, eager


def of_cross_entropy(dtype: torch.dtype) -> Iterator[Case]:
    """Logits are read once a direction, and their gradient is written."""
    for rows, classes in ((2048, 32768), (512, 131072)):
        logits = normal(dtype, rows, classes)
        labels = torch.randint(0, logits.shape[1], logits.shape[:1])
        ours = lambda x, y=labels: cross_entropy_loss(x, y)[0].mean()  # noqa: E731
        eager = lambda x, y=labels: F.cross_entropy(x, y)  # noqa: E731
        moved = logits.nbytes, 2 * logits.nbytes
        yield from both_directions(ours, eager, (logits,), f"{rows}x{classes}", *moved)


def of_linear_cross_entropy(dtype: torch.dtype) -> Iterator[Case]:
    """From hidden states to gradients, whose products are the bound."""
    rows, features, classes = 1024, 256, 32768
    hidden, weight = normal(dtype, rows, features), normal(dtype, classes, features) / 16
    labels = torch.randint(0, len(weight), (len(hidden),))
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def ours():
        return torch.autograd.grad(linear_cross_entropy_loss(hidden, weight, labels), leaves)

    def eager():
        return torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels), leaves)

    yield Case("both", f"{rows}x{features}x{classes}", ours, eager, 0)


OPERATORS = {
    "rotary": of_rotary,
    "swiglu": of_swiglu,
    "bias_gelu": of_bias_gelu,
    "layer_norm": of_layer_norm,
    "cross_entropy": of_cross_entropy,
    "linear_cross_entropy": of_linear_cross_entropy,
}

# ------------------------------------------------------------------------------------------------


def copy_of(bytes_moved: int) -> Callable:
    """Return a copy that reads and writes as many bytes in all."""
    source = torch.zeros(bytes_moved // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def medians(functions: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Call each in turn for about ``seconds`` in all, thrice or more; return milliseconds."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while len(times["ours"]) < 3 or time.perf_counter() < end:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def measure(case: Case, seconds: float, with_compiled: bool) -> dict[str, object]:
    """Return a row of the table, without operator and dtype."""
    functions = {"ours": case.ours, "eager": case.eager}
    if case.bytes:
        functions["copy"] = copy_of(case.bytes)
    if with_compiled and case.direction == "forward":
        torch.compiler.reset()  # functions of one code are compiled anew only a few times
        functions["compiled"] = torch.compile(case.eager, fullgraph=True)
    found = medians(functions, seconds)
    compiled = f"{found['compiled']:.2f}" if "compiled" in found else ""
    return {
        "direction": case.direction,
        "shape": case.shape,
        "ours_ms": f"{found['ours']:.2f}",
        "eager_ms": f"{found['eager']:.2f}",
        "compiled_ms": compiled,
        "share_of_copy": f"{found['copy'] / found['ours']:.2f}" if case.bytes else "",
    }


def rows_of(options) -> Iterator[dict[str, object]]:
    for name in options.op:
        for dtype in options.dtype:
            for case in OPERATORS[name](DTYPES[dtype]):
                row = measure(case, options.case_seconds, options.compile)
                yield {"operator": name, "dtype": dtype, **row}


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--case-seconds", type=float, default=2.0)
    parser.add_argument("--compile", action="store_true", help="time torch.compile's, too")
    parser.add_argument("--out", type=Path, help="a folder, for ops.csv")
    options = parser.parse_args(arguments)
    table = csv.DictWriter(sys.stdout, COLUMNS)
    table.writeheader()
    rows = []
    for row in rows_of(options):
        table.writerow(row)
        sys.stdout.flush()
        rows.append(row)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "ops.csv").open("w", newline="") as file:
            kept = csv.DictWriter(file, COLUMNS)
            kept.writeheader()
            kept.writerows(rows)


if __name__ == "__main__":
    main()
