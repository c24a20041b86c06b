"""FlashAttention-3's operators and underscored functions, and torch.compile of all of it."""

from __future__ import annotations

import pytest
import torch
from fa3_cases import Case, Problem
from reference import INF

from flash_attn import v3
from flash_attn.v3 import interface

CALLS = {
    "dense": Case(causal=True, is_dense=True, lengths=((40, 30),) * 2),
    "packed": Case(causal=True, window_size=(20, 0), softcap=3.0),
    "used": Case(causal=True, used=True),
    "used-dense": Case(used=True, is_dense=True, lengths=((40, 30),) * 2),
}


@pytest.mark.parametrize("by", ["function", "operator", "bwd"])
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward(name, by):
    """_flash_attn_forward and _flash_attn_backward, as ring attention calls them."""
    case = CALLS[name]
    problem = Problem(case)
    problem.dlse.zero_()
    expected = problem.call()
    given = dict(problem.tensors)
    dout = problem.dout
    if case.is_dense:
        given = {n: x.unflatten(0, (2, -1)) for n, x in given.items()}
        dout = dout.unflatten(0, (2, -1))
    q, k, v = (given[n] for n in "qkv")
    sequences, used = (None,) * 4, (None, None)
    if not case.is_dense:
        sequences = (*problem.cumulative(), *(max(n) for n in zip(*case.lengths)))
    if case.used:
        used = tuple(torch.tensor(n, dtype=torch.int32) for n in zip(*problem.used))
    cu_q, cu_k, max_q, max_k = sequences
    library = torch.ops.flash_attn_3 if by != "function" else interface
    score = {
        "window_size_left": case.window_size[0],
        "window_size_right": case.window_size[1],
        "softcap": case.softcap,
    }
    out, lse, *rest = library._flash_attn_forward(
        *(q, k, v),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        seqused_q=used[0],
        seqused_k=used[1],
        causal=case.causal,
        **score,
    )
    assert [x.numel() for x in rest] == [0, 0]
    if case.used and not case.causal:  # rows that are not used, or have no key
        lse = lse.masked_fill(lse == -INF, float("nan"))
    dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
    if by == "bwd":
        softmax_d, *_ = torch.ops.flash_attn_3.bwd(
            *(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, *used, max_q, max_k),
            is_causal=case.causal,
            **score,
        )
    else:
        softmax_d = library._flash_attn_backward(
            *(dout, q, k, v, out, lse, cu_q, cu_k, *used, max_q, max_k, dq, dk, dv),
            is_causal=case.causal,
            **score,
        )
    assert softmax_d.dtype == torch.float32
    found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    for n, x in found.items():
        x = x.flatten(0, 1) if case.is_dense else x
        assert torch.equal(x, expected[n]), n


def test_gradients_into_strided_tensors():
    """dq, dk and dv may be parts of one packed tensor."""
    q, k, v, dout = torch.randn(4, 2, 9, 2, 16)
    out, lse, *_ = interface._flash_attn_forward(q, k, v, causal=True)
    plain = [torch.empty_like(x) for x in (q, k, v)]
    packed = torch.full((2, 9, 3, 2, 16), float("nan"))
    used = torch.tensor([9, 9], dtype=torch.int32)
    for gradients, more in ((plain, {}), (packed.unbind(2), {"sequed_k": used})):
        dq, dk, dv = gradients
        interface._flash_attn_backward(
            *(dout, q, k, v, out, lse), dq=dq, dk=dk, dv=dv, is_causal=True, **more
        )
    assert torch.equal(packed, torch.stack(plain, 2))


def test_backward_of_a_merge():
    """Of two halves of the keys with the softmax_lse of both, as ring attention needs it."""
    q, k, v, dout = torch.randn(4, 1, 20, 2, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = v3.flash_attn_func(*leaves, return_attn_probs=True)
    expected = torch.autograd.grad(out, leaves, dout)
    dq, dk, dv = torch.zeros_like(q), [], []
    for half in (slice(0, 8), slice(8, 20)):
        parts = [torch.empty_like(q), torch.empty_like(k[:, half]), torch.empty_like(v[:, half])]
        interface._flash_attn_backward(
            *(dout, q, k[:, half], v[:, half], out.detach(), lse.detach()),
            dq=parts[0],
            dk=parts[1],
            dv=parts[2],
        )
        dq += parts[0]
        dk.append(parts[1])
        dv.append(parts[2])
    for actual, exact in zip((dq, torch.cat(dk, 1), torch.cat(dv, 1)), expected):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-6)


def test_operators_are_differentiable():
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(v3.flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
    for operator in ("fwd", "_flash_attn_forward"):
        causal = {"is_causal" if operator == "fwd" else "causal": True}
        out = getattr(torch.ops.flash_attn_3, operator)(q, k, v, **causal)[0]
        actual = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_operator_of_a_cache():
    """fwd appends to k and v where new tokens are given; all arguments by position."""
    cache = torch.randn(2, 2, 20, 2, 16)
    by_function = cache.clone()
    q, k, v = torch.randn(2, 3, 4, 16), *torch.randn(2, 2, 3, 2, 16)
    seqlens = torch.tensor([4, 9], dtype=torch.int32)
    angle = torch.rand(40, 8) * 6
    rotary = (angle.cos(), angle.sin())
    expected, lse, *_ = v3.flash_attn_with_kvcache(
        *(q, *by_function, k, v),
        rotary_cos=rotary[0],
        rotary_sin=rotary[1],
        cache_seqlens=seqlens,
        causal=True,
        rotary_interleaved=False,
        return_softmax_lse=True,
    )
    out = torch.empty_like(q)
    results = torch.ops.flash_attn_3.fwd(
        *(q, *cache, k, v, None, out, None, None, None, None, seqlens, None, None, None),
        *(None, None, *rotary, None, None, None, None, None, True, -1, -1, 0, 0.0, False),
        *(None, 0, None, 0),
    )
    assert results[0] is out or results[0].data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    assert torch.equal(results[1], lse)
    assert torch.equal(cache, by_function)


def test_scheduler_metadata():
    seqlens = torch.tensor([3, 4, 5, 6, 7], dtype=torch.int32)
    sizes = {"max_seqlen_q": 1, "max_seqlen_k": 7, "headdim": 64, "cache_seqlens": seqlens}
    found = v3.get_scheduler_metadata(5, num_heads_q=8, num_heads_kv=2, **sizes)
    assert found.dtype == torch.int32
    assert found.dim() == 1
    by_operator = torch.ops.flash_attn_3.get_scheduler_metadata(
        5, 1, 7, 8, 2, 64, 64, torch.bfloat16, seqlens
    )
    assert torch.equal(by_operator, found)


# ------------------------------------------------------------------------------------------------
# torch.compile


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("options", [{}, {"attention_chunk": 4}, {"window_size": (3, 0)}], ids=str)
def test_compile_dense(options):
    q, k, v = (torch.randn(2, 9, 2, 16, requires_grad=True) for _ in range(3))

    def f(q, k, v):
        out, lse = v3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, **options)
        return (out * 2).sum() + lse.sum()

    expected = torch.autograd.grad(f(q, k, v), (q, k, v))
    actual = torch.autograd.grad(compiled(f)(q, k, v), (q, k, v))
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


def test_compile_packed_and_cache():
    q, k, v = (torch.randn(9, 2, 16) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    pages = torch.randn(2, 6, 4, 2, 16)
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    seqlens = torch.tensor([5, 12], dtype=torch.int32)

    def f(q, k, v):
        out = v3.flash_attn_varlen_func(
            q, k, v, cu, cu, 5, 5, seqused_k=seqlens.clamp_max(4), causal=True, attention_chunk=3
        )
        over_cache = v3.flash_attn_with_kvcache(
            q,
            *pages,
            page_table=table,
            cache_seqlens=seqlens,
            cu_seqlens_q=cu,
            max_seqlen_q=5,
            return_softmax_lse=True,
        )
        return out, *over_cache[:2]

    for actual, expected in zip(compiled(f)(q, k, v), f(q, k, v)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("is_latent", [False, True])
def test_compile_queries_of_values(is_latent):
    latent = torch.randn(2, 9, 1, 40)
    q, qv = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 4, 32)
    k, v = latent[..., 32:], latent[..., :32]
    if not is_latent:
        k, v = k.clone(), v.clone()

    def f(q, k, v, qv):
        return v3.flash_attn_func(q, k, v, qv=qv, causal=True)

    torch.testing.assert_close(compiled(f)(q, k, v, qv), f(q, k, v, qv))


def test_compile_operators():
    q, k, v, dout = torch.randn(4, 2, 9, 2, 16)

    def f(q, k, v, dout):
        out, lse, *_ = torch.ops.flash_attn_3._flash_attn_forward(q, k, v, causal=True)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        torch.ops.flash_attn_3._flash_attn_backward(
            *(dout, q, k, v, out, lse), dq=dq, dk=dk, dv=dv, is_causal=True
        )
        merged = v3.flash_attn_combine(torch.stack([out, out]), lse.mT.expand(2, 2, 9, 2))
        return out, lse, dq, dk, dv, *merged

    for actual, expected in zip(compiled(f)(q, k, v, dout), f(q, k, v, dout)):
        torch.testing.assert_close(actual, expected)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 9, 4, 16), torch.empty(2, 7, 2, 16)
        out, lse = v3.flash_attn_func(q, k, k, attention_chunk=4, return_attn_probs=True)
        assert out.shape == q.shape
        assert lse.shape == (2, 4, 9)
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, k, is_causal=True)
        assert out.shape == q.shape
        out, lse = v3.flash_attn_combine(torch.empty(3, 2, 9, 4, 16), torch.empty(3, 2, 9, 4))
        assert out.shape == q.shape
        assert lse.shape == (2, 9, 4)
