"""One call of every CUDA kernel on a small problem: for the sanitizers, the profiler and tests.

    python tools/gpu_launches.py --dtype bf16                # on a GPU
    python tools/gpu_launches.py --device cpu --dtype fp16   # within FLASH_ATTENTION_EMULATOR=sm_80

The head dims and classes of scores are those of csrc/generate_kernels.py; which kernels serve them
is the device's affair. Of fp32 there are the
fused operators alone.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Callable

import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, v3
from flash_attn._library import bind
from flash_attn.layers import rotary
from flash_attn.ops import activations
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import layer_norm_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "csrc"))
import generate_kernels

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SCORES = {
    "unmasked": {},
    "masked": {"causal": True},
    "modified": {"window_size": (90, 20), "softcap": 5.0},
}
PAGE_SIZE, CAPACITY, CACHED = 16, 704, (650, 0, 300)  # rows of a page and of a cache; rows in use
_combine = bind("combine", "out_partial lse_partial out lse")


class Inputs:
    """Random tensors on a device, the same for every device."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        x = torch.randn(shape, generator=self.generator)
        return x.to(device=self.device, dtype=dtype or self.dtype)

    def int32(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def qkv(self, rows: tuple, keys: tuple, dims: tuple[int, int], heads: tuple[int, int] = (2, 1)):
        """``(*rows, h, d)``, ``(*keys, hk, d)``, ``(*keys, hk, dv)``."""
        (h, hk), (d, dv) = heads, dims
        return (self.normal(*rows, h, d), self.normal(*keys, hk, d), self.normal(*keys, hk, dv))


def dense(inputs: Inputs, dims=(64, 64), scores="unmasked", lengths=(200, 230), **options):
    """By default more queries than a tile has."""
    q, k, v = inputs.qkv((1, lengths[0]), (1, lengths[1]), dims)
    torch.manual_seed(1)  # of dropout
    return flash_attn_func(q, k, v, **SCORES[scores], **options, return_attn_probs=True)


def alibi_and_bias(inputs: Inputs):
    bias = inputs.normal(1, 1, 200, 230)
    slopes = inputs.normal(2, dtype=torch.float32).abs()
    return dense(inputs, alibi_slopes=slopes, attn_bias=bias, s_aux=inputs.normal(2))


def backward(inputs: Inputs, dims=(64, 64), scores="masked", lengths=(150, 170), **options):
    """The output and all gradients; of two query heads that share keys."""
    leaves = [x.requires_grad_() for x in inputs.qkv((1, lengths[0]), (1, lengths[1]), dims)]
    leaves += [x.requires_grad_() for x in options.values() if isinstance(x, torch.Tensor)]
    torch.manual_seed(1)  # of dropout
    out = flash_attn_func(*leaves[:3], **SCORES[scores], **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, inputs.normal(*out.shape) / 8))


def backward_of_bias(inputs: Inputs, dims):
    bias, sinks = inputs.normal(1, 1, 150, 170), inputs.normal(2)
    return backward(inputs, dims, "masked", attn_bias=bias, s_aux=sinks)


def backward_of_packed(inputs: Inputs):
    """Four sequences, one without keys, one without queries, and rows of none."""
    cu_q, cu_k = inputs.int32(0, 150, 170, 170, 240), inputs.int32(0, 200, 200, 290, 340)
    leaves = [x.requires_grad_() for x in inputs.qkv((242,), (343,), (64, 64))]
    out = flash_attn_varlen_func(*leaves, cu_q, cu_k, 150, 200, causal=True)
    return (out.detach(), *torch.autograd.grad(out, leaves, inputs.normal(*out.shape) / 8))


def packed(inputs: Inputs, paged: bool):
    """Three sequences, one without keys, one without queries, and two rows of none."""
    cu_q, cu_k = inputs.int32(0, 150, 170, 170), inputs.int32(0, 200, 200, 290)
    keys, more = (290,), {}
    if paged:
        keys = (40, PAGE_SIZE)
        more["block_table"] = inputs.int32(*range(39)).flip(0).view(3, 13)
    q, k, v = inputs.qkv((172,), keys, (64, 64))
    return flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, 150, 200), causal=True, return_attn_probs=True, **more
    )[:2]


def cache(inputs: Inputs, dims=(64, 64), queries=1, new=0, paged=False, num_splits=0, within=False):
    """Three sequences of a cache; if rows are appended they are rotated, and so are queries.

    ``within``: V is the first columns of K.
    """
    table = None
    rows = (3, CAPACITY)
    if paged:
        pages = CAPACITY // PAGE_SIZE
        rows = (3 * pages, PAGE_SIZE)
        order = torch.randperm(3 * pages, generator=inputs.generator)
        table = inputs.int32(*order.tolist()).view(3, pages)
    q, k_cache, v_cache = inputs.qkv((3, queries), rows, dims, (4, 2))
    if within:
        v_cache = k_cache[..., : dims[1]]
    options = {}
    if new:
        options["k"], options["v"] = (inputs.normal(3, new, 2, d) for d in dims)
        angles = 3 * inputs.normal(CAPACITY, dims[0] // 2, dtype=torch.float32)
        options["rotary_cos"], options["rotary_sin"] = (
            x.to(inputs.dtype) for x in (angles.cos(), angles.sin())
        )
    out, lse = flash_attn_with_kvcache(
        *(q, k_cache, v_cache),
        cache_seqlens=inputs.int32(*CACHED),
        block_table=table,
        causal=True,
        num_splits=num_splits,
        return_softmax_lse=True,
        **options,
    )
    return out, lse, k_cache, v_cache


def combine(inputs: Inputs):
    """Five parts of 3 x 7 rows, one of them empty."""
    out_partial = inputs.normal(5, 1, 7, 3, 100, dtype=torch.float32)
    lse_partial = inputs.normal(5, 1, 7, 3, dtype=torch.float32)
    lse_partial[2] = -torch.inf
    out, lse = (
        torch.empty_like(out_partial[0], dtype=inputs.dtype),
        torch.empty_like(lse_partial[0]),
    )
    _combine(out_partial, lse_partial, out, lse)
    return out, lse


# ------------------------------------------------------------------------------------------------
# Fused operators, by their folders in csrc/: each calls all its kernels, forward and backward


def with_gradients(inputs: Inputs, function: Callable, *leaves: torch.Tensor):
    """The output of a function and its gradients in all tensors that it takes."""
    leaves = [x.requires_grad_() for x in leaves]
    out = function(*leaves)
    dout = inputs.normal(*out.shape).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def of_activations(inputs: Inputs):
    """In chunks of 16 bytes and by elements."""
    results = []
    for rows, cols in ((70, 256), (3, 77)):
        x, y, bias = inputs.normal(rows, cols), inputs.normal(rows, cols), inputs.normal(cols)
        results += with_gradients(inputs, activations.bias_gelu, x, bias)
        results += with_gradients(inputs, activations.swiglu, x, y)
    return results


def of_rotary(inputs: Inputs):
    """Queries and keys in place, and packed sequences with offsets, the last rows of none."""
    angles = 3 * inputs.normal(40, 16, dtype=torch.float32)
    tables = angles.cos().to(inputs.dtype), angles.sin().to(inputs.dtype)
    results = []
    for interleaved in (False, True):
        qkv = inputs.normal(2, 30, 3, 4, 48)
        results.append(rotary.apply_rotary_emb_qkv_(qkv, *tables, interleaved=interleaved))
        places = {
            "seqlen_offsets": inputs.int32(3, 0, 9),
            "cu_seqlens": inputs.int32(0, 20, 20, 41),
            "max_seqlen": 30,
        }

        def turn(x, interleaved=interleaved, places=places):
            return rotary.apply_rotary_emb(x, *tables, interleaved, **places)

        results += with_gradients(inputs, turn, inputs.normal(43, 3, 33))
    return results


def of_layer_norm(inputs: Inputs):
    """In chunks and by elements, with a row in registers and one that is read again."""
    results = []
    for rows, cols in ((70, 256), (9, 77), (3, 4200)):
        x, residual = inputs.normal(rows, cols), inputs.normal(rows, cols)
        weight, bias = inputs.normal(cols), inputs.normal(cols)
        results += with_gradients(inputs, layer_norm_fn, x, weight, bias, residual)
    return results


def of_cross_entropy(inputs: Inputs):
    """A row of them is ignored."""
    results = []
    for rows, classes in ((9, 1000), (3, 77)):
        labels = torch.arange(rows, device=inputs.device) * 7
        labels[1] = -100

        def loss(logits, labels=labels):
            return cross_entropy_loss(logits, labels, label_smoothing=0.1, lse_square_scale=1e-3)[0]

        results += with_gradients(inputs, loss, inputs.normal(rows, classes))
    return results


OPERATORS = {
    "activations": of_activations,
    "layer_norm": of_layer_norm,
    "rotary": of_rotary,
    "xentropy": of_cross_entropy,
}


def calls(dtype: str, device: str) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """Return functions that make inputs, call and return results, by what they do."""

    def call(function):
        return lambda: function(Inputs(DTYPES[dtype], device))

    found = {f"operator {name}": call(function) for name, function in OPERATORS.items()}
    return found if dtype == "fp32" else {**calls_of_attention(dtype, device), **found}


def calls_of_attention(dtype: str, device: str):
    """Return those of ``calls``, fused operators aside."""
    kinds = {kind.name: kind for kind in generate_kernels.KINDS if kind.backend == "sm80"}
    forwards = [kind.configs for kind in generate_kernels.KINDS if kind.name == "fwd"]

    def call(function, *args, **options):
        return lambda: function(Inputs(DTYPES[dtype], device), *args, **options)

    found = {}
    for d, dv, scores in dict.fromkeys(config for configs in forwards for config in configs):
        found[f"dense d={d}x{dv} {scores}"] = call(dense, (d, dv), scores)
    for dims in kinds["decode"].configs:
        found[f"decode d={dims[0]}"] = call(cache, dims)
        found[f"decode d={dims[0]}, 1 split"] = call(cache, dims, num_splits=1)
        found[f"decode d={dims[0]}, pages"] = call(cache, dims, paged=True, queries=3)
        found[f"decode d={dims[0]}, append"] = call(cache, dims, new=2, queries=2, paged=True)
        found[f"decode of 20 rows d={dims[0]}"] = call(cache, dims, queries=10)
    for dims in kinds["decode_wide"].configs:
        found[f"decode d={dims[0]}x{dims[1]}"] = call(cache, dims, paged=True, queries=3)
        found[f"latent decode d={dims[0]}x{dims[1]}"] = call(
            cache, dims, paged=True, queries=10, within=True
        )
    for d, dv, scores, _ in kinds["bwd"].configs:  # the device has one of each
        found.setdefault(f"backward d={d} {scores}", call(backward, (d, dv), scores))
    for d, dv, *_ in kinds["bias_gradient"].configs:
        found[f"backward of bias and sinks, d={d}"] = call(backward_of_bias, (d, dv))
    return {
        **found,
        "backward with dropout": call(backward, scores="modified", dropout_p=0.3),
        "backward, packed": call(backward_of_packed),
        "ALiBi, bias and sinks": call(alibi_and_bias),
        "dropout and S_dmask": call(dense, scores="masked", lengths=(30, 50), dropout_p=0.3),
        "packed": call(packed, False),
        "packed, pages": call(packed, True),
        "prefill of a cache": call(cache, queries=50, new=50, paged=True),
        "combine": call(combine),
    }


def calls_of_fp8(device: str) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """Return functions as ``calls`` does: those that need compute capability 9.0."""

    def call(dims, scores):
        inputs = Inputs(torch.float8_e4m3fn, device)
        half = torch.full((1, 1), 0.5, device=device)
        factors = {f"{x}_descale": half for x in "qkv"}
        options = {**SCORES[scores], **factors, "return_attn_probs": True}
        return v3.flash_attn_func(*inputs.qkv((1, 200), (1, 330), dims), **options)

    kinds = [kind for kind in generate_kernels.KINDS if kind.dtypes == ("e4m3",)]
    configs = [config for kind in kinds for config in kind.configs]
    return {f"fp8 d={d}x{dv} {scores}": partial(call, (d, dv), scores) for d, dv, scores in configs}


def main() -> None:
    """Make all calls, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    for dtype in options.dtype:
        for name, function in calls(dtype, options.device).items():
            print(dtype, name, flush=True)
            function()
    if options.device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        for name, function in calls_of_fp8(options.device).items():
            print(name, flush=True)
            function()
    if options.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
