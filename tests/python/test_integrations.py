"""This package under PyTorch's own switches, against PyTorch's own attention."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F

import flash_attn
from flash_attn.integrations import sdpa


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share."""
    torch.set_num_threads(1)


def assert_close(actual, expected, tolerance=2e-5):
    """Equal up to ``tolerance`` of the largest expected magnitude."""
    limit = tolerance * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


SDPA_CASES = {
    "full": {"shape": (2, 4, 4, 65, 65)},
    "cross": {"shape": (2, 4, 4, 33, 70)},
    "scale": {"shape": (1, 2, 2, 40, 40), "scale": 0.3},
    "causal": {"shape": (2, 4, 4, 65, 65), "is_causal": True},
    "causal, more keys": {"shape": (2, 4, 4, 33, 70), "is_causal": True},
    "causal, more queries": {"shape": (2, 4, 4, 70, 33), "is_causal": True},
    "gqa": {"shape": (2, 8, 2, 65, 65), "is_causal": True, "enable_gqa": True},
    "bool mask": {"shape": (2, 4, 4, 33, 70), "mask": ("bool", (2, 1, 33, 70))},
    "bool mask of two dims": {"shape": (2, 4, 4, 33, 70), "mask": ("bool", (33, 70))},
    "additive mask": {"shape": (2, 4, 4, 33, 70), "mask": ("float", (1, 4, 33, 70))},
    "key mask": {"shape": (2, 4, 4, 33, 70), "mask": ("bool", (2, 1, 1, 70))},
    "wide values": {"shape": (2, 4, 4, 33, 70), "headdim_v": 24},
}


def sdpa_inputs(shape, dtype, headdim_v=16, mask=None):
    torch.manual_seed(0)
    batch, heads, heads_k, seqlen_q, seqlen_k = shape
    q = torch.randn(batch, heads, seqlen_q, 16, dtype=dtype, requires_grad=True)
    k = torch.randn(batch, heads_k, seqlen_k, 16, dtype=dtype, requires_grad=True)
    v = torch.randn(batch, heads_k, seqlen_k, headdim_v, dtype=dtype, requires_grad=True)
    attn_mask = None
    if mask is not None:
        kind, mask_shape = mask
        attn_mask = torch.rand(mask_shape) > 0.3
        if kind == "float":
            attn_mask = torch.randn(mask_shape, dtype=dtype)
    return q, k, v, attn_mask


def run_sdpa(q, k, v, **kwargs):
    out = F.scaled_dot_product_attention(q, k, v, **kwargs)
    torch.manual_seed(1)
    return (out, *torch.autograd.grad(out, (q, k, v), torch.randn_like(out)))


@pytest.fixture
def sdpa_calls(monkeypatch):
    """Counts the calls that reach this package's forward and backward."""
    calls = []
    for name in ("_forward", "_backward"):
        function = getattr(sdpa, name)

        def counted(*args, name=name, function=function):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(sdpa, name, counted)
    return calls


@pytest.mark.parametrize("name", SDPA_CASES)
def test_sdpa_equals_pytorchs_own(name, sdpa_calls):
    case = dict(SDPA_CASES[name])
    shape, mask, headdim_v = case.pop("shape"), case.pop("mask", None), case.pop("headdim_v", 16)
    q, k, v, attn_mask = sdpa_inputs(shape, torch.float32, headdim_v, mask)
    expected = run_sdpa(q, k, v, attn_mask=attn_mask, **case)
    with sdpa.registered():
        actual = run_sdpa(q, k, v, attn_mask=attn_mask, **case)
    for a, e in zip(actual, expected):
        assert_close(a, e)
    # PyTorch itself does not offer differing head dims to its CPU kernel.
    assert sdpa_calls == ([] if headdim_v != 16 else ["_forward", "_backward"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sdpa_in_half_precision(dtype, sdpa_calls):
    q, k, v, _ = sdpa_inputs((2, 4, 4, 65, 65), dtype)
    expected = run_sdpa(*(x.detach().double().requires_grad_() for x in (q, k, v)), is_causal=True)
    with sdpa.registered():
        actual = run_sdpa(q, k, v, is_causal=True)
    assert all(a.dtype == dtype for a in actual)
    assert_close(actual[0].double(), expected[0], 2e-2)
    assert sdpa_calls == ["_forward", "_backward"]


def test_sdpa_gives_fp64_to_pytorch(sdpa_calls):
    q, k, v, _ = sdpa_inputs((2, 4, 4, 65, 65), torch.float64)
    expected = run_sdpa(q, k, v)
    with sdpa.registered():
        actual = run_sdpa(q, k, v)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    assert sdpa_calls == []


def test_sdpa_operator_with_causal_and_mask_stays_pytorchs(sdpa_calls):
    """The function refuses both at once; PyTorch's operator has its own meaning for them."""
    q, k, v, mask = sdpa_inputs((2, 4, 4, 33, 33), torch.float32, mask=("float", (1, 4, 33, 33)))
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    expected = operator(q, k, v, 0.0, True, attn_mask=mask)
    with sdpa.registered():
        actual = operator(q, k, v, 0.0, True, attn_mask=mask)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    assert sdpa_calls == []


def test_sdpa_row_that_sees_no_key_is_zero():
    q, k, v, _ = sdpa_inputs((1, 2, 2, 5, 7), torch.float32)
    attn_mask = torch.ones(5, 7, dtype=torch.bool)
    attn_mask[2] = False
    with sdpa.registered():
        out, dq, _, _ = run_sdpa(q, k, v, attn_mask=attn_mask)
    assert not out[:, :, 2].any()
    assert not dq[:, :, 2].any()


def test_sdpa_keeps_the_memory_layout_of_the_query():
    q, k, v = (torch.randn(2, 9, 4, 16).transpose(1, 2) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    with sdpa.registered():
        actual = F.scaled_dot_product_attention(q, k, v)
    assert actual.stride() == expected.stride() or actual.stride() == q.stride()
    assert_close(actual, expected)


def test_sdpa_under_torch_compile(sdpa_calls):
    q, k, v, _ = sdpa_inputs((2, 4, 4, 33, 33), torch.float32)
    expected = run_sdpa(q, k, v, is_causal=True)
    with sdpa.registered():
        actual = torch.compile(run_sdpa, backend="aot_eager")(q, k, v, is_causal=True)
    for a, e in zip(actual, expected):
        assert_close(a, e)
    assert set(sdpa_calls) == {"_forward", "_backward"}


def test_sdpa_register_and_unregister(sdpa_calls):
    q = torch.randn(1, 2, 5, 16)
    sdpa.register()
    sdpa.register()
    assert sdpa.is_registered()
    F.scaled_dot_product_attention(q, q, q)
    assert sdpa_calls == ["_forward"]
    sdpa.unregister()
    sdpa.unregister()
    assert not sdpa.is_registered()
    F.scaled_dot_product_attention(q, q, q)
    assert sdpa_calls == ["_forward"]


def test_sdpa_context_leaves_an_earlier_registration():
    sdpa.register()
    try:
        with sdpa.registered():
            pass
        assert sdpa.is_registered()
    finally:
        sdpa.unregister()


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"),
    reason="this PyTorch has no registry of attention implementations",
)
def test_sdpa_by_pytorchs_registry(sdpa_calls):
    q = torch.randn(1, 2, 5, 16)
    torch.nn.attention.activate_flash_attention_impl("flash_attn")
    try:
        F.scaled_dot_product_attention(q, q, q)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert sdpa_calls == ["_forward"]
    assert not sdpa.is_registered()


def plain_inputs(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(3)]


def jagged_inputs():
    return [
        torch.nested.nested_tensor(
            [torch.randn(5, 4, 16), torch.randn(7, 4, 16)], layout=torch.jagged, requires_grad=True
        )
        for _ in range(3)
    ]


def bias_that_needs_a_gradient():
    return torch.randn(1, 4, 9, 9, requires_grad=True)


NOT_OURS = {  # inputs, arguments
    "head dim 577": lambda: (plain_inputs(1, 2, 5, 577), {}),
    "head dim 640": lambda: (plain_inputs(2, 2, 5, 640, dtype=torch.bfloat16), {"is_causal": True}),
    "fp64": lambda: (plain_inputs(1, 4, 9, 16, dtype=torch.float64), {"is_causal": True}),
    "three dims": lambda: (plain_inputs(4, 9, 16), {"is_causal": True}),
    "two dims": lambda: (plain_inputs(9, 16), {}),
    "empty batch": lambda: (plain_inputs(0, 4, 9, 16), {}),
    "no keys": lambda: ([*plain_inputs(1, 4, 9, 16)[:1], *plain_inputs(1, 4, 0, 16)[:2]], {}),
    "dropout": lambda: (plain_inputs(1, 4, 9, 16), {"dropout_p": 0.3}),
    "mask with gradient": lambda: (
        plain_inputs(1, 4, 9, 16),
        {"attn_mask": bias_that_needs_a_gradient()},
    ),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_sdpa_gives_the_rest_to_pytorch(name, sdpa_calls):
    """What worked before works after, to the last bit."""
    inputs, arguments = NOT_OURS[name]()
    leaves = [*inputs, arguments["attn_mask"]] if "attn_mask" in arguments else inputs
    results = []
    for context in (torch.enable_grad(), sdpa.registered()):
        with context:
            torch.manual_seed(1)
            out = F.scaled_dot_product_attention(*inputs, **arguments)
            results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    assert all(torch.equal(a, e) for a, e in zip(*results))
    assert sdpa_calls == []


def test_sdpa_of_jagged_tensors():
    results = []
    for context in (torch.no_grad(), sdpa.registered()):
        torch.manual_seed(0)
        with context:
            q, k, v = (x.transpose(1, 2) for x in jagged_inputs())
            results.append(F.scaled_dot_product_attention(q, k, v).values())
    assert_close(results[1], results[0])


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_sdpa_scale_that_is_not_positive(scale):
    """Causal as well, where PyTorch's own kernel makes NaN of minus infinity times the scale."""
    q, k, v = (x.detach() for x in plain_inputs(1, 2, 9, 16))
    scores = scale * q @ k.transpose(-1, -2)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v
    with sdpa.registered():
        assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), expected)


def run_python(program):
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "list_flash_attention_impls"),
    reason="this PyTorch has no registry of attention implementations",
)
def test_pytorchs_registry_knows_the_package_at_once():
    """After ``import flash_attn`` alone, which imports no integration yet."""
    program = """
import sys
import torch
import flash_attn
print("flash_attn" in torch.nn.attention.list_flash_attention_impls())
print(any(name.startswith("flash_attn.integrations") for name in sys.modules))
torch.nn.attention.activate_flash_attention_impl("flash_attn")
print(sys.modules["flash_attn.integrations.sdpa"].is_registered())
"""
    assert run_python(program) == ["True", "False", "True"]


# ------------------------------------------------------------------------------------------------
# torch.nn.attention.varlen

varlen = pytest.importorskip("torch.nn.attention.varlen")
CU_SEQLENS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)


def packed_inputs(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (12, 4, 16), (12, 2, 16), (12, 2, 16)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def attend_each(q, k, v, window):
    """Sequence after sequence by PyTorch's dense attention, in fp64."""
    left, right = (float("inf") if w < 0 else w for w in window)
    outs = []
    for a, b in zip(CU_SEQLENS, CU_SEQLENS[1:]):
        parts = [x[a:b].double().transpose(0, 1)[None] for x in (q, k, v)]
        distance = torch.arange(b - a) - torch.arange(b - a)[:, None]
        visible = (distance >= -left) & (distance <= right)
        out = F.scaled_dot_product_attention(*parts, attn_mask=visible, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_attn(window, dtype):
    inputs = packed_inputs(dtype)
    sequences = (CU_SEQLENS, CU_SEQLENS, 7, 7)
    with sdpa.registered():
        out = varlen.varlen_attn(*inputs, *sequences, window_size=window, enable_gqa=True)
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, inputs, dout)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = attend_each(*doubles, window)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    assert out.dtype == dtype
    assert_close(out.double(), expected, tolerance)
    for a, e in zip(gradients, torch.autograd.grad(expected, doubles, dout.double())):
        assert_close(a.double(), e, tolerance)


def test_varlen_attn_compiled_and_with_lse():
    inputs = packed_inputs()

    def attend(q, k, v):
        return varlen.varlen_attn(
            q,
            k,
            v,
            *(CU_SEQLENS, CU_SEQLENS, 7, 7),
            enable_gqa=True,
            scale=0.3,
            return_aux=varlen.AuxRequest(lse=True),
        )

    with sdpa.registered():
        out, lse = torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs)
        expected, expected_lse = attend(*inputs)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    scores = 0.3 * inputs[0][:5, 3].double() @ inputs[1][:5, 1].double().T
    assert_close(lse[3, :5].double(), scores.logsumexp(-1))


def test_varlen_attn_over_a_paged_cache():
    if not hasattr(varlen, "varlen_attn_out"):
        pytest.skip("this PyTorch's varlen_attn takes no pages")
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 16), torch.randn(3, 256, 2, 16), torch.randn(3, 256, 2, 16)
    block_table = torch.tensor([[2], [0]], dtype=torch.int32)
    used = torch.tensor([9, 200], dtype=torch.int32)
    sequences = (torch.tensor([0, 1, 2], dtype=torch.int32), None, 1, 200)
    options = {"enable_gqa": True, "seqused_k": used, "block_table": block_table}
    written = torch.empty_like(q)
    with sdpa.registered():
        out = varlen.varlen_attn(q, k, v, *sequences, **options)
        varlen.varlen_attn_out(written, q, k, v, *sequences, **options)
    assert torch.equal(out, written)
    for row, (page, length) in enumerate(zip((2, 0), used)):
        keys, values = (x[page, :length].transpose(0, 1)[None] for x in (k, v))
        alone = F.scaled_dot_product_attention(q[row][None, :, None], keys, values, enable_gqa=True)
        assert_close(out[row], alone[0, :, 0])


def test_dense_operators_of_varlen():
    """The operators take dense batches and dropout, too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 4, 16, requires_grad=True) for _ in range(3))
    operator = torch.ops.aten._flash_attention_forward
    arguments = (None, None, 9, 9, 0.4, True, False)
    with sdpa.registered():
        torch.manual_seed(1)
        out = operator(q, k, v, *arguments)[0]
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    torch.manual_seed(1)
    expected = flash_attn.flash_attn_func(q, k, v, 0.4, causal=True)
    assert torch.equal(out, expected)
    for a, e in zip(gradients, torch.autograd.grad(expected, (q, k, v), dout)):
        assert torch.equal(a, e)


def test_varlen_attn_is_pytorchs_again_after_unregister():
    with sdpa.registered():
        pass
    with pytest.raises(NotImplementedError):
        varlen.varlen_attn(*packed_inputs(), CU_SEQLENS, CU_SEQLENS, 7, 7, enable_gqa=True)
