"""torch.compile without a graph break and torch.export where the longest length is computed."""

from __future__ import annotations

from functools import wraps

import pytest
import torch
from backends import on_each_backend_with

from flash_attn import (
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.bert_padding import pad_input, unpad_input

SETTINGS = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def longest_as_number(q, cu_seqlens):
    longest = (cu_seqlens[1:] - cu_seqlens[:-1]).max().item()
    return flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, longest, longest)


def longest_as_tensor(q, cu_seqlens):
    longest = (cu_seqlens[1:] - cu_seqlens[:-1]).max()
    return flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, longest, longest)


def unpad_attend_pad(x, mask):
    packed, indices, cu_seqlens, longest, _ = unpad_input(x, mask)
    out = flash_attn_varlen_func(
        packed, packed, packed, cu_seqlens, cu_seqlens, longest, longest, causal=True
    )
    return pad_input(out, indices, *mask.shape)


def of_one_projection(attend):
    """unpad, attend over strided views of one tensor of queries, keys and values, pad."""

    @wraps(attend)
    def f(x, mask):
        packed, indices, cu_seqlens, longest, _ = unpad_input(x.flatten(2), mask)
        out = attend(packed.repeat(1, 3), cu_seqlens, longest)
        return pad_input(out, indices, *mask.shape)

    return f


@of_one_projection
def qkvpacked(qkv, cu_seqlens, longest):
    return flash_attn_varlen_qkvpacked_func(qkv.unflatten(-1, (3, 2, 8)), cu_seqlens, longest)


@of_one_projection
def chunks(qkv, cu_seqlens, longest):
    q, k, v = (x.unflatten(-1, (2, 8)) for x in qkv.chunk(3, -1))
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


@of_one_projection
def transposed(qkv, cu_seqlens, longest):
    heads_first = (x.unflatten(-1, (2, 8)).transpose(0, 1) for x in qkv.chunk(3, -1))
    q, k, v = (x.contiguous().transpose(0, 1) for x in heads_first)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def dense(x, mask):
    """A batch of one sequence whose length the mask tells."""
    qkv = x.flatten(2)[mask].repeat(1, 3)
    return flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, 2, 8))[None])


def packed_inputs(dtype=torch.float32):
    return torch.randn(10, 2, 8).to(dtype), torch.tensor([0, 4, 10], dtype=torch.int32)


def padded_inputs(dtype=torch.float32):
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    return torch.randn(2, 6, 2, 8).to(dtype), mask


FUNCTIONS = pytest.mark.parametrize(
    ("f", "make_inputs"),
    [
        (longest_as_number, packed_inputs),
        (longest_as_tensor, packed_inputs),
        (unpad_attend_pad, padded_inputs),
        (qkvpacked, padded_inputs),
        (chunks, padded_inputs),
        (transposed, padded_inputs),
        (dense, padded_inputs),
    ],
)


def forward_backward(f, x, other):
    x = x.clone().requires_grad_()
    out = f(x, other)
    out.square().sum().backward()
    return out.detach(), x.grad


@FUNCTIONS
@on_each_backend_with("dynamic", True, False)
def test_compile(f, make_inputs, dynamic, backend):
    x, other = make_inputs(backend.dtype)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch._dynamo.config.patch(SETTINGS), backend.calls():
        actual = forward_backward(compiled, x, other)
        for a, b in zip(actual, forward_backward(f, x, other)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


class Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


@FUNCTIONS
@on_each_backend_with("strict", True, False)
def test_export(f, make_inputs, strict, backend):
    inputs = make_inputs(backend.dtype)
    with backend.calls():
        exported = torch.export.export(Module(f), inputs, strict=strict).module()
        assert torch.equal(exported(*inputs), f(*inputs))
        x, other = make_inputs(backend.dtype)
        assert torch.equal(exported(x, other), f(x, other))


def test_exported_length_is_not_fixed():
    """Other lengths than those that were traced."""
    q, cu_seqlens = packed_inputs()
    exported = torch.export.export(Module(longest_as_number), (q, cu_seqlens)).module()
    other = torch.tensor([0, 9, 10], dtype=torch.int32)
    assert torch.equal(exported(q, other), longest_as_number(q, other))


@pytest.mark.parametrize("strict", [None, True, False])
def test_cache_of_unknown_length(strict):
    """compiled (None) or exported: the cache is a strided view."""

    def attend(x, mask):
        cache = x[mask].repeat(1, 1, 2)[None]
        return flash_attn_with_kvcache(x[:1, :1], cache[..., :8], cache[..., 8:])

    inputs = padded_inputs()
    with torch._dynamo.config.patch(SETTINGS):
        if strict is None:
            traced = torch.compile(attend, fullgraph=True, backend="aot_eager")
        else:
            traced = torch.export.export(Module(attend), inputs, strict=strict).module()
        assert torch.equal(traced(*inputs), attend(*inputs))


def test_compile_dropout_mask_of_computed_length():
    """S_dmask's shape follows from a length that is known at run time alone."""

    def f(q, cu_seqlens):
        longest = (cu_seqlens[1:] - cu_seqlens[:-1]).max().item()
        _, lse, s_dmask = flash_attn_varlen_func(
            *(q, q, q, cu_seqlens, cu_seqlens, longest, longest, 0.3), return_attn_probs=True
        )
        return lse, s_dmask

    q, cu_seqlens = packed_inputs()
    with torch._dynamo.config.patch(SETTINGS):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for bounds in (cu_seqlens, torch.tensor([0, 1, 10], dtype=torch.int32)):
            lse, s_dmask = compiled(q, bounds)
            assert s_dmask.shape == (2, 2, 128, 128)
            torch.testing.assert_close(lse, f(q, bounds)[0])


@pytest.mark.parametrize("view", [torch._neg_view, lambda x: (x * 1j).conj().imag])
def test_compile_negative_views_with_gradients(view):
    def f(x):
        q = view(x)
        return flash_attn_varlen_func(q, q, q, bounds, bounds, 6, 6) * view(x)

    x, bounds = packed_inputs()
    compiled = torch.compile(lambda x, _: f(x), fullgraph=True, backend="aot_eager")
    for a, b in zip(forward_backward(compiled, x, None), forward_backward(lambda x, _: f(x), x, 0)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
