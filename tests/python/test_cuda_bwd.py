"""The backward of the CUDA kernels, emulated, beyond the cases that test_cuda.py and
test_cuda_varlen.py share with the CPU backend: edges, addresses, schedules, every kernel."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import (
    BF16,
    FP16,
    FP32,
    Case,
    assert_results_close,
    check,
    cuda_case,
    flash_forward_backward,
    make_tensors,
)
from backends import EMULATOR, HOPPER, needs_emulator, on_each_emulated
from reference import INF, attention_and_gradients, gradient_slack
from test_dropout import documented_mask
from test_varlen import TAIL, flash_varlen, one_by_one, pack, sampled_lengths, varlen_cases

import flash_attn
import flash_attn_2_cuda
from flash_attn import flash_attn_func
from flash_attn.flash_attn_interface import _flash_attn_forward

pytestmark = needs_emulator

NAN = float("nan")
GRADIENTS = ("dq", "dk", "dv")
# A case of every kernel, by the end of its name: (head dim, scores, keys of a CTA). The n64 one of
# d = 128 and the n32 one of d = 256 serve GPUs of less shared memory.
KERNELS = {
    "d32_masked_n128": {"dims": (32, 24)},
    "d64_masked_n128": {"dims": (64, 64)},
    "d96_masked_n64": {"dims": (90, 96)},
    "d128_masked_n128": {"dims": (128, 128)},
    "d192_masked_n64": {"dims": (192, 128)},
    "d256_masked_n64": {"dims": (256, 256)},
    "d64_modified_n128": {"dims": (64, 64), "softcap": 3.0},
    "d128_modified_n64": {"dims": (128, 128), "alibi": "h"},
    "d256_modified_n32": {"dims": (256, 256), "bias": "hqk"},
}
SMALL_KERNELS = {
    **KERNELS,
    "d128_masked_n64": KERNELS["d128_masked_n128"],
    "d256_masked_n32": KERNELS["d256_masked_n64"],
}
for _name in ("d128_masked_n128", "d256_masked_n64"):
    del SMALL_KERNELS[_name]


def differentiate(case, **more):
    return flash_forward_backward(*make_tensors(case), **more)


def assert_equal(actual, expected):
    """Bitwise."""
    assert actual.keys() == expected.keys()
    assert [n for n in actual if not torch.equal(actual[n], expected[n])] == []


def assert_close_to_exact(case, actual):
    tensors, options, dout, dlse = make_tensors(case)
    exact = attention_and_gradients(tensors, options, dout, dlse)
    plain = attention_and_gradients(tensors, options, dout, dlse, dtype=case.dtype)
    slack = gradient_slack(tensors, options, dout, exact["out"])
    names = [n for n in actual if n.startswith("d")]
    assert_results_close(*({n: x[n] for n in names} for x in (actual, exact, plain)), slack)


def check_kernel(case, arch, name):
    with flash_attn.emulator(arch, mode="late") as gpu:
        actual = differentiate(case)
    launched = [kernel for kernel in gpu.counters if kernel.startswith("flash_bwd_sm80")]
    kind = {FP16: "fp16", BF16: "bf16"}[case.dtype]
    assert launched == [f"flash_bwd_sm80_{kind}_{name}"]
    assert f"flash_bwd_prepare_sm80_{kind}" in gpu.counters
    assert_close_to_exact(case, actual)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel(name, dtype):
    case = cuda_case(dtype=dtype, seqlens=(150, 170), causal=True, **KERNELS[name])
    check_kernel(case, "sm_80", name)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("arch", ["sm_86", "sm_89"])
@pytest.mark.parametrize("name", SMALL_KERNELS)
def test_every_kernel_with_less_shared_memory(name, arch, dtype):
    case = cuda_case(dtype=dtype, seqlens=(150, 170), causal=True, **SMALL_KERNELS[name])
    check_kernel(case, arch, name)


EDGES = [
    Case(batch=2, seqlens=(300, 170), heads=(4, 2), causal=True, sinks=FP32, dlse=True),
    Case(batch=2, seqlens=(300, 170), heads=(4, 2), causal=True, dlse=True, dims=(50, 33)),
    Case(seqlens=(70, 300), heads=(8, 1), window_size=(3, -1)),
    Case(seqlens=(300, 70), heads=(2, 2), window_size=(-1, 3), dims=(128, 128)),
    Case(seqlens=(200, 200), heads=(2, 1), causal=True, window_size=(1, 0)),
    Case(seqlens=(130, 130), heads=(2, 1), softmax_scale=8.0),
    Case(seqlens=(130, 130), heads=(2, 1), softmax_scale=-8.0, causal=True),
    Case(seqlens=(1, 1), heads=(1, 1), dims=(1, 1)),
    Case(seqlens=(129, 2), heads=(3, 1), dims=(72, 40)),
]


@on_each_emulated
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(case, dtype, backend):
    check(dataclasses.replace(case, dtype=dtype), backend=backend)


@on_each_emulated
@pytest.mark.parametrize("sinks", [None, FP32])
def test_rows_that_see_no_key(sinks, backend):
    """Queries 0..129, whole blocks of them and part of one."""
    case = cuda_case(seqlens=(300, 170), heads=(4, 2), causal=True, sinks=sinks, dlse=True)
    with backend.emulator():
        actual = differentiate(case)
    assert (actual["out"][:, :130] == 0).all()
    assert (actual["dq"][:, :130] == 0).all()
    assert actual["dq"][:, 130:].any(-1).all()


@on_each_emulated
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("seqlen_q", [3, 300])
def test_no_keys_at_all(seqlen_q, dtype, backend):
    case = cuda_case(dtype=dtype, batch=2, seqlens=(seqlen_q, 0), heads=(4, 2), dims=(40, 24))
    with backend.emulator():
        actual = differentiate(case)
    assert (actual["lse"] == INF).all()
    assert (actual["dq"] == 0).all()
    assert actual["dk"].shape == (2, 0, 2, 40)


@on_each_emulated
def test_no_queries_at_all(backend):
    case = cuda_case(batch=2, seqlens=(0, 5), heads=(4, 2), sinks=FP32)
    with backend.emulator():
        actual = differentiate(case)
    for name in ("dk", "dv", "ds_aux"):
        assert (actual[name] == 0).all(), name


@on_each_emulated
def test_keys_that_no_query_sees(backend):
    """Of a window, whole blocks of them."""
    case = cuda_case(seqlens=(20, 400), window_size=(30, 0))
    with backend.emulator():
        actual = differentiate(case)
    for name in ("dk", "dv"):
        assert (actual[name][:, :350] == 0).all()
        assert actual[name][:, 350:].any(-1).all()


DROPOUT = [
    Case(batch=2, seqlens=(129, 257), heads=(4, 2), dims=(40, 24)),
    Case(seqlens=(113, 300), heads=(4, 1), causal=True, softcap=5.0),
    Case(seqlens=(257, 129), heads=(2, 2), dims=(128, 128), causal=True, dlse=True),
    Case(seqlens=(200, 200), heads=(4, 2), window_size=(50, 20), alibi="h", sinks=FP32),
    Case(seqlens=(65, 129), heads=(2, 1), dims=(192, 256), bias="bhqk", sinks=FP32, dlse=True),
]


def differentiate_with_dropout(case, p):
    """As ``differentiate``, without S_dmask, which takes the emulator half a minute."""
    tensors, options, dout, dlse = make_tensors(case)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    options = {**leaves, **options}
    q, k, v, causal, window, softcap = (
        options.pop(n) for n in ("q", "k", "v", "causal", "window_size", "softcap")
    )
    scale, slopes = options.pop("softmax_scale"), options.pop("alibi_slopes", None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse, *_ = _flash_attn_forward(
        q, k, v, p, scale, causal, *window, softcap, slopes, False, **options
    )
    outputs, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    wanted = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return {"out": out.detach(), **{f"d{n}": g for n, g in zip(leaves, wanted)}}


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("p", [0.17, 0.5])
@pytest.mark.parametrize("index", range(len(DROPOUT)))
def test_dropout(index, p, dtype):
    """The mask is that which common/dropout.h describes."""
    case = dataclasses.replace(DROPOUT[index], dtype=dtype, seed=index)
    tensors, options, dout, dlse = make_tensors(case)
    torch.manual_seed(5)
    with EMULATOR.calls(index):
        actual = differentiate_with_dropout(case, p)
    torch.manual_seed(5)
    rng_state = flash_attn_2_cuda.fwd(
        *(x[:1, :1, :1] for x in (tensors["q"], tensors["k"], tensors["v"])),
        *(None, None, p, 1.0, False, -1, -1, 0.0, False, None),
    )[3]
    seed, offset = (int(x) % 2**64 for x in rng_state)
    keep = documented_mask(seed, offset, p, case.batch, case.heads[0], *case.seqlens)
    options = {**options, "keep": keep, "dropout_p": p}
    exact = attention_and_gradients(tensors, options, dout, dlse)
    plain = attention_and_gradients(tensors, options, dout, dlse, dtype=dtype)
    slack = gradient_slack(tensors, options, dout, exact["out"])
    assert_results_close(*({n: x[n] for n in actual} for x in (actual, exact, plain)), slack)


REPEATED = [
    cuda_case(seqlens=(200, 300), heads=(4, 2), dims=(128, 128), causal=True, sinks=FP32),
    cuda_case(seqlens=(300, 200), heads=(2, 1), dims=(40, 72), softcap=5.0, dlse=True),
    cuda_case(seqlens=(130, 200), heads=(1, 1), dims=(256, 256), window_size=(90, 20)),
]
SCHEDULES = [
    *({"mode": mode, "seed": seed} for mode in ("late", "random") for seed in (1, 2, 3)),
    {"threads": 1},
    {"threads": 4, "mode": "random", "seed": 9},
]


@on_each_emulated
@pytest.mark.parametrize("index", range(len(REPEATED)))
def test_schedules_agree_bitwise(index, backend):
    """The order of warps and CTAs, the time of copies and the emulator's threads change nothing:
    dQ's sums have one order."""
    with backend.emulator():
        expected = differentiate(REPEATED[index])
    for options in SCHEDULES:
        with backend.emulator(**options):
            assert_equal(differentiate(REPEATED[index]), expected)


@on_each_emulated
def test_deterministic_changes_nothing(backend):
    with backend.emulator(mode="random", seed=4):
        expected = differentiate(REPEATED[0])
        assert_equal(differentiate(REPEATED[0], deterministic=True), expected)


@on_each_emulated
@pytest.mark.parametrize("index", range(len(REPEATED)))
def test_sequence_does_not_depend_on_its_batch(index, backend):
    case = dataclasses.replace(REPEATED[index], batch=3)
    tensors, options, dout, dlse = make_tensors(case)
    with backend.calls(index):
        together = flash_forward_backward(tensors, options, dout, dlse)
        for i in range(3):
            own = {n: x if n == "s_aux" else x[i : i + 1] for n, x in tensors.items()}
            own_dlse = None if dlse is None else dlse[i : i + 1]
            alone = flash_forward_backward(own, options, dout[i : i + 1], own_dlse)
            for name in GRADIENTS:
                assert torch.equal(alone[name][0], together[name][i]), name


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (backend, case)
        for backend in (EMULATOR, HOPPER)
        for case in varlen_cases(14, seed=6, backend=backend)
        # Alone, a few queries over more keys are a call of decoding, whose sums are of units.
        if backend.has_backward(case.dims) and case.seqlens[1] < 512
    ],
    ids=str,
)
def test_packed_equals_each_sequence_alone(backend, case):
    """Bitwise; what sequences share (sinks, broadcast bias) is summed over the batch."""
    lengths = sampled_lengths(case, case.seed)
    problem = make_tensors(case)

    with backend.calls(case.seed):
        together = flash_varlen(lengths, *problem)
        alone = one_by_one(flash_forward_backward, lengths, problem)
    for name in ("out", "lse", *GRADIENTS):
        assert torch.equal(together[name], alone[name]), name


@on_each_emulated
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("lengths", [[(40, 70), (5, 9)], [(0, 70), (5, 0)], [(0, 0), (0, 0)]])
def test_rows_of_no_sequence_are_zero(lengths, dtype, backend):
    """They hold NaN in q, k, v and dout."""
    case = Case(dtype=dtype, batch=2, seqlens=(40, 70), heads=(4, 2), dims=(72, 40))
    with backend.emulator(mode="late"):
        actual = flash_varlen(lengths, *make_tensors(case))
    for name in ("out", *GRADIENTS):
        assert (actual[name][-TAIL:] == 0).all(), name
        assert actual[name].isfinite().all(), name


@on_each_emulated
def test_more_rows_of_no_sequence_than_in_sequences(backend):
    case = Case(dtype=BF16, batch=1, seqlens=(40, 70), heads=(4, 2))
    tensors, _, dout, _ = make_tensors(case)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (40, 70))
    rows = {"q": 300, "k": 700, "v": 700}
    leaves = {}
    for name, x in tensors.items():
        more = x.new_full((rows[name], *x.shape[2:]), NAN)
        leaves[name] = torch.cat([x[0], more]).requires_grad_()
    dout = torch.cat([dout[0], dout.new_full((300, *dout.shape[2:]), NAN)])
    with backend.emulator(mode="late"):
        expected = flash_varlen([(40, 70)], *make_tensors(case))
        out = flash_attn.flash_attn_varlen_func(*leaves.values(), cu_q, cu_k, 40, 70)
        actual = torch.autograd.grad(out, list(leaves.values()), dout)
    for name, x in zip("qkv", actual):
        length = 40 if name == "q" else 70
        assert torch.equal(x[:length], expected[f"d{name}"][:length])
        assert (x[length:] == 0).all()


def rows_of_memory(length, heads, size, shift, gen=None):
    """A view ``(1, length, heads, size)`` with NaN between and around its rows; in it normal
    numbers or NaN."""
    memory = torch.full((length * heads * (size + shift) + shift,), NAN, dtype=BF16)
    view = memory[shift:].view(1, length, heads, size + shift)[..., :size]
    return view if gen is None else view.copy_(torch.randn(view.shape, generator=gen))


@on_each_emulated
@pytest.mark.parametrize("shift", [0, 1, 2, 4])
@pytest.mark.parametrize("headdims", [(50, 50), (64, 40), (7, 130), (192, 128)])
def test_rows_at_any_address(headdims, shift, backend):
    """Rows that are no multiples of 16 bytes apart or start elsewhere are read and written where
    they are; what lies between them is NaN, is not read and stays."""
    d, dv = headdims
    gen = torch.Generator().manual_seed(0)
    shapes = {"q": (90, 2, d), "k": (130, 1, d), "v": (130, 1, dv)}
    q, k, v = (rows_of_memory(*shape, shift, gen) for shape in shapes.values())
    dout, out = (rows_of_memory(90, 2, dv, shift, gen) for _ in range(2))
    gradients = [rows_of_memory(*shape, shift) for shape in shapes.values()]
    leaves = {n: x.float().requires_grad_() for n, x in zip("qkv", (q, k, v))}
    exact = torch.autograd.grad(
        flash_attn_func(*leaves.values(), causal=True), list(leaves.values()), dout.float()
    )
    score = (d**-0.5, True, -1, -1, 0.0)
    with backend.emulator(mode="late"):
        _, lse, *_ = flash_attn_2_cuda.fwd(q, k, v, out, None, 0.0, *score, False, None)
        flash_attn_2_cuda.bwd(
            dout, q, k, v, out, lse, *gradients, None, 0.0, *score, False, None, None
        )
    for actual, expected in zip(gradients, exact):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual.float(), expected, atol=2e-2 * scale, rtol=0)
        actual.fill_(NAN)
        assert actual._base.isnan().all()  # nothing else was written to


@on_each_emulated
@pytest.mark.parametrize("layout", ["packed", "bhsd", "sbhd"])
def test_strided_tensors(layout, backend):
    heads = (2, 2) if layout == "packed" else (4, 2)
    case = cuda_case(seqlens=(150, 150), heads=heads, batch=2, layout=layout, dlse=True)
    check(case, backend=backend)
    with backend.emulator():
        expected = differentiate(dataclasses.replace(case, layout="bshd"))
        assert_equal(differentiate(case), expected)


BAD_VALUES = {"nan": NAN, "inf": INF, "-inf": -INF}


@on_each_emulated
@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (20, 5)}])
def test_bad_values_stay_with_those_that_see_them(name, options, bad, backend):
    """Gradients of queries and keys that have nothing to do with a row that is not finite are
    bitwise those without it."""
    case = cuda_case(seqlens=(150, 170), heads=(1, 1), **options)
    tensors, given, dout, _ = make_tensors(case)
    tensors = {**tensors, "dout": dout}
    row = 90
    with backend.emulator(mode="random", seed=3):
        clean = flash_forward_backward({n: tensors[n] for n in "qkv"}, given, dout)
        tensors[name] = tensors[name].clone()
        tensors[name][0, row, 0, 3] = BAD_VALUES[bad]
        actual = flash_forward_backward({n: tensors[n] for n in "qkv"}, given, tensors["dout"])
    left, right = given["window_size"]
    right = 0 if given["causal"] else right
    ahead = torch.arange(170) - torch.arange(150)[:, None] - 20
    seen = (ahead <= right) & ((-ahead <= left) | (left < 0))
    if name in ("q", "dout"):
        bad_queries = torch.arange(150) == row
    else:
        bad_queries = seen[:, row]
    bad_keys = seen[bad_queries].any(0)
    for gradient, touched in (("dq", bad_queries), ("dk", bad_keys), ("dv", bad_keys)):
        assert torch.equal(actual[gradient][:, ~touched], clean[gradient][:, ~touched]), gradient
    assert not actual["dq"][:, bad_queries].isfinite().all()


@on_each_emulated
def test_packed_rows_of_neighbours_are_not_read(backend):
    """Every other sequence is NaN."""
    lengths = [(70, 90), (40, 30), (65, 130), (33, 20)]
    case = Case(dtype=BF16, batch=4, seqlens=(70, 130), heads=(2, 1), causal=True)
    tensors, options, dout, dlse = make_tensors(case)
    with backend.emulator(mode="late"):
        clean = flash_varlen(lengths, tensors, options, dout, dlse)
        for x in (*tensors.values(), dout):
            x[1::2] = NAN
        actual = flash_varlen(lengths, tensors, options, dout, dlse)
    kept = {
        side: ~pack(torch.stack([torch.full((n, 1), float(i % 2)) for i in range(4)]), rows).bool()
        for side, n, rows in zip("qk", case.seqlens, zip(*lengths))
    }
    for name in GRADIENTS:
        rows = kept["q" if name == "dq" else "k"][:-TAIL, 0]
        assert torch.equal(actual[name][:-TAIL][rows], clean[name][:-TAIL][rows]), name


def _gradients_of(leaves, dout, **options):
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = flash_attn_func(*leaves, **options)
    return torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("lowest", [torch.finfo(BF16).min, -1e38, -1e9])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_by_a_low_bias(causal, lowest):
    """As models mask padded rows and keys; what is lost stays there."""
    *leaves, dout = (torch.randn(1, 70, 2, 64, dtype=BF16) for _ in range(4))
    dout[:, :9] = 0
    bias = torch.zeros(1, 1, 70, 70)
    bias[..., :9] = bias[:, :, :9] = lowest
    expected = _gradients_of(leaves, dout, attn_bias=bias, causal=causal)
    with flash_attn.emulator():
        actual = _gradients_of(leaves, dout, attn_bias=bias, causal=causal)
    for x, y in zip(actual, expected):
        torch.testing.assert_close(x, y, rtol=1.6e-2, atol=1.6e-2)


@on_each_emulated
@pytest.mark.parametrize("size", [30, 1e3, 1e4])
def test_scores_far_from_0(size, backend):
    """Where one key has all of a row's weight dV is the sum of rows of dout."""
    q, k, v, dout = (torch.randn(1, 130, 2, 64, dtype=BF16) for _ in range(4))
    leaves = (q * size, k * size, v)
    expected = _gradients_of(leaves, dout)[2]
    with backend.emulator():
        actual = _gradients_of(leaves, dout)[2]
    torch.testing.assert_close(actual, expected, rtol=1.6e-2, atol=1.6e-2)
