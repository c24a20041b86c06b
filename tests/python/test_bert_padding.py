"""Packing and unpacking of padded batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)


def right_padded_mask(lengths, seqlen):
    return torch.arange(seqlen) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("trailing", [(), (5,), (2, 3)])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.int64])
def test_unpad_input_selects_tokens_in_order(trailing, mask_dtype):
    lengths = [3, 0, 5, 1]
    hidden = torch.randn(4, 5, *trailing)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(
        hidden, right_padded_mask(lengths, 5).to(mask_dtype)
    )
    expected = torch.cat([hidden[b, :n] for b, n in enumerate(lengths)])
    assert torch.equal(packed, expected)
    assert indices.tolist() == [0, 1, 2, 10, 11, 12, 13, 14, 15]
    assert indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 3, 8, 9]
    assert cu_seqlens.dtype == torch.int32
    assert type(max_seqlen) is int
    assert max_seqlen == 5
    assert seqused.tolist() == lengths
    assert seqused.dtype == torch.int32


def test_unpad_input_with_holes_in_the_mask():
    hidden = torch.arange(8.0).view(2, 4)
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(hidden, mask)
    assert packed.tolist() == [1, 3, 4, 5]
    assert indices.tolist() == [1, 3, 4, 5]
    assert cu_seqlens.tolist() == [0, 2, 4]
    assert max_seqlen == 2


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32])
def test_unpad_input_gives_unused_tokens_room_but_does_not_count_them(mask_dtype):
    hidden = torch.arange(10.0).view(2, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).to(mask_dtype)
    unused = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).to(mask_dtype)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, mask, unused)
    assert packed.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert indices.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 4, 7]
    assert max_seqlen == 4
    assert seqused.tolist() == [2, 3]


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (5, 2), (10,), (2, 1, 5)])
def test_masks_of_other_shapes(shape):
    hidden, mask = torch.arange(10.0).view(2, 5, 1), torch.ones(2, 5, dtype=torch.int64)
    other = torch.ones(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^attention_mask must be"):
        unpad_input(hidden, other)
    with pytest.raises(ValueError, match=r"^unused_mask must be"):
        unpad_input(hidden, mask, other)
    with pytest.raises(ValueError, match=r"^attention_mask_in_length must be"):
        unpad_input_for_concatenated_sequences(hidden, other)


@pytest.mark.parametrize("lengths", [[[4, 2, 0, 0, 0]], [[6, 0, 0, 0, 0]], [[3, -1, 0, 0, 0]]])
def test_lengths_that_a_row_has_no_room_for(lengths):
    with pytest.raises(ValueError, match=r"^attention_mask_in_length must hold"):
        unpad_input_for_concatenated_sequences(torch.zeros(1, 5), torch.tensor(lengths))


def test_mask_of_other_numbers_than_one():
    """What is not 0 selects a token, once."""
    hidden = torch.arange(10.0).view(2, 5)
    mask = torch.tensor([[2, 3, 0, 0, 0], [-1, 0, 0, 0, 0]])
    unused = torch.tensor([[0, 7, 7, 0, 0], [0, 0, 0, 0, 0]])
    for dtype in (torch.int64, torch.float32):
        packed, indices, cu_seqlens, longest, seqused = unpad_input(hidden, mask.to(dtype))
        assert packed.tolist() == indices.tolist() == [0, 1, 5]
        assert (cu_seqlens.tolist(), longest, seqused.tolist()) == ([0, 2, 3], 2, [2, 1])
        packed, _, cu_seqlens, longest, seqused = unpad_input(
            hidden, mask.to(dtype), unused.to(dtype)
        )
        assert packed.tolist() == [0, 1, 2, 5]
        assert (cu_seqlens.tolist(), longest, seqused.tolist()) == ([0, 3, 4], 3, [2, 1])


def test_unpad_input_of_nothing():
    hidden = torch.randn(2, 3, 4)
    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(hidden, torch.zeros(2, 3))
    assert packed.shape == (0, 4)
    assert indices.shape == (0,)
    assert cu_seqlens.tolist() == [0, 0, 0]
    assert max_seqlen == 0
    assert torch.equal(pad_input(packed, indices, 2, 3), torch.zeros(2, 3, 4))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    trailing=st.sampled_from([(), (3,), (2, 2)]),
)
def test_pad_input_undoes_unpad_input(lengths, trailing):
    mask = right_padded_mask(lengths, 9)
    hidden = torch.arange(len(lengths) * 9.0).view(-1, 9) + 1
    hidden = hidden.view(-1, 9, *[1] * len(trailing)).repeat(1, 1, *trailing)
    packed, indices, *_ = unpad_input(hidden, mask)
    padded = pad_input(packed, indices, len(lengths), 9)
    expected = hidden * mask.view(-1, 9, *[1] * len(trailing))
    assert torch.equal(padded, expected)


def test_unpad_input_for_concatenated_sequences():
    hidden = torch.arange(18.0).view(3, 6)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
        hidden, lengths
    )
    expected = [*range(5), *range(6, 11), *range(12, 18)]
    assert packed.tolist() == expected
    assert indices.tolist() == expected
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert cu_seqlens.dtype == torch.int32
    assert type(max_seqlen) is int
    assert max_seqlen == 6


def test_index_first_axis_residual_returns_the_input_too():
    x = torch.randn(5, 3, requires_grad=True)
    gathered, residual = index_first_axis_residual(x, torch.tensor([4, 1]))
    assert torch.equal(gathered, x[[4, 1]])
    assert torch.equal(residual, x)


def test_gradients():
    indices = torch.tensor([4, 0, 2])
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    padded = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda t: index_first_axis(t, indices), x)
    assert check(lambda t: index_put_first_axis(t, indices, 6), values)
    assert check(lambda t: index_first_axis_residual(t, indices), x)
    assert check(lambda t: unpad_input(t, mask)[0], padded)
    assert check(lambda t: pad_input(t, indices, 2, 3), values)


MASK = torch.tensor([[1, 0, 1], [1, 1, 0]])
INDICES = torch.tensor([4, 0, 2])
FUNCTIONS = {
    "index_first_axis": (lambda x: index_first_axis(x, INDICES), (5, 3)),
    "index_put_first_axis": (lambda x: index_put_first_axis(x, INDICES, 6), (3, 2)),
    "index_first_axis_residual": (
        lambda x: torch.cat(index_first_axis_residual(x, INDICES)),
        (5, 2),
    ),
    "unpad_input": (lambda x: unpad_input(x, MASK)[0], (2, 3, 2)),
    "pad_input": (lambda x: pad_input(x, INDICES, 2, 3), (3, 2)),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


@functions
def test_derivatives_of_every_kind(name):
    f, shape = FUNCTIONS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tangent = torch.randn_like(x)
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x)
    x = x.detach()
    assert torch.equal(torch.func.jvp(f, (x,), (tangent,))[1], f(tangent))  # they are linear

    def loss(x):
        return (f(x) ** 3).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    numeric = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.func.hessian(loss)(x), numeric)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(loss))(x), numeric)


@functions
def test_vmap(name):
    f, shape = FUNCTIONS[name]
    x = torch.randn(4, *shape)
    assert torch.equal(torch.func.vmap(f)(x), torch.stack([f(y) for y in x]))
    last = x.movedim(0, -1)
    assert torch.equal(torch.func.vmap(f, -1)(last), torch.stack([f(y) for y in x]))
    gradients = torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(f(y).square().sum() for y in leaf), leaf)
    torch.testing.assert_close(gradients, expected)


@functions
def test_compile(name):
    f, shape = FUNCTIONS[name]
    x = torch.randn(shape, requires_grad=True)
    with torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    ):
        y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, f(x))
    weight = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(z, x, weight)[0] for z in (y, f(x))))


def test_residual_gradient_does_not_change_the_incoming_gradient():
    x = torch.randn(4, 2, requires_grad=True)
    gathered, residual = index_first_axis_residual(x, torch.tensor([1, 3]))
    grad = torch.ones(4, 2)
    torch.autograd.backward([gathered, residual], [torch.ones(2, 2), grad])
    assert torch.equal(grad, torch.ones(4, 2))
    assert x.grad.tolist() == [[1, 1], [2, 2], [1, 1], [2, 2]]
