"""Rotary position embedding, against complex multiplication in fp64."""

from __future__ import annotations

import pytest
import torch

from flash_attn.layers import rotary
from flash_attn.ops.triton.rotary import apply_rotary

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def tables(seqlen, rotary_dim, dtype=torch.float32):
    """cos and sin of random angles, so that no row is like another."""
    angles = torch.randn(seqlen, rotary_dim // 2, generator=torch.Generator().manual_seed(5)) * 2
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned_token(x, cos, sin, interleaved, conjugate=False):
    """One token (nheads, headdim) by complex numbers, in fp64."""
    rotary_dim = 2 * cos.numel()
    turned, rest = x.double()[:, :rotary_dim], x.double()[:, rotary_dim:]
    pairs = turned.unflatten(1, (-1, 2) if interleaved else (2, -1))
    real, imaginary = pairs.unbind(2 if interleaved else 1)
    factor = torch.complex(cos.double(), -sin.double() if conjugate else sin.double())
    product = torch.complex(real, imaginary) * factor
    both = torch.stack((product.real, product.imag), 2 if interleaved else 1).flatten(1)
    return torch.cat((both, rest), 1)


def reference(x, cos, sin, offsets, interleaved, conjugate=False):
    """A batch (batch, seqlen, nheads, headdim), token by token."""
    offsets = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * len(x)
    return torch.stack(
        [
            torch.stack(
                [
                    turned_token(token, cos[t + start], sin[t + start], interleaved, conjugate)
                    for t, token in enumerate(sequence)
                ]
            )
            for sequence, start in zip(x, offsets)
        ]
    )


def assert_close(actual, expected, dtype=None):
    tolerance = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


OFFSETS = {
    "at 0": 0,
    "int": 3,
    "int32": torch.tensor([4, 0], dtype=torch.int32),
    "int64": torch.tensor([1, 5]),
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rotary_dim", [10, 16])
def test_apply_rotary(dtype, offset, interleaved, inplace, rotary_dim):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 16, dtype=torch.float64).to(dtype)
    cos, sin = tables(12, rotary_dim, dtype)
    for conjugate in (False, True):
        expected = reference(x, cos, sin, OFFSETS[offset], interleaved, conjugate)
        given = x.clone()
        options = {"interleaved": interleaved, "inplace": inplace, "conjugate": conjugate}
        out = apply_rotary(given, cos, sin, OFFSETS[offset], **options)
        assert out.dtype == dtype
        assert_close(out, expected)
        assert (out is given) == inplace
        assert inplace or torch.equal(given, x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offset", [0, torch.tensor([2, 0, 4, 1], dtype=torch.int32)])
def test_packed_sequences(interleaved, inplace, offset):
    """Lengths 5, 0, 1, 8, and two rows after them that belong to no sequence."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16)
    cos, sin = tables(12, 12)
    cu_seqlens = torch.tensor([0, 5, 5, 6, 14], dtype=torch.int32)
    starts = offset.tolist() if isinstance(offset, torch.Tensor) else [offset] * 4
    parts = [
        reference(x[None, a:b], cos, sin, start, interleaved)[0]
        for a, b, start in zip(cu_seqlens, cu_seqlens[1:], starts)
        if a < b
    ]
    expected = torch.cat((*parts, x[14:].double()))
    given = x.clone().requires_grad_()
    leaf = given.clone()
    out = rotary.apply_rotary_emb(leaf, cos, sin, interleaved, inplace, offset, cu_seqlens, 8)
    assert_close(out, expected)
    assert (out is leaf) == inplace
    dout = torch.randn_like(out)
    out.backward(dout)
    parts = [
        reference(dout[None, a:b], cos, sin, start, interleaved, True)[0]
        for a, b, start in zip(cu_seqlens, cu_seqlens[1:], starts)
        if a < b
    ]
    assert_close(given.grad, torch.cat((*parts, dout[14:].double())))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_rotary_emb_and_its_gradient(interleaved, inplace, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 16).to(dtype).requires_grad_()
    cos, sin = tables(9, 12, dtype)
    before = x.clone()
    out = rotary.apply_rotary_emb(before, cos, sin, interleaved, inplace, 2)
    assert_close(out, reference(x.detach(), cos, sin, 2, interleaved))
    assert (out is before) == inplace
    dout = torch.randn_like(out)
    out.backward(dout)
    assert x.grad.dtype == dtype
    assert_close(x.grad, reference(dout, cos, sin, 2, interleaved, conjugate=True))


@pytest.mark.parametrize("offset", [1, torch.tensor([1, 2])])
def test_derivatives_of_every_kind(offset):
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (table.requires_grad_() for table in tables(5, 6, torch.float64))
    arguments = (cos.detach(), sin.detach(), True, False, offset)

    def of_x(x):
        return rotary.apply_rotary_emb(x, *arguments)

    options = {"check_forward_ad": True, "check_batched_grad": False}
    assert torch.autograd.gradcheck(of_x, x, **options)
    assert torch.autograd.gradgradcheck(of_x, x)
    for inplace in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, cos, sin, inplace=inplace: rotary.apply_rotary_emb(
                x.clone(), cos, sin, False, inplace, offset
            ),
            (x, cos, sin),
        )
    weight = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    gradient = torch.func.grad(lambda x: (of_x(x) * weight).sum())(x.detach())
    _, tangent = torch.func.jvp(of_x, (x.detach(),), (weight,))
    assert_close(gradient, reference(weight, *arguments[:2], offset, True, conjugate=True))
    assert_close(tangent, reference(weight, *arguments[:2], offset, True))


@pytest.mark.parametrize("offset", [1, torch.tensor([1, 2])])
@pytest.mark.parametrize("interleaved", [False, True])
def test_transforms_in_x_and_tables(offset, interleaved):
    """Of all three; torch.func's and forward mode's."""
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    inputs = (x, *tables(5, 6, torch.float64))
    positions = torch.arange(3) + (offset if isinstance(offset, int) else offset[:, None])

    def of_all(x, cos, sin):
        return rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offset)

    def exact(x, cos, sin):
        return rotary.apply_rotary_emb_torch(x, cos[positions], sin[positions], interleaved)

    def loss(f):
        return lambda *inputs: (f(*inputs) ** 3).sum()

    tangents = tuple(map(torch.randn_like, inputs))
    func = torch.func
    check = torch.testing.assert_close
    check(func.jvp(of_all, inputs, tangents), func.jvp(exact, inputs, tangents))
    with torch.autograd.forward_ad.dual_level():
        out = of_all(*map(torch.autograd.forward_ad.make_dual, inputs, tangents))
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    check(tangent, func.jvp(exact, inputs, tangents)[1])
    every = (0, 1, 2)
    check(func.grad(loss(of_all), every)(*inputs), func.grad(loss(exact), every)(*inputs))
    for transform in (func.jacrev, func.jacfwd):
        check(transform(of_all, every)(*inputs), transform(exact, every)(*inputs))
    check(func.hessian(loss(of_all), every)(*inputs), func.hessian(loss(exact), every)(*inputs))


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_vmap(in_dims, interleaved):
    inputs = [torch.randn(4, 2, 3, 2, 8), torch.randn(4, 3, 3), torch.randn(4, 3, 3)]
    mapped = [x if d == 0 else x[0] for x, d in zip(inputs, in_dims)]

    def f(*inputs):
        return rotary.apply_rotary_emb(*inputs, interleaved)

    each = [f(*(x[i] if d == 0 else x for x, d in zip(mapped, in_dims))) for i in range(4)]
    assert_close(torch.func.vmap(f, in_dims)(*mapped), torch.stack(each))


def test_vmap_of_packed_in_place():
    cos, sin = tables(3, 6)
    qkv, kv = torch.randn(4, 2, 3, 3, 2, 8), torch.randn(4, 2, 3, 2, 2, 8)
    for f, x in ((rotary.apply_rotary_emb_qkv_, qkv), (rotary.apply_rotary_emb_kv_, kv)):
        expected = torch.stack([f(y.clone(), cos, sin) for y in x])
        assert_close(torch.func.vmap(lambda y, f=f: f(y.clone(), cos, sin))(x), expected)


def packed_qkv(num_heads_q, num_heads_k):
    torch.manual_seed(0)
    if num_heads_q is None:
        return torch.randn(2, 7, 3, num_heads_k, 16), (slice(0, 1), slice(1, 2))
    heads = num_heads_q + 2 * num_heads_k
    parts = (slice(0, num_heads_q), slice(num_heads_q, num_heads_q + num_heads_k))
    return torch.randn(2, 7, heads, 16), parts


@pytest.mark.parametrize("heads", [(None, 3), (4, 2), (3, 1)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_tables_of_k", [False, True])
@pytest.mark.parametrize("table_gradient", [False, True])
def test_packed_qkv_in_place(heads, interleaved, own_tables_of_k, table_gradient):
    qkv, parts = packed_qkv(*heads)
    cos, sin = tables(9, 12)
    cos.requires_grad_(table_gradient)
    of_k = tuple(1.5 * table.detach() for table in (cos, sin)) if own_tables_of_k else (None, None)
    leaf = qkv.clone().requires_grad_()
    given = leaf.clone()
    out = rotary.apply_rotary_emb_qkv_(given, cos, sin, *of_k, interleaved, 2, heads[0])
    assert out is given
    dout = torch.randn_like(out)
    out.backward(dout)

    def expected(x, conjugate):
        x = x.clone().double()
        for part, own in zip(parts, ((None, None), of_k)):
            c, s = (own[0], own[1]) if own[0] is not None else (cos.detach(), sin.detach())
            token = x[:, :, part]
            flat = token.flatten(2, 3) if token.dim() == 5 else token
            turned = reference(flat, c, s, 2, interleaved, conjugate)
            x[:, :, part] = turned.view_as(token)
        return x

    assert_close(out, expected(qkv, False))
    assert_close(leaf.grad, expected(dout, True))
    if table_gradient:
        assert cos.grad.abs().sum() > 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("table_gradient", [False, True])
def test_packed_kv_in_place(interleaved, table_gradient):
    torch.manual_seed(0)
    kv = torch.randn(2, 7, 2, 3, 16, requires_grad=True)
    cos, sin = tables(9, 12)
    cos.requires_grad_(table_gradient)
    given = kv.clone()
    out = rotary.apply_rotary_emb_kv_(given, cos, sin, interleaved, 1)
    assert out is given
    dout = torch.randn_like(out)
    out.backward(dout)
    cos = cos.detach()
    for actual, before, conjugate in ((out, kv, False), (kv.grad, dout, True)):
        assert_close(
            actual[:, :, 0], reference(before[:, :, 0], cos, sin, 1, interleaved, conjugate)
        )
        assert torch.equal(actual[:, :, 1], before[:, :, 1])


def test_classes_apply():
    """Other packages call the autograd functions themselves, leaving out trailing arguments."""
    torch.manual_seed(0)
    cos, sin = tables(7, 16)
    x = torch.randn(2, 7, 3, 16)
    out = rotary.ApplyRotaryEmb.apply(x, cos, sin, True)
    assert_close(out, reference(x, cos, sin, 0, True))
    qkv, kv = torch.stack((x, x, x), 2), torch.stack((x, x), 2)
    rotary.ApplyRotaryEmbQKV_.apply(qkv, cos, sin, None, None, True)
    rotary.ApplyRotaryEmbKV_.apply(kv, cos, sin, True)
    assert torch.equal(qkv, torch.stack((out, out, x), 2))
    assert torch.equal(kv, torch.stack((out, x), 2))


@pytest.mark.parametrize("interleaved", [False, True])
def test_plain_operations(interleaved):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 16, dtype=torch.float64)
    cos, sin = tables(7, 12, torch.float64)
    out = rotary.apply_rotary_emb_torch(x, cos, sin, interleaved)
    assert_close(out, reference(x, cos, sin, 0, interleaved))
    per_sequence = (torch.stack((cos, cos.flip(0))), torch.stack((sin, sin.flip(0))))
    out = rotary.apply_rotary_emb_torch(x, *per_sequence, interleaved)
    assert_close(out[1:], reference(x[1:], cos.flip(0), sin.flip(0), 0, interleaved))
    expected = [-1.0, 0.0, -3.0, 2.0] if interleaved else [-2.0, -3.0, 0.0, 1.0]
    assert rotary.rotate_half(torch.arange(4.0), interleaved).tolist() == expected


def test_strided_tokens_keep_their_strides():
    x = torch.randn(2, 3, 7, 32)[..., ::2].transpose(1, 2)
    cos, sin = tables(7, 16)
    expected = reference(x, cos, sin, 0, False)
    assert_close(apply_rotary(x, cos, sin), expected)
    assert_close(apply_rotary(x, cos, sin, inplace=True), expected)
    assert_close(x, expected)


def packed_call(starts, max_seqlen):
    cu_seqlens = torch.tensor(starts)
    return {"x": torch.zeros(7, 3, 16), "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}


BAD_CALLS = {
    "rotary_dim 20 exceeds the head dim 16": {"cos": torch.ones(9, 10), "sin": torch.ones(9, 10)},
    "cos and sin must be": {"sin": torch.ones(9, 7)},
    "positions 3 to 9 exceed cos and sin, which have 9 rows": {"seqlen_offsets": 3},
    "positions -1 to 5": {"seqlen_offsets": -1},
    "seqlen_offsets must be an int or int32 or int64": {"seqlen_offsets": torch.zeros(2)},
    r"\(2,\), got torch.int64 \(3,\)": {"seqlen_offsets": torch.zeros(3, dtype=torch.int64)},
    "x must be": {"x": torch.zeros(7, 3, 16)},
    "x with cu_seqlens must be": {"cu_seqlens": torch.tensor([0, 7]), "max_seqlen": 7},
    "cu_seqlens needs max_seqlen": packed_call([0, 7], None),
    "cu_seqlens must ascend from 0 to at most the 7 tokens of x": packed_call([0, 4, 8], 8),
    "cu_seqlens must ascend from 0 to": packed_call([0, 6, 5], 8),
    "cu_seqlens must ascend from 0": packed_call([1, 6], 8),
    "cu_seqlens must be int32": packed_call([0.0, 7.0], 8),
    r"cu_seqlens must be int32 \(batch": packed_call([], 8),
    "max_seqlen is 4, but cu_seqlens has a sequence of 5": packed_call([0, 2, 7], 4),
    "x must be floating point": {"x": torch.zeros(2, 7, 3, 16, dtype=torch.int32)},
    "cos must be floating point": {"cos": torch.ones(9, 8, dtype=torch.int64)},
    "sin must be floating point": {"sin": torch.ones(9, 8, dtype=torch.complex64)},
}
OF_WRONG_KIND = {
    "x": [[0.0]],
    "cos": [[1.0]],
    "sin": None,
    "seqlen_offsets": [1],
    "cu_seqlens": [0, 7],
    "max_seqlen": "7",
}


@pytest.mark.parametrize("name", OF_WRONG_KIND)
def test_arguments_of_wrong_kind(name):
    arguments = {"x": torch.zeros(2, 7, 3, 16), "cos": torch.ones(9, 8), "sin": torch.ones(9, 8)}
    for function in (apply_rotary, rotary.apply_rotary_emb):
        with pytest.raises(TypeError, match=f"^{name} must be"):
            function(**(arguments | {name: OF_WRONG_KIND[name]}))


def test_packed_arguments_of_wrong_kind():
    cos, sin = tables(9, 16)
    x = [[0.0]]
    with pytest.raises(TypeError, match=r"^qkv must be"):
        rotary.apply_rotary_emb_qkv_(x, cos, sin)
    with pytest.raises(TypeError, match=r"^cos_k must be"):
        rotary.apply_rotary_emb_qkv_(torch.zeros(2, 7, 3, 2, 16), cos, sin, x)
    with pytest.raises(TypeError, match=r"^kv must be"):
        rotary.apply_rotary_emb_kv_(x, cos, sin)
    module = rotary.RotaryEmbedding(16)
    with pytest.raises(TypeError, match=r"^qkv must be"):
        module(x)
    with pytest.raises(TypeError, match=r"^seqlen_offset must be"):
        module(torch.zeros(2, 7, 3, 2, 16), seqlen_offset=[1])


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments(message):
    arguments = {"x": torch.zeros(2, 7, 3, 16), "cos": torch.ones(9, 8), "sin": torch.ones(9, 8)}
    with pytest.raises(ValueError, match=message):
        apply_rotary(**(arguments | BAD_CALLS[message]))


@pytest.mark.parametrize("offsets", [[0, 3], [0, -1]])
def test_position_outside_the_tables(offsets):
    x, cos = torch.zeros(2, 7, 3, 16), torch.ones(9, 8)
    with pytest.raises(IndexError, match=r"^seqlen_offsets: .* out of range .* 9 rows"):
        apply_rotary(x, cos, cos, torch.tensor(offsets))


@pytest.mark.parametrize("function", ["qkv", "kv"])
def test_bad_packing(function):
    cos, sin = tables(7, 16)
    with pytest.raises(ValueError, match=f"{function} must be"):
        getattr(rotary, f"apply_rotary_emb_{function}_")(torch.zeros(2, 7, 5, 16), cos, sin)
    with pytest.raises(ValueError, match="5 heads are not 2"):
        rotary.apply_rotary_emb_qkv_(torch.zeros(2, 7, 5, 16), cos, sin, num_heads_q=2)


def test_under_torch_compile():
    torch.manual_seed(0)
    cos, sin = tables(9, 12)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, offset, inplace):
        return rotary.apply_rotary_emb(x * 2, cos, sin, True, inplace, offset)

    for offset in (2, torch.tensor([0, 1])):
        for inplace in (False, True):
            x = torch.randn(2, 7, 3, 16, requires_grad=True)
            out = run(x, offset, inplace)
            assert_close(out, 2 * reference(x.detach(), cos, sin, offset, True))
            out.sum().backward()
            expected = reference(torch.full_like(x, 2), cos, sin, offset, True, conjugate=True)
            assert_close(x.grad, expected)


# ------------------------------------------------------------------------------------------------
# The module


def expected_tables(seqlen, dim, base=10000.0, scale_base=None):
    """cos, sin, and the scale of queries, in fp64."""
    position = torch.arange(seqlen, dtype=torch.float64)[:, None]
    pair = torch.arange(dim // 2, dtype=torch.float64)
    angles = position / base ** (2 * pair / dim)
    scale = torch.ones_like(angles)
    if scale_base is not None:
        scale = ((2 * pair + 0.4 * dim) / (1.4 * dim)) ** ((position - seqlen // 2) / scale_base)
    return angles.cos(), angles.sin(), scale


@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 3, torch.tensor([3, 1])])
def test_module_turns_qkv_and_q_and_kv(scale_base, interleaved, offset):
    torch.manual_seed(0)
    module = rotary.RotaryEmbedding(12, 500.0, interleaved, scale_base)
    qkv = torch.randn(2, 7, 3, 4, 16)
    seqlen = 7 if isinstance(offset, int) and offset == 0 else 10
    cos, sin, scale = expected_tables(seqlen, 12, 500.0, scale_base)
    q = reference(qkv[:, :, 0], cos * scale, sin * scale, offset, interleaved)
    k = reference(qkv[:, :, 1], cos / scale, sin / scale, offset, interleaved)
    expected = torch.stack((q, k, qkv[:, :, 2].double()), 2)
    given = qkv.clone()
    assert module(given, seqlen_offset=offset) is given
    assert_close(given, expected)
    q, kv = qkv[:, :, 0].clone(), qkv[:, :, 1:].clone()
    assert module(q, kv, seqlen_offset=offset, max_seqlen=seqlen) == (q, kv)
    assert_close(q, expected[:, :, 0])
    assert_close(kv, expected[:, :, 1:])
    grouped = torch.cat((qkv[:, :, 0], qkv[:, :, 1, :2], qkv[:, :, 2, :2]), 2)
    module(grouped, seqlen_offset=offset, num_heads_q=4)
    assert_close(grouped[:, :, :6], torch.cat((expected[:, :, 0], expected[:, :, 1, :2]), 2))


def test_scores_of_xpos_decay_with_the_distance_alone():
    """Queries are multiplied by what keys are divided by: scores depend on the distance."""
    module = rotary.RotaryEmbedding(16, scale_base=8.0)
    qkv = torch.randn(1, 1, 3, 1, 16).expand(1, 20, 3, 1, 16).clone()
    module(qkv)
    scores = torch.einsum("qd,kd->qk", qkv[0, :, 0, 0], qkv[0, :, 1, 0])
    for distance in range(1, 5):
        diagonal = scores.diagonal(-distance)
        assert_close(diagonal, diagonal[0].expand_as(diagonal).clone(), torch.bfloat16)


def test_module_tables():
    module = rotary.RotaryEmbedding(16)
    assert not module.state_dict()
    assert module.inv_freq.shape == (8,)
    assert module.scale is None
    assert module._seq_len_cached == 0
    module(torch.zeros(1, 5, 3, 2, 16))
    assert module._seq_len_cached == 5
    assert module._cos_cached.shape == module._sin_cached.shape == (5, 8)
    assert module._cos_k_cached is None
    kept = module._cos_cached
    module(torch.zeros(1, 4, 3, 2, 16))
    assert module._cos_cached is kept
    module(torch.zeros(1, 4, 3, 2, 16, dtype=torch.bfloat16))
    assert module._cos_cached.dtype == torch.bfloat16
    scaled = rotary.RotaryEmbedding(16, scale_base=512)
    scaled(torch.zeros(1, 5, 3, 2, 16))
    assert scaled.scale.shape == (8,)
    assert scaled._cos_k_cached.shape == scaled._sin_k_cached.shape == (5, 8)


def test_half_precision_module_keeps_its_frequencies():
    module = rotary.RotaryEmbedding(16).to(torch.bfloat16)
    module(torch.zeros(1, 300, 3, 2, 16, dtype=torch.bfloat16))
    assert_close(module._cos_cached, expected_tables(300, 16)[0])


@pytest.mark.parametrize("is_training", [True, False])
def test_tables_made_in_inference_mode_can_be_trained_with(is_training):
    module = rotary.RotaryEmbedding(16).train(is_training)
    with torch.inference_mode():
        module(torch.zeros(1, 5, 3, 2, 16))
    qkv = torch.randn(1, 5, 3, 2, 16, requires_grad=True)
    module(qkv.clone()).sum().backward()
    assert qkv.grad is not None


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_tables_are_made_once(mode):
    module = rotary.RotaryEmbedding(16)
    with mode():
        module(torch.zeros(1, 5, 3, 2, 16))
        cos = module._cos_cached
        module(torch.zeros(1, 5, 3, 2, 16))
    assert module._cos_cached is cos


@pytest.mark.parametrize("warmed_in", [None, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_training", [True, False])
def test_module_compiles_in_one_graph(warmed_in, is_training):
    """Whatever made its tables, if anything did."""
    module = rotary.RotaryEmbedding(16).train(is_training)
    if warmed_in is not None:
        with warmed_in():
            module(torch.zeros(1, 5, 3, 2, 16))
    qkv = torch.randn(1, 5, 3, 2, 16, requires_grad=is_training)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    out = compiled(qkv.clone())
    assert_close(out, rotary.RotaryEmbedding(16)(qkv.detach().clone()))
    if is_training:
        out.sum().backward()
        assert qkv.grad is not None
