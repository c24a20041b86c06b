"""Modules written down once more, as functions of their parameters, by plain PyTorch operations."""

from __future__ import annotations

import dataclasses
from typing import Optional

import reference
import torch
import torch.nn.functional as F


def rotation(x, dim, base, interleaved, scale_base, inverse_scale, length):
    """Turn ``(batch, seqlen, heads, headdim)`` by complex numbers, tables rounded to x's dtype."""
    position = torch.arange(x.shape[1], dtype=torch.float64)
    angles = torch.outer(position, base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    scale = torch.ones_like(angles)
    if scale_base is not None:
        factor = (torch.arange(0, dim, 2, dtype=torch.float64) + 0.4 * dim) / (1.4 * dim)
        scale = factor ** ((position - length // 2) / scale_base)[:, None]
        scale = 1.0 / scale if inverse_scale else scale
    cos, sin = ((f(angles) * scale).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    pairs = x[..., :dim].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1 if interleaved else -2)
    return torch.cat((turned.flatten(-2), x[..., dim:]), -1)


@dataclasses.dataclass
class PlainMHA:
    """What ``MHA`` computes from its parameters, attention by ``reference.attention``."""

    num_heads: int
    num_heads_kv: int
    causal: bool = False
    window_size: tuple = (-1, -1)
    softmax_scale: Optional[float] = None
    alibi_slopes: Optional[torch.Tensor] = None
    rotary: tuple = ()  # dim, base, interleaved, scale_base

    def __call__(self, weights, x, x_kv=None, subset=None, padding=None):
        """weights by their names in the state dict; x ``(batch, seqlen, dim)``."""
        q, k, v = self.queries_keys_values(weights, x, x if x_kv is None else x_kv)
        if self.rotary:
            q, k = (rotation(t, *self.rotary, i, t.shape[1]) for i, t in enumerate((q, k)))
        q = q if subset is None else q[:, subset]
        bias = None
        if padding is not None:
            bias = torch.zeros(padding.shape, dtype=x.dtype).masked_fill(~padding, -torch.inf)
            bias = bias[:, None, None]
        out, _ = reference.attention(
            q, k, v, causal=self.causal, window_size=self.window_size, attn_bias=bias,
            softmax_scale=self.softmax_scale, alibi_slopes=self.alibi_slopes,
        )  # fmt: skip
        return F.linear(out.flatten(2), weights["out_proj.weight"], weights.get("out_proj.bias"))

    def queries_keys_values(self, weights, x, x_kv):
        if "Wqkv.weight" in weights:
            qkv = F.linear(x, weights["Wqkv.weight"], weights.get("Wqkv.bias"))
        else:
            parts = [
                F.linear(tokens, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
                for name, tokens in (("Wq", x), ("Wkv", x_kv))
            ]
            return self.heads(*(self.convolved(weights, n, p) for n, p in zip(("q", "kv"), parts)))
        if "dwconv_qkv.weight" in weights:
            qkv = self.convolved(weights, "qkv", qkv)
        size = x.shape[-1]
        q, kv = qkv[..., :size], qkv[..., size:]
        return self.heads(self.convolved(weights, "q", q), self.convolved(weights, "kv", kv))

    def heads(self, q, kv):
        q = q.unflatten(-1, (self.num_heads, -1))
        k, v = kv.chunk(2, -1)
        return q, *(t.unflatten(-1, (self.num_heads_kv, -1)) for t in (k, v))

    @staticmethod
    def convolved(weights, name, x):
        """Each channel's sum over its token and the two before."""
        weight = weights.get(f"dwconv_{name}.weight")
        if weight is None:
            return x
        three = F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1)
        return (
            reference.einsum("bsct,ct->bsc", three, weight[:, 0]) + weights[f"dwconv_{name}.bias"]
        )


def values_and_gradients(function, weights, inputs, dtype, dout=None):
    """``function(weights, *inputs)`` and its gradients, all computed in ``dtype``.

    Args:
        weights: dict of tensors.
        inputs: list of tensors; the results' gradient is ``dout``, or fixed random numbers.

    Returns:
        dict with out and d<name> of each weight and input.
    """
    weights = {n: t.detach().to(dtype).requires_grad_() for n, t in weights.items()}
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = function(weights, *inputs)
    dout = weights_of(out) if dout is None else dout
    leaves = [*weights.values(), *inputs]
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    names = [*weights, *(f"input {i}" for i in range(len(inputs)))]
    return {"out": out.detach(), **{f"d{n}": g for n, g in zip(names, grads)}}


def weights_of(out):
    """Fixed random numbers of a result's shape, exact in every dtype of two bytes."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16().double()


def run_module(module, *inputs, **options):
    """The same dict as ``values_and_gradients`` gives, of a module in its own dtype."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = module(*inputs, **options)
    leaves = [*dict(module.named_parameters()).values(), *inputs]
    grads = torch.autograd.grad(out, leaves, weights_of(out).to(out.dtype))
    names = [*dict(module.named_parameters()), *(f"input {i}" for i in range(len(inputs)))]
    return {"out": out.detach(), **{f"d{n}": g for n, g in zip(names, grads)}}


def assert_as_good_as(actual, plain, weights, inputs):
    """A module's ``run_module`` errs at most twice as much as ``plain`` in the same dtype."""
    dtype = actual["out"].dtype
    exact = values_and_gradients(plain, weights, inputs, torch.float64)
    plain = values_and_gradients(plain, weights, inputs, dtype)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        reference.assert_attention_close(value, exact[name], plain[name], name)
