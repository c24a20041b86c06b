"""What holds for every input: determinism, batch invariance, locality of NaN, memory, layouts,
merging."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import attention_cases
import pytest
import torch
from attention_cases import BF16, FP16, FP32, Case, flash_forward_backward, make_tensors
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import ISAS
from reference import INF, visible

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn._library import bind

pytestmark = pytest.mark.usefixtures("isa")

NAN = float("nan")


# ------------------------------------------------------------------------------------------------
# Any shape with any features.


def windows(draw, seqlen):
    return draw(st.one_of(st.just(-1), st.integers(0, seqlen + 5)))


UP_TO_70 = st.tuples(st.integers(1, 70), st.integers(1, 70))
EITHER = st.booleans()


@st.composite
def cases(draw, dtypes=(FP32, FP16, BF16), seqlens=UP_TO_70, largest_dim=80, dlse=EITHER):
    """Cases of up to 70 queries and keys and any head dims up to 80, if not told otherwise."""
    sq, sk = draw(seqlens)
    hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dims = st.integers(1, largest_dim)
    return Case(
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.integers(1, 3)),
        seqlens=(sq, sk),
        heads=(hk * group, hk),
        dims=(draw(head_dims), draw(head_dims)),
        causal=draw(st.booleans()),
        window_size=(windows(draw, sk), windows(draw, sk)),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        softmax_scale=draw(st.sampled_from([None, 0.0, 0.2, -0.3])),
        alibi=draw(st.sampled_from(["", "h", "bh"])),
        sinks=draw(st.sampled_from([None, FP32, FP16, BF16])),
        bias=draw(st.sampled_from(["", "k", "qk", "bk", "hk", "bhqk"])),
        bias_dtype=draw(st.sampled_from(["q", "fp32"])),
        dlse=draw(dlse),
        seed=draw(st.integers(0, 10)),
    )


@given(case=cases())
def test_any_shape_with_any_features(case):
    attention_cases.check(case)


@given(case=cases(), split=st.integers(1, 69))
def test_merging_parts_by_their_lse(case, split):
    """Attention over all keys is the mean over two halves weighed by exp(lse), and so are its
    gradients: that is what the differentiable LSE is for."""
    case = dataclasses.replace(
        case, dtype=FP32, causal=False, window_size=(-1, -1), alibi="", sinks=None, bias=""
    )
    split = min(split, case.seqlens[1])
    tensors, options, dout, _ = make_tensors(case)
    whole = flash_forward_backward(tensors, options, dout)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    parts = []
    for rows in (slice(0, split), slice(split, None)):
        k, v = leaves["k"][:, rows], leaves["v"][:, rows]
        if k.shape[1] > 0:
            result = flash_attn_func(leaves["q"], k, v, **options, return_attn_probs=True)
            parts.append(result[:2])
    lse = torch.stack([p[1] for p in parts]).logsumexp(0)
    out = sum(o * torch.exp(part_lse - lse).transpose(1, 2)[..., None] for o, part_lse in parts)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    torch.testing.assert_close(out.detach(), whole["out"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.detach(), whole["lse"], rtol=1e-5, atol=1e-5)
    for name, gradient in zip(leaves, gradients):
        torch.testing.assert_close(gradient, whole[f"d{name}"], rtol=1e-4, atol=1e-4)


combine = bind("combine", "out_partial lse_partial out lse")
_SCORE = "p_dropout softmax_scale is_causal window_left window_right softcap"
mha_fwd = bind("mha_fwd", f"q k v out softmax_lse s_dmask rng_state s_aux attn_bias {_SCORE}")
mha_bwd = bind(
    "mha_bwd",
    "dout q k v out softmax_lse dq dk dv softmax_d rng_state s_aux attn_bias ds_aux dattn_bias "
    f"{_SCORE}",
)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_combine(dtype):
    gen = torch.Generator().manual_seed(0)
    out_partial = torch.randn(5, 2, 7, 3, 40, generator=gen)
    lse_partial = 3 * torch.randn(5, 2, 7, 3, generator=gen)
    lse_partial[2:, 0, 1] = -INF
    lse_partial[:, 1, 2] = -INF
    out_partial[lse_partial == -INF] = NAN  # a part without keys
    out, lse = torch.full((2, 7, 3, 40), NAN, dtype=dtype), torch.full((2, 7, 3), NAN)
    combine(out_partial, lse_partial, out, lse)
    exact_lse = lse_partial.double().logsumexp(0)
    weight = torch.exp(lse_partial.double() - exact_lse.clamp(min=-1e30))[..., None]
    exact = torch.where(weight == 0, 0.0, out_partial.double() * weight).sum(0)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    tolerance = max(torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    assert (out[1, 2] == 0).all()
    other = torch.empty_like(out)
    combine(out_partial, lse_partial, other, None)
    assert torch.equal(other, out)


@torch.no_grad()
def test_out_is_the_same_whether_softmax_lse_is_wanted_or_not():
    """Without gradients no softmax_lse is made, unless it is asked for."""
    q, k, v = torch.randn(2, 50, 4, 40), torch.randn(2, 90, 2, 40), torch.randn(2, 90, 2, 24)
    s_aux = torch.randn(4)
    together = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[0]
    assert torch.equal(flash_attn_func(q, k, v, causal=True), together)

    # Rows beyond the last sequence, too.
    cu_q, cu_k = torch.tensor([0, 20, 41]).int(), torch.tensor([0, 60, 85]).int()
    packed = q[0], k[0], v[0], cu_q, cu_k, 21, 60
    together = flash_attn_varlen_func(*packed, return_attn_probs=True)[0]
    assert torch.equal(flash_attn_varlen_func(*packed), together)

    for seqlen_q in (1, 50):
        cache = q[:, :seqlen_q], k, v
        options = {"cache_seqlens": torch.tensor([90, 0]).int(), "s_aux": s_aux}
        together = flash_attn_with_kvcache(*cache, **options, return_softmax_lse=True)[0]
        assert torch.equal(flash_attn_with_kvcache(*cache, **options), together)


# ------------------------------------------------------------------------------------------------
# Determinism and batch invariance, bitwise.

INVARIANCE_CASES = [
    Case(batch=3, seqlens=(129, 257), heads=(4, 2), causal=True),
    Case(batch=3, seqlens=(400, 700), heads=(2, 2), dims=(72, 40), dlse=True),
    Case(batch=3, seqlens=(1, 700), heads=(8, 1), dtype=BF16),
    Case(batch=3, seqlens=(257, 113), heads=(6, 1), window_size=(50, 30), softcap=5.0),
    Case(batch=3, seqlens=(113, 300), heads=(2, 1), dims=(192, 128), sinks=FP32, bias="bhqk"),
    Case(batch=3, seqlens=(65, 90), heads=(2, 1), dims=(576, 512), dtype=FP16, alibi="h"),
    Case(batch=3, seqlens=(129, 300), heads=(4, 2), bias="k", dims=(40, 40)),
    Case(batch=3, seqlens=(129, 300), heads=(4, 4), bias="hq", sinks=BF16, dlse=True),
]


def assert_equal_results(actual, expected, names=None):
    for name in names or expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("case", INVARIANCE_CASES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_run_to_run_and_for_every_number_of_threads(case, dropout_p, restore_threads):
    problem = make_tensors(case)

    def run():
        torch.manual_seed(0)
        return flash_forward_backward(*problem, dropout_p=dropout_p)

    expected = run()
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_equal_results(run(), expected)


@pytest.fixture
def flush_denormal():
    """Subnormal numbers are 0 in the calling thread, as torch.set_flush_denormal, and libraries
    built with -ffast-math, leave it; threads started before keep theirs."""
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def flushes_subnormals(isa, dtype):
    """Tile products of AMX and products of bf16 pairs take subnormal numbers as 0, always. Terms of
    fp16 numbers are never subnormal."""
    return dtype in {"amx": (FP32, BF16), "avx512bf16": (BF16,)}.get(isa, ())


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_results_do_not_depend_on_what_threads_do_with_subnormals(
    isa, dtype, restore_threads, request
):
    case = Case(batch=2, seqlens=(130, 200), heads=(4, 2), dims=(40, 40), dtype=dtype)
    tensors, options, dout, _ = make_tensors(case)
    tiny = 1e-6 if dtype == FP16 else 1e-39
    tensors["v"] *= tiny
    dout *= tiny
    expected = flash_forward_backward(tensors, options, dout)
    smallest = torch.finfo(dtype).smallest_normal
    for name in ("out", "dv"):
        kept = (expected[name] != 0) & (expected[name].abs() < smallest)
        if flushes_subnormals(isa, dtype):
            assert (expected[name] == 0).all(), name
        else:
            assert kept.sum() > kept.numel() // 2, name
    request.getfixturevalue("flush_denormal")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        actual = flash_forward_backward(tensors, options, dout)
        for name in expected:
            assert torch.equal(bits_of(actual[name]), bits_of(expected[name])), name
        assert torch.tensor(1e-39) * 1 == 0, "the caller's setting is the caller's"


def bits_of(tensor):
    return tensor.view(torch.int32 if tensor.dtype == FP32 else torch.int16)


@pytest.mark.parametrize("case", INVARIANCE_CASES, ids=str)
def test_a_batch_entry_does_not_depend_on_the_others(case):
    tensors, options, dout, dlse = make_tensors(case)
    together = flash_forward_backward(tensors, options, dout, dlse)
    own_names = [n for n, t in tensors.items() if t.shape[0] == case.batch]
    names = ["out", "lse", *(f"d{n}" for n in own_names)]
    for i in range(case.batch):
        own = {n: t[i : i + 1] if n in own_names else t for n, t in tensors.items()}
        own_dlse = None if dlse is None else dlse[i : i + 1]
        alone = flash_forward_backward(own, options, dout[i : i + 1], own_dlse)
        assert_equal_results(alone, {n: together[n][i : i + 1] for n in names}, names)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_packed_sequence_does_not_depend_on_the_others(dtype, restore_threads):
    """Neither on their number and lengths nor on its place among them."""
    gen = torch.Generator().manual_seed(0)
    lengths = [113, 1, 300, 0, 64, 257]

    def rows(n, h):
        return torch.randn(n, h, 64, generator=gen).to(dtype)

    sequences = [(rows(n, 4), rows(n, 2), rows(n, 2), rows(n, 4)) for n in lengths]

    def run(indices):
        q, k, v, dout = (torch.cat([sequences[i][t] for i in indices]) for t in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        cu = torch.tensor([0, *(lengths[i] for i in indices)]).cumsum(0).int()
        longest = max(lengths[i] for i in indices)
        out, lse, _ = flash_attn_varlen_func(
            *leaves, cu, cu, longest, longest, causal=True, return_attn_probs=True
        )
        results = [out, lse.t(), *torch.autograd.grad(out, leaves, dout)]
        return {i: [x[cu[n] : cu[n + 1]] for x in results] for n, i in enumerate(indices)}

    together = run(range(6))
    for threads, indices in ((1, [5, 4, 3, 2, 1, 0]), (2, [2]), (3, [0, 2, 2]), (4, [5, 1])):
        torch.set_num_threads(threads)
        for i, results in run(indices).items():
            assert all(torch.equal(x, y) for x, y in zip(results, together[i])), (indices, i)


@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_decoding_does_not_depend_on_the_batch(num_splits, seqlen_q, restore_threads):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(5, seqlen_q, 8, 64, generator=gen)
    cache = torch.randn(5, 2000, 2, 64, generator=gen)
    lengths = torch.tensor([2000, 17, 0, 900, 1500], dtype=torch.int32)

    def run(index):
        return flash_attn_with_kvcache(
            q[index],
            cache[index],
            cache[index],
            cache_seqlens=lengths[index],
            causal=True,
            num_splits=num_splits,
            return_softmax_lse=True,
        )

    out, lse = run(slice(None))
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for i in range(5):
            own_out, own_lse = run(slice(i, i + 1))
            assert torch.equal(own_out[0], out[i])
            assert torch.equal(own_lse[0], lse[i])
        again = run(slice(None))
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)


# ------------------------------------------------------------------------------------------------
# NaN and inf reach only what can see them.

LOCALITY_CASES = [
    Case(batch=2, seqlens=(129, 257), heads=(4, 2), dims=(40, 40), window_size=(40, 10)),
    Case(batch=2, seqlens=(200, 200), heads=(2, 1), dims=(64, 64), causal=True, softcap=5.0),
    Case(batch=2, seqlens=(70, 300), heads=(2, 2), dims=(128, 128), window_size=(0, 33)),
    Case(batch=2, seqlens=(70, 150), heads=(2, 1), causal=True, dtype=BF16, window_size=(20, 0)),
]


def touched(case, name, b, s, head):
    """``(rows, keys)``: (b, sq, h) and (b, sk, hk) bool, the queries whose softmax involves row
    ``s`` of tensor ``name``, and the keys that such a query sees."""
    (sq, sk), (h, hk) = case.seqlens, case.heads
    seen = visible(sq, sk, case.causal, case.window_size)
    rows = torch.zeros(case.batch, sq, h, dtype=torch.bool)
    keys = torch.zeros(case.batch, sk, hk, dtype=torch.bool)
    if name in ("q", "dout"):
        rows[b, s, head] = True
        keys[b, :, head // (h // hk)] = seen[s]
    else:
        group = slice(head * (h // hk), (head + 1) * (h // hk))
        rows[b, :, group] = seen[:, s, None]
        keys[b, :, head] = seen[seen[:, s]].any(0)
    return rows, keys


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("index", range(len(LOCALITY_CASES)))
def test_non_finite_values_reach_only_what_sees_them(index, name, value):
    case = LOCALITY_CASES[index]
    tensors, options, dout, _ = make_tensors(case)
    clean = flash_forward_backward(tensors, options, dout)
    b, s, head = 1, case.seqlens[1 if name in "kv" else 0] // 2, case.heads[1] - 1
    (dout if name == "dout" else tensors[name])[b, s, head, 3] = value
    actual = flash_forward_backward(tensors, options, dout)
    rows, keys = touched(case, name, b, s, head)
    if name == "dout":
        assert_equal_results(actual, clean, ["out", "lse"])
    places = {"out": rows, "lse": rows.transpose(1, 2), "dq": rows, "dk": keys, "dv": keys}
    for result, place in places.items():
        same = (actual[result] == clean[result])[~place]
        assert same.all(), f"{result}: {int((~same).sum())} elements changed that do not see it"


@pytest.mark.parametrize("index", range(len(LOCALITY_CASES)))
def test_nan_does_reach_what_sees_it(index):
    case = LOCALITY_CASES[index]
    spread = {
        "q": ("out", "lse", "dq", "dk", "dv"),
        "k": ("out", "lse", "dq", "dk", "dv"),
        "v": ("dq", "dk"),
        "dout": ("dq", "dk"),
    }
    for name, results in spread.items():
        tensors, options, dout, _ = make_tensors(case)
        b, s, head = 1, case.seqlens[1 if name in "kv" else 0] // 2, case.heads[1] - 1
        (dout if name == "dout" else tensors[name])[b, s, head, 3] = NAN
        actual = flash_forward_backward(tensors, options, dout)
        rows, keys = touched(case, name, b, s, head)
        places = {"out": rows, "lse": rows.transpose(1, 2), "dq": rows, "dk": keys, "dv": keys}
        for result in results:
            assert actual[result][places[result]].isnan().all(), (name, result)
        if name == "v":
            assert actual["out"][..., 3][rows].isnan().all()
        if name == "dout":
            assert actual["dv"][..., 3][keys].isnan().all()


def test_overflow_of_fp16_is_infinite():
    """Results beyond fp16's largest number are inf, as in PyTorch, and not garbage."""
    q = torch.zeros(1, 2, 1, 8, dtype=FP16)
    v = torch.full((1, 3, 1, 8), 6e4, dtype=FP16)
    torch.testing.assert_close(flash_attn_func(q, q[:, :1].expand(1, 3, 1, 8), v), v[:, :2])
    leaf = v.clone().requires_grad_()
    out = flash_attn_func(q.expand(1, 2, 1, 8), torch.zeros_like(v), leaf)
    (dv,) = torch.autograd.grad(out, leaf, torch.full_like(out, 6e4))
    torch.testing.assert_close(dv, torch.full_like(dv, 4e4), rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------
# Layouts of inputs and outputs.


def relayouts():
    """Ways to hold the same (b, s, h, d) values, by name."""

    def padded(x):
        wide = x.new_full((*x.shape[:3], x.shape[3] + 5), NAN)
        wide[..., 2:-3] = x
        return wide[..., 2:-3]

    def gaps(x):
        wide = x.new_full((x.shape[0], 2 * x.shape[1], 3 * x.shape[2], x.shape[3]), NAN)
        view = wide[:, 1::2, 2::3]
        view.copy_(x)
        return view

    return {
        "bhsd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sbhd": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "padded": padded,
        "gaps": gaps,
        "last dimension strided": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    }


@pytest.mark.parametrize("layout", list(relayouts()))
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_layout_of_inputs(layout, dtype):
    case = Case(dtype=dtype, batch=2, seqlens=(65, 129), heads=(4, 2), dims=(40, 24), causal=True)
    tensors, options, dout, _ = make_tensors(case)
    expected = flash_forward_backward(tensors, options, dout)
    change = relayouts()[layout]
    tensors = {n: change(t) for n, t in tensors.items()}
    assert_equal_results(flash_forward_backward(tensors, options, change(dout)), expected)


def test_expanded_inputs():
    """Stride 0 over batch, rows or heads, also of a gradient as sum() makes it."""
    q = torch.randn(1, 1, 1, 40).expand(2, 65, 4, 40)
    k = torch.randn(1, 129, 1, 40).expand(2, 129, 2, 40)
    v = torch.randn(2, 1, 2, 40).expand(2, 129, 2, 40)
    dout = torch.ones(()).expand(2, 65, 4, 40)
    tensors = {"q": q, "k": k, "v": v}
    actual = flash_forward_backward(tensors, {"causal": True}, dout)
    dense = {n: t.contiguous() for n, t in tensors.items()}
    expected = flash_forward_backward(dense, {"causal": True}, dout.contiguous())
    assert_equal_results(actual, expected)


def test_strides_beyond_32_bits():
    """Offsets of more than 2**31 elements. The pages between the rows are never touched, so they
    take no memory."""
    step = 2**31 // 3
    case = Case(dtype=BF16, batch=1, seqlens=(5, 5), heads=(2, 2), dims=(40, 40), causal=True)
    tensors, options, dout, _ = make_tensors(case)
    expected = flash_forward_backward(tensors, options, dout)
    try:
        memory = torch.empty(4 * step + 80, dtype=BF16)
    except RuntimeError:
        pytest.skip("no address space for a tensor of 5.7 GB")
    view = memory.as_strided((1, 5, 2, 40), (1, step, 40, 1))
    for name in tensors:
        view.copy_(tensors[name])
        moved = {**tensors, name: view}
        assert_equal_results(flash_forward_backward(moved, options, dout), expected)


class Guarded:
    """A tensor with gaps and guard bands of NaN around its rows, to be written by the library."""

    def __init__(self, *shape, dtype=FP32):
        wide = [n + 2 for n in shape]
        wide[-1] = shape[-1] + 24
        self.memory = torch.full(wide, NAN, dtype=dtype)
        inner = tuple(slice(1, -1) for _ in shape[:-1])
        self.view = self.memory[(*inner, slice(8, -16))]

    def check(self):
        """Every element of the view is written, and nothing around it."""
        assert not self.view.isnan().any()
        assert self.memory.isnan().sum() == self.memory.numel() - self.view.numel()


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("d,dv", [(40, 24), (1, 3), (128, 64), (65, 65)])
@pytest.mark.parametrize("seqlens", [(1, 129), (129, 65), (33, 3)])
def test_nothing_is_written_beside_the_outputs(dtype, d, dv, seqlens):
    (sq, sk), b, h, hk, p = seqlens, 2, 4, 2, 0.3
    case = Case(dtype=dtype, batch=b, seqlens=seqlens, heads=(h, hk), dims=(d, dv))
    tensors, _, dout, _ = make_tensors(case)
    inputs = list(tensors.values())
    rng_state = torch.tensor([1, 2])
    out, lse = Guarded(b, sq, h, dv, dtype=dtype), torch.full((3 * b * h * sq,), NAN)
    own_lse = lse[b * h * sq : 2 * b * h * sq].view(b, h, sq)
    rounded = [(n + 127) // 128 * 128 for n in seqlens]
    mask_size = b * h * rounded[0] * rounded[1]
    mask_memory = torch.full((mask_size + 256,), NAN, dtype=dtype)
    s_dmask = mask_memory[128:-128].view(b, h, *rounded)
    sinks, bias = torch.zeros(h), torch.zeros(b, h, sq, sk)
    score = (p, d**-0.5, False, -1, -1, 0.0)
    mha_fwd(*inputs, out.view, own_lse, s_dmask, rng_state, sinks, bias, *score)
    out.check()
    assert lse.isnan().sum() == 2 * b * h * sq
    assert not own_lse.isnan().any()
    assert mask_memory.isnan().sum() == 256

    dq, dk, dv_ = (Guarded(*x.shape, dtype=dtype) for x in inputs)
    d_memory = torch.full((b * h * rounded[0] + 256,), NAN)
    softmax_d = d_memory[128:-128].view(b, h, rounded[0])
    ds_memory, dbias = torch.full((h + 16,), NAN), Guarded(b, h, sq, sk)
    mha_bwd(
        dout,
        *inputs,
        out.view,
        own_lse,
        dq.view,
        dk.view,
        dv_.view,
        softmax_d,
        rng_state,
        sinks,
        bias,
        ds_memory[8:-8],
        dbias.view,
        *score,
    )
    for guarded in (dq, dk, dv_, dbias):
        guarded.check()
    assert d_memory.isnan().sum() == 256
    assert (softmax_d[:, :, sq:] == 0).all()
    expected_d = (dout.float() * out.view.float()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[:, :, :sq], expected_d, rtol=1e-4, atol=1e-4)
    assert ds_memory.isnan().sum() == 16


# ------------------------------------------------------------------------------------------------
# Memory.

MEASURE = """
import resource, torch
from flash_attn import _library, flash_attn_func
_library.set_cpu_isa({isa!r})

def step(seqlen):
    q, k, v = (torch.randn(1, seqlen, 1, 32, requires_grad=True) for _ in range(3))
    flash_attn_func(q, k, v, causal=True, dropout_p={p}).sum().backward()

step(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8192)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_memory_is_linear_in_the_sequence_length(isa, p):
    """The scores of 8192 x 8192 would take 256 MiB in fp32, a bit for each of them still 8 MiB; all
    tensors together take 8 MiB. ru_maxrss counts KiB."""
    if isa != ISAS[-1]:
        pytest.skip("the memory does not depend on the instruction set")
    script = MEASURE.format(isa=isa, p=p)
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert int(result.stdout) < 40 * 1024
