"""The backward of compute capability 9.0, on the emulated H100: who takes a call, every kernel, and
what only it does. What every backward must do is in test_cuda_bwd.py, test_cuda_bwd_far.py and
test_cuda_hopper.py, which run on it too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import BF16, FP16, FP32, cuda_case, flash_forward_backward, make_tensors
from backends import HOPPER, needs_emulator
from test_cuda_bwd import (
    GRADIENTS,
    NAN,
    SCHEDULES,
    assert_close_to_exact,
    assert_equal,
    differentiate,
)
from test_varlen import flash_varlen, one_by_one

import flash_attn_2_cuda
from flash_attn import flash_attn_func

pytestmark = needs_emulator

DTYPES = {FP16: "fp16", BF16: "bf16"}
# Head dims of a call that takes the kernel of each.
HEADDIMS = {64: (64, 48), 96: (96, 96), 128: (128, 128), 192: (192, 128), 256: (248, 256)}
MASKS = {"none": {}, "causal": {"causal": True}, "window": {"window_size": (70, 20)}}


def backward_kernels(gpu):
    """Names of what was launched, without the forward's."""
    return {name for name in gpu.counters if not name.startswith("flash_fwd")}


@pytest.mark.parametrize(
    ("dtype", "mask"), [(BF16, "none"), (BF16, "causal"), (FP16, "window")], ids=str
)
@pytest.mark.parametrize("headdim", HEADDIMS)
def test_every_kernel(headdim, dtype, mask):
    """Three CTAs and more add to a block's dQ; rows end within blocks."""
    case = cuda_case(
        dtype=dtype, seqlens=(150, 330), heads=(4, 2), dims=HEADDIMS[headdim], dlse=True,
        seed=headdim, **MASKS[mask],
    )  # fmt: skip
    with HOPPER.emulator(mode="late") as gpu:
        actual = differentiate(case)
    name = DTYPES[dtype]
    assert backward_kernels(gpu) == {
        f"flash_bwd_sm90_{name}_d{headdim}_masked",
        f"flash_bwd_prepare_sm90_{name}",
    }
    assert_close_to_exact(case, actual)


@pytest.mark.parametrize(
    ("headdim", "mask"),
    [(64, "causal"), (96, "window"), (128, "none"), (192, "causal"), (256, "window")],
)
def test_schedules_agree_bitwise(headdim, mask):
    """The order of warps and CTAs, the time of copies, products and sums change nothing."""
    case = cuda_case(seqlens=(200, 300), heads=(2, 1), dims=HEADDIMS[headdim], **MASKS[mask])
    with HOPPER.emulator():
        expected = differentiate(case)
    for options in SCHEDULES[::2]:
        with HOPPER.emulator(**options):
            assert_equal(differentiate(case), expected)


def unaligned(x):
    """The same values, rows of which are no multiples of 16 bytes apart."""
    wider = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype)
    wider[..., :-1] = x
    return wider[..., :-1]


FALLBACKS = {
    "q": lambda q, k, v, dout: (unaligned(q), k, v, dout),
    "k": lambda q, k, v, dout: (q, unaligned(k), v, dout),
    "dout": lambda q, k, v, dout: (q, k, v, unaligned(dout)),
    "expanded dout": lambda q, k, v, dout: (q, k, v, dout[:, :, :1].expand_as(dout)),
}


@pytest.mark.parametrize("what", [*FALLBACKS, "softcap", "none"])
def test_what_is_left_to_the_kernels_of_sm80(what):
    case = cuda_case(seqlens=(90, 200), heads=(2, 2), softcap=4.0 * (what == "softcap"))
    tensors, _, dout, _ = make_tensors(case)
    args = (*(tensors[n] for n in "qkv"), dout)
    q, k, v, dout = FALLBACKS.get(what, lambda *x: x)(*args)
    score = (q.shape[-1] ** -0.5, False, -1, -1, case.softcap)

    def gradients(*tensors):
        q, k, v, dout = tensors
        out, lse, *_ = flash_attn_2_cuda.fwd(q, k, v, None, None, 0.0, *score, False, None)
        results = [torch.empty_like(x) for x in (q, k, v)]
        flash_attn_2_cuda.bwd(
            dout, q, k, v, out, lse, *results, None, 0.0, *score, False, None, None
        )
        return results

    expected = gradients(*(x.float() for x in (q, k, v, dout)))
    with HOPPER.emulator() as gpu:
        actual = gradients(q, k, v, dout)
    backend = "sm90" if what == "none" else "sm80"
    launched = {name for name in gpu.counters if name.startswith("flash_bwd")}
    assert len(launched) == 2 and all(f"_{backend}_" in name for name in launched)
    for x, y in zip(actual, expected):
        torch.testing.assert_close(x.float(), y, atol=2e-2 * y.abs().max().item(), rtol=0)


@pytest.mark.parametrize("headdim", HEADDIMS)
def test_gradients_at_any_address(headdim):
    """dq, dk and dv are written to where they are, what lies between their rows stays."""
    dims = HEADDIMS[headdim]
    case = cuda_case(seqlens=(90, 130), heads=(2, 1), dims=dims)
    tensors, _, dout, _ = make_tensors(case)
    q, k, v = (tensors[n] for n in "qkv")
    score = (dims[0] ** -0.5, True, -1, -1, 0.0)
    with HOPPER.emulator(mode="late") as gpu:
        out, lse, *_ = flash_attn_2_cuda.fwd(q, k, v, None, None, 0.0, *score, False, None)
        results = []
        for odd in (False, True):
            gradients = []
            for x in (q, k, v):
                memory = torch.full((*x.shape[:-1], x.shape[-1] + 3), NAN, dtype=BF16)
                gradients.append(memory[..., odd : x.shape[-1] + odd] if odd else x.clone())
            flash_attn_2_cuda.bwd(
                dout, q, k, v, out, lse, *gradients, None, 0.0, *score, False, None, None
            )
            results.append(gradients)
    assert f"flash_bwd_sm90_bf16_d{headdim}_masked" in gpu.counters
    for x, y in zip(*results):
        assert torch.equal(x, y)
        y.fill_(NAN)
        assert y._base.isnan().all()  # nothing else was written to


@pytest.mark.parametrize("headdim", HEADDIMS)
def test_packed_with_empty_sequences(headdim):
    """Bitwise as each sequence alone; the kernel masks what TMA brings of neighbours."""
    lengths = [(70, 90), (0, 30), (65, 0), (1, 140), (129, 64)]
    case = cuda_case(
        batch=5, seqlens=(129, 140), heads=(4, 2), dims=HEADDIMS[headdim], causal=True, sinks=FP32
    )
    problem = make_tensors(case)
    with HOPPER.emulator(mode="random", seed=headdim) as gpu:
        together = flash_varlen(lengths, *problem, backend=HOPPER)
        alone = one_by_one(flash_forward_backward, lengths, problem)
    assert f"flash_bwd_sm90_bf16_d{headdim}_masked" in gpu.counters
    assert "flash_sink_gradient_sm80_fp32" in gpu.counters
    for name in ("out", "lse", *GRADIENTS):
        assert torch.equal(together[name], alone[name]), name
    torch.testing.assert_close(together["ds_aux"], alone["ds_aux"])


@pytest.mark.parametrize("name", ["q", "k", "dout"])
@pytest.mark.parametrize(
    "headdim",  # by default one of each loop over visits
    [pytest.param(d, marks=() if d in (64, 192) else pytest.mark.slow) for d in HEADDIMS],
)
def test_bad_values_stay_with_those_that_see_them(headdim, name):
    """As test_cuda_bwd.py has it of d = 64, in two places of a causal problem."""
    case = cuda_case(seqlens=(150, 170), heads=(1, 1), dims=(headdim, headdim), causal=True)
    tensors, options, dout, _ = make_tensors(case)
    rows = (20, 149)
    seen = torch.arange(170) <= torch.arange(150)[:, None] + 20
    with HOPPER.emulator(mode="random", seed=headdim) as gpu:
        clean = flash_forward_backward(tensors, options, dout)
        for row in rows:
            changed = {**tensors, "dout": dout}
            changed[name] = changed[name].clone()
            changed[name][0, row, 0, headdim - 1] = NAN
            bad = changed.pop("dout")
            actual = flash_forward_backward(changed, options, bad)
            queries = seen[:, row] if name == "k" else torch.arange(150) == row
            keys = seen[queries].any(0)
            for gradient, touched in (("dq", queries), ("dk", keys), ("dv", keys)):
                kept = actual[gradient][:, ~touched]
                assert torch.equal(kept, clean[gradient][:, ~touched]), (row, gradient)
            assert not actual["dq"][:, queries].isfinite().all()
    assert f"flash_bwd_sm90_bf16_d{headdim}_masked" in gpu.counters


def test_lengths_that_need_no_other_cta():
    """One block of keys: dQ goes through no memory."""
    case = cuda_case(seqlens=(300, 100), heads=(2, 1), dims=(128, 128))
    with HOPPER.emulator() as gpu:
        actual = differentiate(case)
    (name,) = (x for x in gpu.counters if x.startswith("flash_bwd_sm90"))
    assert gpu.counters[name]["ctas"] == 1
    assert not any(
        "reduce" in line["text"] and line["executed"] for line in gpu.line_counters[name]
    )
    assert_close_to_exact(case, actual)


def test_gradients_of_more_ctas_than_multiprocessors():
    """CTAs that wait for their turn hold no multiprocessor that an earlier one needs."""
    case = cuda_case(seqlens=(64, 1500), heads=(1, 1))
    with HOPPER.emulator() as gpu:
        expected = differentiate(case)
    (name,) = (x for x in gpu.counters if x.startswith("flash_bwd_sm90"))
    assert gpu.counters[name]["ctas"] == 12
    with HOPPER.emulator(threads=1):
        assert_equal(differentiate(case), expected)
    assert_close_to_exact(case, expected)


def test_autograd_of_many_layouts_takes_it():
    """Gradients of torch's own making, such as of out.sum(), may be expanded: sm80's take them."""
    case = dataclasses.replace(cuda_case(seqlens=(90, 90)), causal=True)
    tensors, _, dout, _ = make_tensors(case)
    leaves = [tensors[n].requires_grad_() for n in "qkv"]
    with HOPPER.emulator() as gpu:
        expected = torch.autograd.grad(
            flash_attn_func(*leaves, causal=True), leaves, torch.ones_like(dout)
        )
        actual = torch.autograd.grad(flash_attn_func(*leaves, causal=True).sum(), leaves)
    assert any(name.startswith("flash_bwd_sm90") for name in gpu.counters)
    for x, y in zip(actual, expected):
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)
