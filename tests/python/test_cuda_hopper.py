"""The kernels of compute capability 9.0, on the emulated H100, against the reference. What every
CUDA backend must do is in test_cuda.py and test_cuda_varlen.py, which run on it too."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import captured_calls
import pytest
import torch
import unchecked_indices
from attention_cases import (
    BF16,
    FP16,
    SWEEP_FACTOR,
    Case,
    check,
    cuda_case,
    make_tensors,
    qkv,
    sampled_cases,
)
from backends import HOPPER, EmulatedBackend, needs_emulator
from scripts import report_of_emulated_driver
from test_cuda_dmask import assert_equal_masks
from test_varlen import check as check_varlen
from test_varlen import cumulative, flash_varlen, one_by_one, varlen_cases

from flash_attn import flash_attn_func, flash_attn_varlen_func

pytestmark = needs_emulator

NAN = float("nan")
DTYPES = {FP16: "fp16", BF16: "bf16"}
HEADDIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
# Options by the class of scores that they need.
SCORES = {
    "unmasked": {},
    "masked": {"causal": True},
    "window": {"window_size": (90, 30)},
    "modified": {"softcap": 5.0, "causal": True},
}


class Recording(EmulatedBackend):
    """Keeps the contexts of its calls, and so the counters of what was launched."""

    def emulator(self, **options):
        self.contexts.append(super().emulator(**options))
        return self.contexts[-1]

    def kernels(self, kind="fwd"):
        """Backends of the kernels of that kind that the latest call launched: {"sm90"}."""
        pattern = re.compile(rf"flash_{kind}_(sm\d+)_")
        found = map(pattern.match, self.contexts[-1].counters)
        return {match[1] for match in found if match}


@pytest.fixture
def hopper():
    backend = Recording(**vars(HOPPER))
    object.__setattr__(backend, "contexts", [])
    return backend


def modifies(case):
    """Whether a case's scores are more than products: its backward is sm80's."""
    return bool(case.softcap or case.alibi or case.bias)


def on_hopper(*args, mode="eager", seed=0, function=flash_attn_func, **options):
    """``(out, lse)`` of a call that must have taken a kernel of the backend."""
    with HOPPER.emulator(mode=mode, seed=seed) as gpu:
        out, lse, _ = function(*args, **options, return_attn_probs=True)
    assert [name.split("_")[1:3] for name in gpu.counters] == [["fwd", "sm90"]]
    return out, lse


@pytest.mark.parametrize("case", sampled_cases(45, seed=21, backend=HOPPER), ids=str)
def test_feature_product(case, hopper):
    check(case, backend=hopper)
    assert hopper.kernels() == {"sm90"}
    assert hopper.kernels("bwd") == {"sm80" if modifies(case) else "sm90"}


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(600, seed=22, backend=HOPPER), ids=str)
def test_feature_product_at_length(case):
    check(case, SWEEP_FACTOR, backend=HOPPER)


@pytest.mark.parametrize("case", varlen_cases(20, seed=24, backend=HOPPER), ids=str)
def test_packed_feature_product(case, hopper):
    check_varlen(case, backend=hopper)
    assert hopper.kernels() == {"sm90"}
    assert hopper.kernels("bwd") == {"sm80" if modifies(case) else "sm90"}


@pytest.mark.slow
@pytest.mark.parametrize("case", varlen_cases(300, seed=25, backend=HOPPER), ids=str)
def test_packed_feature_product_at_length(case):
    check_varlen(case, SWEEP_FACTOR, backend=HOPPER)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", HEADDIMS)
@pytest.mark.parametrize("scores", ["unmasked", "masked", "modified"])
def test_every_kernel(dims, scores, dtype, hopper):
    options = SCORES[scores]
    seed = HEADDIMS.index(dims)
    check(cuda_case(dtype=dtype, dims=dims, seed=seed, seqlens=(150, 200), **options), 2, 0, hopper)
    (kernel,) = (x for x in hopper.contexts[-1].counters if x.startswith("flash_fwd"))
    prefix = f"flash_fwd_sm90_{DTYPES[dtype]}_d"
    assert kernel.startswith(prefix)
    # Modified scores of 192/128 take the kernel of 192.
    widths = {"192x128", "192"} if dims == (192, 128) else {str(dims[0])}
    assert kernel[len(prefix) :].split("_")[0] in widths


@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("dims", [(64, 64), (256, 256)])
def test_schedules_agree_bitwise(dims, options):
    q, k, v = qkv(cuda_case(seqlens=(200, 330), heads=(2, 1), dims=dims))
    schedules = [("eager", 0), ("late", 0), ("random", 1), ("random", 2)]
    out, lse = on_hopper(q, k, v, **options)
    for mode, seed in schedules[1:]:
        others = on_hopper(q, k, v, mode=mode, seed=seed, **options)
        assert torch.equal(out, others[0]) and torch.equal(lse, others[1])


@pytest.mark.parametrize("dims", [(64, 64), (192, 192)])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_one_cta_after_another(causal, dims):
    """More tiles than the device has multiprocessors, taken by number or by counter (causal):
    each head as if it were alone."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(3, 20, 60, dims[0], generator=gen).to(BF16)
    k, v = torch.randn(2, 3, 40, 60, dims[0], generator=gen).to(BF16).unbind(0)
    out, lse = on_hopper(q, k, v, causal=causal, mode="late")
    for batch, head in ((0, 0), (1, 31), (2, 11), (2, 59)):
        one = (slice(batch, batch + 1), slice(None), slice(head, head + 1))
        alone = on_hopper(q[one], k[one], v[one], causal=causal, mode="random", seed=head)
        assert torch.equal(out[one], alone[0])
        assert torch.equal(lse[batch, head], alone[1][0, 0])


def test_clusters_on_a_device_with_one_multiprocessor():
    """At least one of them is launched."""
    program = """
import ctypes, torch, flash_attn
from flash_attn import _library
library = str(_library.library_path().parent / "libgpu_emulator.so")
assert ctypes.CDLL(library).gpuEmulatorSetOption(1, b"sms", b"1") == 0
q, k, v = torch.randn(3, 1, 250, 1, 128).bfloat16()
expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
with flash_attn.emulator("sm_90a", library=library) as gpu:
    out = flash_attn.flash_attn_func(q, k, v)
assert list(gpu.counters) == ["flash_fwd_sm90_bf16_d128_unmasked"], gpu.counters
torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=2e-2)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dims", [(64, 64), (256, 256)])
def test_tiles_with_and_without_keys_of_one_cta(dims):
    """What is written for a tile without keys leaves the queries of the next one alone."""
    lengths_q, lengths_k = [9, 20, 17, 30] * 12, [0, 40, 0, 30] * 12
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths_q), 4, dims[0], generator=gen).to(BF16)
    k, v = torch.randn(2, sum(lengths_k), 1, dims[0], generator=gen).to(BF16).unbind(0)
    packed = q, k, v, cumulative(lengths_q), cumulative(lengths_k), 30, 40
    expected = flash_attn_varlen_func(*(x.float() for x in packed[:3]), *packed[3:])
    out, _ = on_hopper(*packed, mode="random", seed=1, function=flash_attn_varlen_func)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("case", varlen_cases(6, seed=26, backend=HOPPER), ids=str)
def test_packed_equals_each_sequence_alone(case):
    """Bitwise: neither what surrounds a sequence nor the way of storing its rows changes it."""
    case = dataclasses.replace(case, softmax_scale=None, bias="")
    sq, sk = max(case.seqlens[0], 40), max(case.seqlens[1], 40)
    # Few queries of many keys would be another kernel's, alone.
    lengths = [(sq, sk), (sq // 2 + 17, min(sk, 90)), (sq, 1), (33, min(sk, 70))]
    case = dataclasses.replace(case, seqlens=(sq + 17, sk))
    problem = make_tensors(case)

    def run(tensors, options, dout, dlse):
        out, lse = on_hopper(*(tensors[n] for n in "qkv"), **rest(tensors), **options)
        return {"out": out, "lse": lse}

    def rest(tensors):
        return {n: x for n, x in tensors.items() if n not in "qkv"}

    with HOPPER.calls(2):
        together = flash_varlen(lengths, *problem, backend=HOPPER)
    alone = one_by_one(run, lengths, problem)
    for name in ("out", "lse"):
        assert torch.equal(together[name], alone[name]), name


BAD_VALUES = {"nan": NAN, "inf": float("inf"), "-inf": float("-inf")}


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("scores", ["masked", "window", "modified"])
def test_bad_values_reach_the_rows_that_see_them(which, scores, bad):
    """In q, k and v: the same rows, columns and LSE as on the CPU."""
    q, k, v = tensors = qkv(cuda_case(heads=(2, 1), seqlens=(150, 280)))
    for row in (0, 70, 149):
        dict(zip("qkv", tensors))[which][0, row, 0, 5] = BAD_VALUES[bad]
    options = SCORES[scores]
    exact = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    out, lse = on_hopper(q, k, v, **options, mode="random", seed=3)
    torch.testing.assert_close(out, exact[0], atol=3e-2, rtol=0, equal_nan=True)
    torch.testing.assert_close(lse, exact[1], atol=1e-2, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("dims", [(64, 64), (192, 192)])
def test_neighbours_of_a_packed_sequence(scores, dims):
    """Of NaN: they reach none of its rows, nor do rows behind the keys that are used."""
    lengths_q, lengths_k = [40, 150, 33], [50, 140, 60]
    q, k, v = qkv(cuda_case(seqlens=(223, 250), dims=dims))
    q, k, v = q[0], k[0], v[0]
    packed = cumulative(lengths_q), cumulative(lengths_k), 150, 140
    options = {**SCORES[scores], "mode": "late", "function": flash_attn_varlen_func}
    clean = on_hopper(q, k, v, *packed, **options)
    for x, (start, end) in ((q, (40, 190)), (k, (50, 190)), (v, (50, 190))):
        x[:start] = x[end:] = NAN
    out, lse = on_hopper(q, k, v, *packed, **options)
    assert torch.equal(out[40:190], clean[0][40:190])
    assert torch.equal(lse[:, 40:190], clean[1][:, 40:190])


@pytest.mark.parametrize("scores", SCORES)
def test_a_score_of_minus_infinity_weighs_nothing(scores):
    """The product of finite values overflows: hidden keys, and where all are, rows of none."""
    q, k, v = qkv(cuda_case(heads=(1, 1), seqlens=(140, 400)))
    q[..., 0], k[..., 0] = 1e30, 0.0
    k[0, 100:300, 0, 0] = -1e30
    q[0, 64:, 0, 0] = 0.0
    options = {**SCORES[scores], "softcap": 0.0}
    exact = flash_attn_func(q.float(), k.float(), v.float(), **options, return_attn_probs=True)
    out, lse = on_hopper(q, k, v, **options)
    torch.testing.assert_close(out.float(), exact[0], atol=2e-2, rtol=0, equal_nan=True)
    torch.testing.assert_close(lse, exact[1], atol=1e-3, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("scale", [8.0, -8.0, 0.0, -0.05])
def test_scales(dims, scale):
    check(cuda_case(dtype=FP16, softmax_scale=scale, dims=dims), backend=HOPPER)


@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "packed"])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
def test_layouts(layout, dims, hopper):
    check(
        cuda_case(layout=layout, dims=dims, batch=2, seqlens=(130, 130), causal=True),
        backend=hopper,
    )
    assert hopper.kernels() == {"sm90"}


@pytest.mark.parametrize(
    ("headdim", "dtype"), [(64, FP16), (96, BF16), (128, BF16), (192, FP16), (256, BF16)]
)
def test_dropout_drops_what_s_dmask_says(dtype, headdim):
    """V picks single keys: out is 0 where they are dropped."""
    keys = min(headdim, 150)
    q = torch.zeros(2, 77, 2, headdim, dtype=dtype)
    k = torch.zeros(2, keys, 1, headdim, dtype=dtype)
    v = torch.eye(keys, headdim, dtype=dtype).expand(2, keys, headdim)[:, :, None]
    torch.manual_seed(headdim)
    s_dmask = flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True)[2]
    torch.manual_seed(headdim)
    with HOPPER.calls(headdim) as gpu:
        out, _, actual = flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True)
    assert {name.split("_")[1] for name in gpu.counters} == {"fwd", "dmask"}
    assert_equal_masks(actual, s_dmask)
    kept = out.transpose(1, 2)[..., :keys] != 0
    assert torch.equal(kept, ~torch.signbit(s_dmask[:, :, :77, :keys]))


def unaligned(x):
    """The same values, rows of which are no multiples of 16 bytes apart."""
    wider = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype)
    wider[..., :-1] = x
    return wider[..., :-1]


FALLBACKS = {
    "unaligned q": lambda q, k, v: (unaligned(q), k, v),
    "unaligned v": lambda q, k, v: (q, k, unaligned(v)),
    "expanded heads": lambda q, k, v: (q, *(x[:, :, :1].expand(q.shape[0], -1, 2, -1)
                                            for x in (k, v))),
    "expanded batch": lambda q, k, v: (q, *(x[:1].expand(2, -1, -1, -1) for x in (k, v))),
    "odd head dim": lambda q, k, v: (q[..., :50].contiguous(), k[..., :50].contiguous(), v),
    "few queries": lambda q, k, v: (q[:, :2], k, v),
}  # fmt: skip


@pytest.mark.parametrize("what", FALLBACKS)
def test_what_is_left_to_the_kernels_of_sm80(what):
    q, k, v = FALLBACKS[what](*qkv(cuda_case(batch=2, seqlens=(90, 700), heads=(2, 2))))
    expected = flash_attn_func(q.float(), k.float(), v.float(), causal=True)
    with HOPPER.emulator() as gpu:
        out = flash_attn_func(q, k, v, causal=True)
    assert {name.split("_")[2] for name in gpu.counters} == {"sm80"}
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize(("page_size", "backend"), [(4, "sm80"), (16, "sm90")])
def test_small_pages_are_left_to_the_kernels_of_sm80(page_size, backend):
    q, k, v = (x[0] for x in qkv(Case(dtype=FP16, seqlens=(90, 128), heads=(2, 1))))
    ends = cumulative([90]), cumulative([128])
    expected = flash_attn_varlen_func(q.float(), k.float(), v.float(), *ends, 90, 128)
    pages = [x.view(-1, page_size, 1, 64) for x in (k, v)]
    table = torch.arange(len(pages[0]), dtype=torch.int32)[None]
    with HOPPER.emulator() as gpu:
        out = flash_attn_varlen_func(q, *pages, *ends, 90, 128, block_table=table)
    assert {name.split("_")[2] for name in gpu.counters} == {backend}
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0)


# ------------------------------------------------------------------------------------------------
# Tensors in device memory, through the C interface.

PACKED = ("varlen", "long_varlen", "varlen_dropout")
WITH_BACKWARD = (*PACKED, "varlen_bwd")


@pytest.fixture(scope="module")
def index_report():
    return report_of_emulated_driver(unchecked_indices.__file__, "1", *WITH_BACKWARD)


@pytest.mark.parametrize(("tensor", "entries"), unchecked_indices.OVERLAPPING)
def test_sequences_that_overlap_in_the_backward(index_report, tensor, entries):
    """No CTA waits for one that does not come."""
    first, second = index_report[f"overlapping_bwd-{tensor}={entries}"]
    assert first == [0, ""]
    assert second[0] == 1
    assert f"in {tensor}: " in second[1]


@pytest.mark.parametrize("name", unchecked_indices.cases(WITH_BACKWARD))
def test_element_out_of_range(index_report, name):
    """As test_cuda_indices.py has it for the other kernels."""
    tensor = unchecked_indices.cases(WITH_BACKWARD)[name][1]
    first, (status, sentence), third = index_report[name]["calls"]
    assert first == [0, ""]
    assert status == 1
    assert sentence.startswith(
        f"an earlier call on CUDA device 1 was given values out of range in {tensor}: "
    )
    assert third == [0, ""]
    assert index_report[name]["wrong"] == []


def test_replays_give_what_eager_calls_give():
    report = report_of_emulated_driver(captured_calls.__file__, "1", *PACKED)
    assert {name: report[name] for name in PACKED} == {name: [] for name in PACKED}
