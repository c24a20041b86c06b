"""Dense attention, forward and backward, against the fp64 reference."""

from __future__ import annotations

import dataclasses

import attention_cases
import pytest
import torch
from attention_cases import BF16, FP16, FP32, SWEEP_FACTOR, Case, check, sampled_cases
from reference import INF, assert_attention_close, attention, out_rounding

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("case", sampled_cases(60, seed=1), ids=str)
def test_feature_product(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(900, seed=2), ids=str)
def test_feature_product_at_length(case):
    check(case, SWEEP_FACTOR)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("case", sampled_cases(12, seed=3), ids=str)
def test_one_feature_product_in_all_dtypes(case, dtype):
    check(dataclasses.replace(case, dtype=dtype))


@pytest.mark.parametrize("seqlen", [1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("causal", [False, True])
def test_sequence_lengths_around_blocks(seqlen, causal):
    check(Case(seqlens=(seqlen, seqlen), dims=(40, 40), heads=(2, 1), causal=causal))
    check(Case(seqlens=(seqlen, 300), dims=(40, 40), heads=(2, 1), causal=causal))
    check(Case(seqlens=(300, seqlen), dims=(40, 40), heads=(2, 1), causal=causal))


@pytest.mark.slow
@pytest.mark.parametrize("d", range(1, 577, 5))
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_every_head_dim(d, dtype):
    check(Case(dtype=dtype, seqlens=(37, 45), dims=(d, 577 - d), heads=(2, 1), causal=True))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_large_scores(dtype):
    """Logits of many hundreds: exp must neither overflow nor lose the largest."""
    for scale in (8.0, -8.0):
        check(Case(dtype=dtype, seqlens=(65, 300), softmax_scale=scale, dims=(40, 40)))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("bias", ["1", "q", "hq", "b", "bhq"])
def test_bias_that_is_the_same_for_all_keys(bias, dtype):
    """It changes the LSE and nothing else, so its gradient is that which flows into the LSE,
    summed. In the library's gradient (dout . out) stands for the sum over a row of P dP; their
    difference, out's rounding, does not cancel."""
    case = Case(dtype=dtype, seqlens=(65, 300), heads=(4, 2), causal=True, bias=bias, dlse=True)
    tensors, options, dout, dlse = attention_cases.make_tensors(case)
    actual = attention_cases.flash_forward_backward(tensors, options, dout, dlse)
    exact, plain = attention_cases.expected(case)
    gradient, shape = actual.pop("dattn_bias"), tensors["attn_bias"].shape
    results = [{n: t for n, t in r.items() if n != "dattn_bias"} for r in (exact, plain)]
    attention_cases.assert_results_close(actual, *results)
    allowed = 4 * out_rounding(dtype, dout, exact["out"]).square().sum().sqrt().item()
    expected = dlse.double()[..., None].sum_to_size(shape)
    allowed += torch.finfo(dtype).eps * expected.abs().max().item() + 1e-4  # 78,000 fp32 terms
    assert (gradient.double() - expected).abs().max().item() <= allowed


def test_gradient_of_lse_alone():
    case = Case(seqlens=(65, 129), heads=(4, 2), causal=True, sinks=FP32, bias="hqk", dlse=True)
    tensors, options, _, dlse = attention_cases.make_tensors(case)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    _, lse, _ = flash_attn_func(**leaves, **options, return_attn_probs=True)
    actual = torch.autograd.grad(lse, list(leaves.values()), dlse, allow_unused=True)
    exact_leaves = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    exact = torch.autograd.grad(
        attention(**exact_leaves, **options)[1],
        list(exact_leaves.values()),
        dlse.double(),
        allow_unused=True,
    )
    for name, a, e in zip(leaves, actual, exact):
        e = torch.zeros_like(exact_leaves[name]) if e is None else e
        a = torch.zeros_like(leaves[name]) if a is None else a
        assert_attention_close(a, e, e.float(), f"d{name}")


@pytest.mark.parametrize("missing", ["q", "k", "v", "s_aux", "attn_bias"])
def test_inputs_without_gradient(missing):
    """Leaving one gradient out does not change the others."""
    case = Case(seqlens=(33, 65), sinks=FP32, bias="bhqk")
    tensors, options, dout, _ = attention_cases.make_tensors(case)
    every = attention_cases.flash_forward_backward(tensors, options, dout)
    leaves = {n: t.detach().requires_grad_(n != missing) for n, t in tensors.items()}
    flash_attn_func(**leaves, **options).backward(dout)
    assert leaves[missing].grad is None
    for name, leaf in leaves.items():
        assert name == missing or torch.equal(leaf.grad, every[f"d{name}"]), name


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("seqlens", [(3, 0), (300, 0)])
def test_no_keys_at_all(seqlens, dtype):
    case = Case(dtype=dtype, batch=2, seqlens=seqlens, heads=(4, 2), dims=(40, 24))
    actual = attention_cases.flash_forward_backward(*attention_cases.make_tensors(case))
    assert actual["out"].shape == (2, seqlens[0], 4, 24)
    assert (actual["out"] == 0).all()
    assert (actual["lse"] == INF).all()
    assert (actual["dq"] == 0).all()
    assert actual["dk"].shape == (2, 0, 2, 40)


def test_no_queries_at_all():
    case = Case(batch=2, seqlens=(0, 5), heads=(4, 2), sinks=FP32)
    actual = attention_cases.flash_forward_backward(*attention_cases.make_tensors(case))
    assert actual["out"].shape == (2, 0, 4, 64)
    assert actual["lse"].shape == (2, 4, 0)
    for name in ("dk", "dv", "ds_aux"):
        assert (actual[name] == 0).all()


@pytest.mark.parametrize("sinks", [None, FP32])
def test_rows_that_see_no_key(sinks):
    """Their LSE is that of nothing, +inf by convention, or that of the sink alone."""
    case = Case(batch=2, seqlens=(300, 170), heads=(4, 2), causal=True, sinks=sinks, dlse=True)
    tensors, *rest = attention_cases.make_tensors(case)
    actual = attention_cases.flash_forward_backward(tensors, *rest)
    assert (actual["out"][:, :130] == 0).all()
    assert (actual["dq"][:, :130] == 0).all()
    lse = torch.full((4,), INF) if sinks is None else tensors["s_aux"]
    assert (actual["lse"][..., :130] - lse[:, None]).abs().nan_to_num(0.0).max() <= 1e-6
    check(case)


def test_minus_infinity_in_the_bias_hides_keys():
    """A boolean mask is a bias of 0 and -inf; a row all of whose keys it hides sees no key."""
    case = Case(batch=2, seqlens=(65, 200), heads=(2, 1), bias="bhqk")
    tensors, options, dout, _ = attention_cases.make_tensors(case)
    gen = torch.Generator().manual_seed(0)
    hidden = torch.rand(2, 2, 65, 200, generator=gen) < 0.7
    hidden[..., :100] = True  # whole blocks of keys
    hidden[0, 0, 5] = True
    tensors["attn_bias"] = torch.zeros(hidden.shape).masked_fill(hidden, -INF)
    actual = attention_cases.flash_forward_backward(tensors, options, dout)
    assert (actual["out"][0, 5, 0] == 0).all()
    assert (actual["dq"][0, 5, 0] == 0).all()
    assert (actual["dattn_bias"][hidden] == 0).all()
    assert (actual["dk"][:, :100] == 0).all()
    q, k, v = (tensors[n].double() for n in "qkv")
    bias = tensors["attn_bias"].double()
    bias[0, 0, 5] = 0
    exact, _ = attention(q, k, v, attn_bias=bias)
    exact[0, 5, 0] = 0
    torch.testing.assert_close(actual["out"].double(), exact, rtol=1e-5, atol=1e-5)
    seen = ~hidden.all(-1)
    exact_lse = attention(q, k, v, attn_bias=bias)[1]
    torch.testing.assert_close(actual["lse"][seen].double(), exact_lse[seen], rtol=1e-5, atol=1e-5)


def test_packed_functions_equal_the_separate_one():
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, 65, 4, 40, generator=gen)
    kv = torch.randn(2, 65, 2, 2, 40, generator=gen)
    qkv = torch.randn(2, 65, 3, 4, 40, generator=gen)
    dout = torch.randn(2, 65, 4, 40, generator=gen)
    options = {"causal": True, "window_size": (30, 0), "softcap": 5.0}

    def run(fn, *args):
        leaves = [x.detach().requires_grad_() for x in args]
        out, lse, _ = fn(*leaves, **options, return_attn_probs=True)
        return out, lse, *torch.autograd.grad(out, leaves, dout)

    out, lse, dq, dk, dv = run(flash_attn_func, q, kv[:, :, 0], kv[:, :, 1])
    packed = run(flash_attn_kvpacked_func, q, kv)
    expected = (out, lse, dq, torch.stack([dk, dv], 2))
    assert all(torch.equal(x, y) for x, y in zip(packed, expected))

    out, lse, dq, dk, dv = run(flash_attn_func, *qkv.unbind(2))
    packed = run(flash_attn_qkvpacked_func, qkv)
    expected = (out, lse, torch.stack([dq, dk, dv], 2))
    assert all(torch.equal(x, y) for x, y in zip(packed, expected))


def test_window_may_be_a_tensor():
    q, k, v = torch.randn(3, 1, 65, 2, 40).unbind(0)
    expected = flash_attn_func(q, k, v, window_size=(5, 9))
    assert torch.equal(flash_attn_func(q, k, v, window_size=torch.tensor([5, 9])), expected)
    pair = (torch.tensor(5), torch.tensor(9))
    assert torch.equal(flash_attn_func(q, k, v, window_size=pair), expected)


def test_deterministic_changes_nothing():
    tensors, options, dout, dlse = attention_cases.make_tensors(Case(batch=2, dlse=True))
    default = attention_cases.flash_forward_backward(tensors, options, dout, dlse)
    other = attention_cases.flash_forward_backward(tensors, options, dout, dlse, deterministic=True)
    assert all(torch.equal(default[n], other[n]) for n in default)
