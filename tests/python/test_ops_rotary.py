"""The rotary operator on the CPU; test_rotary.py has the functions' own tests."""

from __future__ import annotations

import contextlib

import pytest
import rotary_cases
import torch
from rotary_cases import BF16, DTYPES, FP16, FP32, tables
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from flash_attn import _rotary
from flash_attn._library import bind
from flash_attn.layers import rotary
from flash_attn.ops.triton.rotary import apply_rotary

DIMS = [(7, 6), (64, 32), (128, 128), (100, 34), (1000, 1000)]
ops = torch.ops.flash_attn


@pytest.mark.parametrize("case", rotary_cases.cases(DIMS), ids=str)
def test_values(case, operator_isa):
    rotary_cases.check(case, contextlib.nullcontext)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (1, 4096, 2)])
@pytest.mark.parametrize("dims", [(1, 0), (2, 2), (16, 8)])
def test_sizes(shape, dims):
    rotary_cases.check(rotary_cases.RotaryCase(BF16, dims, shape=shape), contextlib.nullcontext)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_results(dtype, interleaved, restore_threads):
    x = torch.randn(3, 400, 5, 72).to(dtype)
    cos, sin = tables(400, 64, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(apply_rotary(x, cos, sin, interleaved=interleaved))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("inplace", [False, True])
def test_inputs_that_are_not_finite_stay_in_their_pairs(inplace):
    x = torch.randn(1, 3, 2, 16)
    x[0, 0, 0, 3], x[0, 1, 1, 2], x[0, 2, 0, 15] = torch.nan, torch.inf, -torch.inf
    cos, sin = tables(3, 12, FP32)
    out = apply_rotary(x.clone(), cos, sin, inplace=inplace)
    expected = rotary.apply_rotary_emb_torch(x, cos, sin)
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_tokens_after_the_last_sequence_keep_their_bits():
    """Infinite ones too, of which 1 x - 0 y would be NaN."""
    x = torch.full((9, 2, 16), torch.inf)
    cos, sin = tables(4, 16, FP32)
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)
    for inplace in (False, True):
        out = apply_rotary(x.clone(), cos, sin, 0, cu_seqlens, 4, inplace=inplace)
        assert torch.equal(out[6:], x[6:])
        assert not torch.equal(out[:6], x[:6])


@pytest.mark.parametrize("layout", ["halves of heads", "transposed", "step"])
def test_strided_views_are_turned_where_they_lie(layout):
    whole = torch.randn(2, 6, 8, 32)
    x = {
        "halves of heads": whole[:, :, 2:5, 8:24],
        "transposed": whole.transpose(1, 2)[:, :, :, :16],
        "step": whole[:, ::2, ::3, :16],
    }[layout]
    cos, sin = tables(x.shape[1], 16, FP32)
    before, expected = whole.clone(), rotary.apply_rotary_emb_torch(x, cos, sin)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected)
    assert torch.equal(whole, before)
    apply_rotary(x, cos, sin, inplace=True)
    torch.testing.assert_close(x, expected)
    x.copy_(rotary.apply_rotary_emb_torch(x, cos, -sin))
    torch.testing.assert_close(whole, before)


def packed(num_heads_q, dtype):
    shape = (2, 6, 3, 4, 16) if num_heads_q is None else (2, 6, num_heads_q + 4, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def turned_parts(qkv, num_heads_q, tables_q, tables_k, interleaved):
    q, k, v = _rotary.parts(qkv, num_heads_q or 0)
    turned = [
        rotary.apply_rotary_emb_torch(x, *(t.to(x.dtype) for t in own), interleaved)
        for x, own in ((q, tables_q), (k, tables_k))
    ]
    return torch.stack((*turned, v), 2) if num_heads_q is None else torch.cat((*turned, v), 2)


@pytest.mark.parametrize("num_heads_q", [None, 6, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp32_tables", [False, True])
def test_packed(num_heads_q, dtype, fp32_tables, operator_isa):
    """One call turns queries and keys, by tables of their own."""
    qkv = packed(num_heads_q, dtype)
    own = tables(6, 12, FP32 if fp32_tables else dtype)
    of_k = tuple(0.5 * t for t in own)
    exact = turned_parts(qkv.double(), num_heads_q, own, of_k, True)
    plain = turned_parts(qkv, num_heads_q, own, of_k, True)
    for inplace in (True, False):
        given = qkv.clone()
        out = rotary._apply_rotary_emb_qkv(
            given, *own, *of_k, interleaved=True, inplace=inplace, num_heads_q=num_heads_q
        )
        rotary_cases.assert_attention_close(out, exact, plain, "qkv")
        assert (out is given) == inplace
        assert inplace or torch.equal(given, qkv)
        v, before = (_rotary.parts(x, num_heads_q or 0)[2] for x in (out, qkv))
        assert torch.equal(v, before)


OPTIONS = (None, 1, None, 0, True, False)


@pytest.mark.parametrize("test", ["heads", "packed sequences", "qkv", "grouped"])
def test_opcheck(test):
    cos, sin = tables(9, 12, FP32)
    x = torch.randn(2, 6, 3, 16)
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)
    offsets = torch.tensor([1, 2])
    if test in ("heads", "packed sequences"):
        options = OPTIONS if test == "heads" else (offsets, 0, cu_seqlens, 4, False, True)
        x = x if test == "heads" else x[0]
        opcheck(ops.rotary.default, (x.clone().requires_grad_(), cos, sin, *options))
        opcheck(ops.rotary_.default, (x, cos, sin, *options))
        return
    heads = None if test == "qkv" else 6
    arguments = (cos, sin, None, 2 * sin, offsets, 0, True, False, heads or 0)
    opcheck(ops.rotary_qkv.default, (packed(heads, FP32).requires_grad_(), *arguments))
    opcheck(ops.rotary_qkv_.default, (packed(heads, FP32), *arguments))


def operators_of(graphs):
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    return {name.split(".")[1] for name in names if name.startswith("flash_attn.rotary")}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("num_heads_q", [None, 6])
def test_one_graph_has_the_operators(grad, num_heads_q):
    cos, sin = tables(6, 12, FP32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def run(qkv, kv, x):
        qkv = rotary.apply_rotary_emb_qkv_(qkv * 1, cos, sin, num_heads_q=num_heads_q)
        kv = rotary.apply_rotary_emb_kv_(kv * 1, cos, sin)
        return qkv, kv, rotary.apply_rotary_emb(x, cos, sin)

    qkv, kv, x = packed(num_heads_q, FP32), torch.randn(2, 6, 2, 3, 16), torch.randn(2, 6, 3, 16)
    inputs = [t.requires_grad_(grad) for t in (qkv, kv, x)]
    expected = (
        turned_parts(qkv, num_heads_q, (cos, sin), (cos, sin), False),
        torch.stack((rotary.apply_rotary_emb_torch(kv[:, :, 0], cos, sin), kv[:, :, 1]), 2),
        rotary.apply_rotary_emb_torch(x, cos, sin),
    )
    actual = run(*inputs)
    torch.testing.assert_close(actual, expected)
    in_place = {"rotary_", "rotary_qkv_"}
    assert operators_of(graphs) == {
        "rotary",
        *(() if grad else in_place),
        *(("rotary_qkv",) if grad else ()),
    }
    if grad:
        seeds = [torch.randn_like(t) for t in expected]
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, seeds), torch.autograd.grad(expected, inputs, seeds)
        )


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_have_the_operators(strict):
    class Turn(torch.nn.Module):
        def forward(self, x, qkv, cos, sin):
            x = rotary.apply_rotary_emb(x, cos, sin)
            return x, rotary.apply_rotary_emb_qkv_(qkv.clone(), cos, sin)

    x, qkv, of_pairs = torch.randn(2, 6, 3, 16), packed(None, FP32), tables(6, 12, FP32)
    with torch.no_grad():
        program = torch.export.export(Turn(), (x, qkv, *of_pairs), strict=strict)
    assert operators_of([program]) == {"rotary", "rotary_qkv_"}
    expected = turned_parts(qkv, None, of_pairs, of_pairs, False)
    torch.testing.assert_close(program.module()(x, qkv, *of_pairs)[1], expected)


def test_inductor_writes_in_place():
    cos, sin = tables(6, 12, FP32)
    qkv = packed(None, FP32)
    expected = turned_parts(qkv, None, (cos, sin), (cos, sin), False)
    run = torch.compile(rotary.apply_rotary_emb_qkv_, fullgraph=True)
    out = run(qkv, cos, sin)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(qkv, expected)


def test_second_derivatives_are_the_compositions():
    x = torch.randn(2, 6, 3, 16, requires_grad=True)
    cos, sin = tables(6, 12, FP32)
    out = rotary.apply_rotary_emb(x, cos, sin)
    weight = torch.randn_like(out)
    (dx,) = torch.autograd.grad((out**2 * weight).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    plain = rotary.apply_rotary_emb_torch(x, cos, sin)
    (dx,) = torch.autograd.grad((plain**2 * weight).sum(), x, create_graph=True)
    torch.testing.assert_close(ddx, torch.autograd.grad(dx.sum(), x)[0])


def test_checkpoint_and_autocast():
    x = torch.randn(2, 6, 3, 16, requires_grad=True)
    cos, sin = tables(6, 12, FP32)

    def run(x):
        return rotary.apply_rotary_emb(x * 1, cos, sin, inplace=True)

    with torch.autocast("cpu", BF16):
        out = checkpoint(run, x, use_reentrant=False)
    assert out.dtype == FP32
    torch.testing.assert_close(out, rotary.apply_rotary_emb_torch(x, cos, sin))
    out.sum().backward()
    expected = rotary.apply_rotary_emb_torch(torch.ones_like(x), cos, -sin)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("function", ["x", "qkv", "kv"])
def test_autograd_knows_of_what_was_written(function):
    x = torch.randn(2, 6, 3, 2, 16, requires_grad=True)
    cos, sin = tables(6, 12, FP32)
    y = x * 1
    loss = (y**2).sum()
    turn = {
        "x": lambda y: apply_rotary(y[:, :, 0], cos, sin, inplace=True),
        "qkv": lambda y: rotary.apply_rotary_emb_qkv_(y, cos, sin),
        "kv": lambda y: rotary.apply_rotary_emb_kv_(y[:, :, :2], cos, sin),
    }[function]
    with torch.no_grad():
        turn(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_written_twice():
    x, (cos, sin) = torch.randn(2, 6, 1, 16).expand(2, 6, 3, 16), tables(6, 12, FP32)
    with pytest.raises(RuntimeError, match="out must not overlap itself"):
        apply_rotary(x, cos, sin, inplace=True)
    expected = rotary.apply_rotary_emb_torch(x, cos, sin)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected)


def test_negative_views():
    x, (cos, sin) = torch.randn(2, 6, 3, 16), tables(6, 12, FP32)
    expected = rotary.apply_rotary_emb_torch(-x, cos, sin)
    torch.testing.assert_close(apply_rotary(torch._neg_view(x), cos, sin), expected)
    apply_rotary(torch._neg_view(x), cos, sin, inplace=True)
    torch.testing.assert_close(-x, expected)


# ------------------------------------------------------------------------------------------------
# The C interface's own checks

NAMES = "x out k k_out cos sin cos_k sin_k seqlen_offsets seqlen_offset cu_seqlens max_seqlen"


def arguments(is_packed=False):
    x = torch.randn(*((7,) if is_packed else (2, 7)), 3, 16)
    cos = torch.ones(9, 8)
    found = dict.fromkeys(NAMES.split()) | {"x": x, "out": x.clone(), "cos": cos, "sin": cos}
    found |= {"seqlen_offset": 0, "max_seqlen": 7}
    return found | ({"cu_seqlens": torch.tensor([0, 4, 7])} if is_packed else {})


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "cu_seqlens must ascend .* sequence 1 is from 4 to 8": {"cu_seqlens": ints(0, 4, 8)},
    "cu_seqlens must ascend .* sequence 0 is from 1 to 4": {"cu_seqlens": ints(1, 4)},
    "cu_seqlens must ascend .* sequence 1 is from 6 to 5": {"cu_seqlens": ints(0, 6, 5, 7)},
    "at most max_seqlen = 3: sequence 0 is from 0 to 4": {"max_seqlen": 3},
    "max_seqlen must not be negative": {"cu_seqlens": ints(0, 4), "max_seqlen": -1},
    r"cu_seqlens must have an element more": {"cu_seqlens": ints()},
    "9 rows: sequence 1 has 3 tokens from position 7": {"seqlen_offsets": torch.tensor([0, 7])},
    "9 rows: sequence 0 has 4 tokens from position -1": {"seqlen_offsets": ints(-1, 0)},
    "position 9223372036854775807": {"seqlen_offsets": torch.tensor([0, 2**63 - 1])},
    "positions 3 to": {"seqlen_offset": 3},
    "seqlen_offsets must have dtype int32 or int64": {"seqlen_offsets": torch.zeros(2)},
    r"seqlen_offsets must have shape \(batch\) = \(2\)": {"seqlen_offsets": ints(0, 0, 0)},
    "exceeds the head dim 16": {"cos": torch.ones(9, 9), "sin": torch.ones(9, 9)},
    "cos and sin must have one dtype": {"sin": torch.ones(9, 8, dtype=FP16)},
    "cos must have x's dtype or fp32": {"cos": torch.ones(9, 8, dtype=BF16)},
    "what is turned must have one dtype": {"out": torch.zeros(7, 3, 16, dtype=BF16)},
    "out must have 3 heads": {"out": torch.zeros(7, 2, 16)},
    "k_out must be given where k is": {"k_out": torch.zeros(7, 2, 16)},
    "k_out must be given": {"k": torch.zeros(7, 2, 16)},
    "heads must have contiguous elements": {"out": torch.zeros(7, 3, 32)[..., ::2]},
    "out must not overlap itself": {"out": torch.zeros(7, 1, 16).expand(7, 3, 16)},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_arguments_write_nothing(sentence):
    given = arguments(is_packed=True) | BAD[sentence]
    run = bind("rotary", NAMES)
    before = given["out"].clone()
    with pytest.raises(RuntimeError, match=sentence):
        run(*given.values())
    assert torch.equal(given["out"], before)


def test_views_of_one_memory():
    given = arguments()
    given["out"] = given["x"].view(-1).as_strided((2, 6, 3, 16), (336, 48, 16, 1), 16)
    given["x"] = given["x"][:, :6]
    with pytest.raises(RuntimeError, match="out and x must not share memory, or be the same view"):
        bind("rotary", NAMES)(*given.values())
