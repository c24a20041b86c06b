"""The operators by PyTorch's own checks, and the gradients of the functions."""

from __future__ import annotations

import pytest
import torch
from backends import on_each_backend
from reference import attention
from small_cases import (
    BATCH,
    CU_SEQLENS_K,
    CU_SEQLENS_Q,
    DIM,
    DIM_V,
    HEADS,
    HEADS_K,
    MAX_K,
    MAX_Q,
    SEQLEN_K,
    SEQLEN_Q,
    TOTAL_K,
    TOTAL_Q,
    assert_all_close,
    caches,
    dense,
    grads_of,
    int32,
    packed,
    randn,
    sequences,
)
from torch.library import opcheck

from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

ops = torch.ops.flash_attn


# ------------------------------------------------------------------------------------------------
# Operators

SCORE = (0.3, True, 4, -1, 0.0)  # softmax_scale, causal, window_size, softcap
EXTENSIONS = ["plain", "sinks", "bias", "sinks and bias"]


def extensions(kind, batch, seqlen_q, seqlen_k, **inputs):
    given = {}
    if "sinks" in kind:
        given["s_aux"] = randn(HEADS, seed=6, **inputs)
    if "bias" in kind:
        given["attn_bias"] = randn(batch, 1, seqlen_q, seqlen_k, seed=7, **inputs)
    return given


def backward_extensions(kind, batch, seqlen_q, seqlen_k, lse):
    given = extensions(kind, batch, seqlen_q, seqlen_k)
    if "s_aux" in given:
        given["ds_aux"] = torch.zeros(HEADS)
    if "attn_bias" in given:
        given["dattn_bias"] = torch.zeros(given["attn_bias"].shape)
    return {"dlse": torch.randn_like(lse), **given}


@on_each_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", EXTENSIONS)
def test_opcheck_forward(kind, dropout_p, backend):
    args = (*dense(**backend.inputs), dropout_p, *SCORE, None, dropout_p > 0)
    more = extensions(kind, BATCH, SEQLEN_Q, SEQLEN_K, **backend.inputs)
    with backend.calls():
        opcheck(ops._flash_attn_forward.default, args, more)


@on_each_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", EXTENSIONS)
def test_opcheck_varlen_forward(kind, dropout_p, backend):
    args = (*packed(**backend.inputs), *sequences(), dropout_p, *SCORE, None, dropout_p > 0)
    more = extensions(kind, 3, MAX_Q, MAX_K, **backend.inputs)
    with backend.calls():
        opcheck(ops._flash_attn_varlen_forward.default, args, more)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", EXTENSIONS)
def test_opcheck_backward(kind, dropout_p):
    q, k, v = dense()
    given = extensions(kind, BATCH, SEQLEN_Q, SEQLEN_K)
    out, lse, _, rng = ops._flash_attn_forward(q, k, v, dropout_p, *SCORE, None, False, **given)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    args = (torch.randn_like(out), q, k, v, out, lse, *grads, dropout_p, *SCORE, None, True, rng)
    opcheck(
        ops._flash_attn_backward.default,
        args,
        backward_extensions(kind, BATCH, SEQLEN_Q, SEQLEN_K, lse),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", EXTENSIONS)
def test_opcheck_varlen_backward(kind, dropout_p):
    q, k, v = packed()
    given = extensions(kind, 3, MAX_Q, MAX_K)
    out, lse, _, rng = ops._flash_attn_varlen_forward(
        q, k, v, *sequences(), dropout_p, *SCORE, **given
    )
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    args = (torch.randn_like(out), q, k, v, out, lse, *grads, *sequences())
    opcheck(
        ops._flash_attn_varlen_backward.default,
        (*args, dropout_p, *SCORE, None, True, rng),
        backward_extensions(kind, 3, MAX_Q, MAX_K, lse),
    )


KVCACHE_SETTINGS = (None, None, None, None, None, None, 0.3, True, -1, -1, 0.0, True, 0)


@on_each_backend
def test_opcheck_kvcache(backend):
    q, dtype = dense(dtype=backend.dtype)[0], backend.dtype
    args = (q, *caches(dtype=dtype), int32([6, 8]), *KVCACHE_SETTINGS)
    with backend.calls():
        opcheck(ops._flash_attn_kvcache_forward.default, args, {"s_aux": randn(HEADS, dtype=dtype)})


@on_each_backend
def test_opcheck_kvcache_append(backend):
    q, k, v = dense(dtype=backend.dtype)
    args = (q, *caches(16, backend.dtype), k, v, int32([6, 8]), *KVCACHE_SETTINGS)
    sinks = randn(HEADS, dtype=backend.dtype)
    with backend.calls():
        opcheck(ops._flash_attn_kvcache_append_forward.default, args, {"s_aux": sinks})


def test_softmax_d():
    """The backward operators return rowsum(dout * out) - dlse in their padded layouts."""
    q, k, v = dense()
    out, lse, _, rng = ops._flash_attn_forward(q, k, v, 0.0, *SCORE, None, False)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    softmax_d = flash_attn_interface._flash_attn_backward(
        dout, q, k, v, out, lse, None, None, None, 0.0, *SCORE, None, False, rng, dlse=dlse
    )
    assert softmax_d.shape == (BATCH, HEADS, 128)
    expected = (dout * out).sum(-1).transpose(1, 2) - dlse
    torch.testing.assert_close(softmax_d[:, :, :SEQLEN_Q], expected)
    assert not softmax_d[:, :, SEQLEN_Q:].any()

    q, k, v = packed()
    out, lse, _, rng = ops._flash_attn_varlen_forward(q, k, v, *sequences(), 0.0, *SCORE)
    dout = torch.randn_like(out)
    softmax_d = flash_attn_interface._flash_attn_varlen_backward(
        *(dout, q, k, v, out, lse, None, None, None), *sequences(), 0.0, *SCORE, None, False, rng
    )
    assert softmax_d.shape == (HEADS, TOTAL_Q + 128 * 3)
    expected = (dout * out).sum(-1).T
    for s, (begin, end) in enumerate(zip(CU_SEQLENS_Q, CU_SEQLENS_Q[1:])):
        columns = softmax_d[:, begin + 128 * s : end + 128 * s]
        torch.testing.assert_close(columns, expected[:, begin:end])


# ------------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize("kind", EXTENSIONS)
def test_gradients(kind, use_lse):
    leaves = dict(zip("qkv", dense(grad=True)))
    leaves.update(extensions(kind, BATCH, SEQLEN_Q, SEQLEN_K, grad=True))
    options = {"softmax_scale": 0.3, "causal": True, "softcap": 5.0}
    out, lse, _ = flash_attn_func(**leaves, **options, return_attn_probs=True)
    expected = attention(**leaves, **options)
    torch.testing.assert_close((out, lse), expected)
    count = 2 if use_lse else 1
    inputs = list(leaves.values())
    assert_all_close(grads_of((out, lse)[:count], inputs), grads_of(expected[:count], inputs))


def test_gradient_through_lse_alone():
    leaves = dict(zip("qkv", dense(grad=True)))
    _, lse, _ = flash_attn_func(**leaves, return_attn_probs=True)
    _, expected = attention(**leaves)
    inputs = [leaves["q"], leaves["k"]]
    assert_all_close(grads_of([lse], inputs), grads_of([expected], inputs))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "s_aux", "attn_bias"])
def test_gradient_of_one_input(wanted):
    leaves = {n: x.detach() for n, x in zip("qkv", dense())}
    leaves.update(extensions("sinks and bias", BATCH, SEQLEN_Q, SEQLEN_K))
    leaves[wanted].requires_grad_()
    out = flash_attn_func(**leaves)
    expected, _ = attention(**leaves)
    assert_all_close(grads_of([out], [leaves[wanted]]), grads_of([expected], [leaves[wanted]]))


@pytest.mark.parametrize(
    "shape",
    [(SEQLEN_Q, SEQLEN_K), (SEQLEN_K,), (1,), (HEADS, 1, 1), (BATCH, 1, 1, SEQLEN_K), ()],
)
@pytest.mark.parametrize("expand", [False, True])
def test_bias_of_any_broadcastable_shape(shape, expand):
    leaves = dict(zip("qkv", dense(grad=True)))
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(8)).requires_grad_()
    full = (BATCH, HEADS, SEQLEN_Q, SEQLEN_K)
    out = flash_attn_func(**leaves, attn_bias=bias.expand(full) if expand else bias)
    expected, _ = attention(**leaves, attn_bias=bias)
    inputs = [*leaves.values(), bias]
    assert_all_close(grads_of([out], inputs), grads_of([expected], inputs))


def test_gradient_dtypes():
    q, k, v = dense(grad=True, dtype=torch.bfloat16)
    s_aux = randn(HEADS, grad=True, dtype=torch.float16)
    bias = randn(SEQLEN_Q, SEQLEN_K, grad=True, dtype=torch.bfloat16)
    out = flash_attn_func(q, k, v, s_aux=s_aux, attn_bias=bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    for x in (q, k, v, s_aux, bias):
        assert x.grad.dtype == x.dtype
        assert x.grad.shape == x.shape


def test_varlen_gradients_are_those_of_each_sequence():
    q, k, v = packed(grad=True)
    s_aux = randn(HEADS, grad=True)
    bias = randn(3, HEADS, MAX_Q, MAX_K, grad=True)
    out, lse, _ = flash_attn_varlen_func(
        *(q, k, v), *sequences(), causal=True, return_attn_probs=True, s_aux=s_aux, attn_bias=bias
    )
    expected_out, expected_lse = [], []
    for s in range(3):
        rows = slice(CU_SEQLENS_Q[s], CU_SEQLENS_Q[s + 1])
        keys = slice(CU_SEQLENS_K[s], CU_SEQLENS_K[s + 1])
        count_q, count_k = rows.stop - rows.start, keys.stop - keys.start
        one_out, one_lse = attention(
            *(q[None, rows], k[None, keys], v[None, keys]),
            causal=True,
            s_aux=s_aux,
            attn_bias=bias[s : s + 1, :, :count_q, :count_k],
        )
        expected_out.append(one_out[0])
        expected_lse.append(one_lse[0])
    expected = torch.cat(expected_out), torch.cat(expected_lse, dim=1)
    torch.testing.assert_close((out, lse), expected)
    finite = lse.isfinite()
    inputs = [q, k, v, s_aux, bias]
    assert_all_close(
        grads_of([out, lse[finite]], inputs), grads_of([expected[0], expected[1][finite]], inputs)
    )


def test_packed_tensors_get_one_gradient():
    qkv = randn(BATCH, SEQLEN_Q, 3, HEADS, DIM, grad=True)
    (grad,) = grads_of([flash_attn_qkvpacked_func(qkv, causal=True)], [qkv])
    (expected,) = grads_of([flash_attn_func(*qkv.unbind(2), causal=True)], [qkv])
    assert torch.equal(grad, expected)
    assert grad.is_contiguous()

    q, kv = dense(grad=True)[0], randn(BATCH, SEQLEN_K, 2, HEADS_K, DIM, grad=True)
    actual = grads_of([flash_attn_kvpacked_func(q, kv, window_size=(2, 1))], [q, kv])
    expected = grads_of([flash_attn_func(q, *kv.unbind(2), window_size=(2, 1))], [q, kv])
    assert all(map(torch.equal, actual, expected))


def test_packed_varlen_tensors_get_one_gradient():
    cu_seqlens_q, cu_seqlens_k, max_q, max_k = sequences()
    qkv = randn(TOTAL_Q, 3, HEADS, DIM, grad=True)
    out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens_q, max_q, causal=True)
    separate = flash_attn_varlen_func(
        *qkv.unbind(1), cu_seqlens_q, cu_seqlens_q, max_q, max_q, causal=True
    )
    assert torch.equal(out, separate)
    assert torch.equal(*grads_of([out], [qkv]), *grads_of([separate], [qkv]))

    q, kv = packed(grad=True)[0], randn(TOTAL_K, 2, HEADS_K, DIM, grad=True)
    arguments = (cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    out = flash_attn_varlen_kvpacked_func(q, kv, *arguments)
    separate = flash_attn_varlen_func(q, *kv.unbind(1), *arguments)
    assert torch.equal(out, separate)
    assert all(map(torch.equal, grads_of([out], [q, kv]), grads_of([separate], [q, kv])))


def test_strided_inputs_and_gradients():
    """Heads before rows, a last dimension that is not contiguous, and an expanded gradient."""
    q, k, v = dense()
    transposed = [
        x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)
    ]
    last = [x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in (q, k, v)]
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    results = []
    for inputs in (plain, transposed, last):
        out = flash_attn_func(*inputs)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_changed_input_is_noticed():
    q, k, v = dense(grad=True)
    out = flash_attn_func(q, k, v)
    with torch.no_grad():
        k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_backward_over_pages():
    q = randn(4, HEADS, DIM, grad=True)
    k, v = randn(3, 2, HEADS_K, DIM), randn(3, 2, HEADS_K, DIM_V)
    out = flash_attn_varlen_func(
        *(q, k, v, int32([0, 4]), int32([0, 5]), 4, 5), block_table=int32([[2, 0, 1]])
    )
    pages = torch.cat([k[2], k[0], k[1]])[None, :5], torch.cat([v[2], v[0], v[1]])[None, :5]
    torch.testing.assert_close(out, attention(q[None], *pages)[0][0])
    with pytest.raises(RuntimeError, match="no backward with block_table"):
        out.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(mode):
    q, k, v = dense(grad=True)
    expected = flash_attn_func(q, k, v, causal=True)
    with mode():
        out, lse, s_dmask = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        short = flash_attn_func(q, k, v, causal=True)
    assert not out.requires_grad
    assert not lse.requires_grad
    assert s_dmask.shape == (0,)
    assert torch.equal(out, expected)
    assert torch.equal(short, expected)


def test_function_classes():
    """``apply`` takes the arguments of the functions by position, then is_grad_enabled."""
    q, k, v = dense(grad=True)
    rest = (0.0, 0.3, True, (3, 0), 0.0, None, False)
    expected = flash_attn_func(q, k, v, *rest)
    classes = flash_attn_interface
    out = classes.FlashAttnFunc.apply(q, k, v, *rest, False, True)
    assert torch.equal(out, expected)
    assert out.requires_grad
    out, lse, _ = classes.FlashAttnFunc.apply(q, k, v, *rest, True, False)
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert lse.shape == (BATCH, HEADS, SEQLEN_Q)

    kv = randn(BATCH, SEQLEN_K, 2, HEADS_K, DIM)
    out = classes.FlashAttnKVPackedFunc.apply(q, kv, *rest, False, True)
    assert torch.equal(out, flash_attn_func(q, *kv.unbind(2), *rest))
    qkv = randn(BATCH, SEQLEN_Q, 3, HEADS, DIM)
    out = classes.FlashAttnQKVPackedFunc.apply(qkv, *rest, False, True)
    assert torch.equal(out, flash_attn_func(*qkv.unbind(2), *rest))


def test_varlen_function_classes():
    rest = (0.0, 0.3, True, (3, 0), 0.0, None, False)
    q, k, v = packed()
    classes = flash_attn_interface
    out = classes.FlashAttnVarlenFunc.apply(q, k, v, *sequences(), *rest, False, None, True)
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, *sequences(), *rest))
    kv = randn(TOTAL_K, 2, HEADS_K, DIM)
    out = classes.FlashAttnVarlenKVPackedFunc.apply(q, kv, *sequences(), *rest, False, True)
    assert torch.equal(out, flash_attn_varlen_func(q, *kv.unbind(1), *sequences(), *rest))
    qkv, cu_seqlens = randn(TOTAL_Q, 3, HEADS, DIM), int32(CU_SEQLENS_Q)
    out = classes.FlashAttnVarlenQKVPackedFunc.apply(qkv, cu_seqlens, MAX_Q, *rest, False, True)
    assert torch.equal(out, flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, MAX_Q, *rest))


def test_tensors_as_numbers():
    q, k, v = dense()
    expected = flash_attn_func(q, k, v, window_size=(2, 1))
    assert torch.equal(flash_attn_func(q, k, v, window_size=torch.tensor([2, 1])), expected)
    q, k, v = packed()
    cu_seqlens_q, cu_seqlens_k, max_q, max_k = sequences()
    out = flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, torch.tensor(max_q), int32(max_k)), causal=True
    )
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, *sequences(), causal=True))
    with pytest.raises(TypeError, match=r"window_size\[0\] must be an int"):
        flash_attn_func(*dense(), window_size=(1.5, 0))
