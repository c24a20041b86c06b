"""The CUDA kernels, on the emulated GPU, against the reference; and what they say they lack."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from attention_cases import BF16, FP16, check, cuda_case, qkv, sampled_cases
from backends import EMULATOR, needs_emulator, needs_kernels, on_each_emulated
from reference import attention

import flash_attn
import flash_attn_2_cuda
from flash_attn import flash_attn_func, flash_attn_varlen_func


@needs_emulator
@pytest.mark.parametrize("case", sampled_cases(80, seed=1, backend=EMULATOR), ids=str)
def test_feature_product(case):
    check(case, backend=EMULATOR)


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("case", sampled_cases(600, seed=2, backend=EMULATOR), ids=str)
def test_feature_product_at_length(case):
    check(case, backend=EMULATOR)


@needs_emulator
@on_each_emulated
@pytest.mark.parametrize("mode", ["eager", "late", "random"])
@pytest.mark.parametrize("seed", [1, 2])
def test_schedules_agree_bitwise(backend, mode, seed):
    """The order of warps and the time of copies change nothing."""
    q, k, v = qkv(cuda_case(seqlens=(200, 260), heads=(2, 1), dims=(128, 128)))
    results = []
    for options in ({}, {"mode": mode, "seed": seed}):
        with backend.emulator(**options):
            results.append(flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2])
    (out, lse), (other_out, other_lse) = results
    assert torch.equal(out, other_out)
    assert torch.equal(lse, other_lse)


@needs_emulator
@on_each_emulated
def test_out_is_the_same_without_softmax_lse(backend):
    q, k, v = qkv(cuda_case(seqlens=(70, 70), heads=(2, 1)))
    with backend.emulator():
        together = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[0]
        assert torch.equal(flash_attn_func(q, k, v, causal=True), together)


@needs_emulator
@on_each_emulated
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("scale", [8.0, -8.0])
def test_large_scores(backend, dtype, scale):
    check(cuda_case(dtype=dtype, softmax_scale=scale), backend=backend)


@needs_emulator
@on_each_emulated
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "exponents"), [(FP16, (4, 12, 16, 22)), (BF16, (4, 12, 22, 60))])
def test_scores_far_from_0(backend, dtype, exponents, sign, causal):
    """They weigh by their distances, which are multiples of what fp32 holds of them."""
    *_, v = qkv(cuda_case(dtype=dtype, seqlens=(150, 300), heads=(1, 1)))
    for exponent in exponents:
        step = 2.0 ** max(exponent - 22, -3)
        q = torch.zeros(1, 150, 1, 64)
        k = torch.zeros(1, 300, 1, 64)
        q[..., 0], k[..., 0] = 2.0 ** (exponent // 2), sign * 8 * 2.0 ** (exponent - exponent // 2)
        q[..., 1], k[0, :, 0, 1] = 1.0, torch.arange(300) * 7 % 16 * step * 8
        exact_out, exact_lse = attention(q.double(), k.double(), v.double(), causal=causal)
        with backend.emulator():
            out, lse, _ = flash_attn_func(
                q.to(dtype), k.to(dtype), v, causal=causal, return_attn_probs=True
            )
        torch.testing.assert_close(lse.double(), exact_lse, rtol=3e-7, atol=2e-6)
        torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=2e-2)


@needs_emulator
@on_each_emulated
@pytest.mark.parametrize("causal", [False, True])
def test_nan_reaches_the_rows_that_see_it(backend, causal):
    q, k, v = qkv(cuda_case(dtype=FP16, heads=(1, 1), seqlens=(70, 70)))
    k[0, 40] = float("nan")
    with backend.emulator():
        out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    sees = torch.arange(70) >= 40 if causal else torch.ones(70, dtype=torch.bool)
    assert torch.equal(lse[0, 0].isnan(), sees)
    assert torch.equal(out[0, :, 0].isnan().all(-1), sees)


@needs_emulator
@on_each_emulated
@pytest.mark.parametrize("softcap", [1e-3, 0.5, 63.0, 65.0, 1e3, 1e5, 1e8])
@pytest.mark.parametrize(("seqlens", "kernel"), [((128, 192), "fwd"), ((3, 600), "decode")])
def test_softcaps_of_any_size(backend, seqlens, kernel, softcap):
    """A large one leaves scores as they are, a small one leaves their signs."""
    case = cuda_case(dtype=FP16, seqlens=seqlens, softcap=softcap, softmax_scale=0.5)
    check(case, backend=dataclasses.replace(backend, max_backward_dim=0))
    check(dataclasses.replace(case, dtype=BF16), backend=backend)  # torch's fp16 overflows
    with backend.emulator() as gpu:
        flash_attn_func(*qkv(case), softcap=softcap)
    assert [name.split("_")[1] for name in gpu.counters] == [kernel]


BAD_VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@needs_emulator
@on_each_emulated
@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (20, 5)}, {"softcap": 3.0}])
@pytest.mark.parametrize(
    ("dtype", "dims"), [(FP16, (64, 64)), (BF16, (128, 128)), (BF16, (192, 192))]
)
def test_bad_values_in_v_reach_the_rows_that_see_them(backend, dtype, dims, options, bad):
    """And of those the columns that hold them: bitwise what all others are without them."""
    q, k, v = qkv(cuda_case(dtype=dtype, heads=(2, 1), seqlens=(150, 170), dims=dims))
    with backend.emulator(mode="random", seed=3):
        clean = flash_attn_func(q, k, v, **options)
    for key, column in ((0, 3), (90, 17), (169, 0)):
        v[0, key, 0, column] = BAD_VALUES[bad]
    expected = flash_attn_func(q.float(), k.float(), v.float(), **options)
    with backend.emulator(mode="random", seed=3):
        out = flash_attn_func(q, k, v, **options)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0, equal_nan=True)
    untouched = [c for c in range(dims[1]) if c not in (3, 17, 0)]
    torch.testing.assert_close(out[..., untouched], clean[..., untouched], atol=4e-3, rtol=0)


@needs_emulator
@on_each_emulated
@pytest.mark.parametrize("shift", [0, 1, 2, 4])
@pytest.mark.parametrize("headdims", [(50, 50), (64, 40), (7, 130), (192, 128)])
def test_rows_at_any_address(backend, headdims, shift):
    """Rows that are no multiples of 16 bytes apart or start elsewhere are read where they are; what
    lies between them is NaN and is not."""
    d, dv = headdims
    gen = torch.Generator().manual_seed(0)

    def rows(length, heads, size):
        memory = torch.full((length * heads * (size + shift) + shift,), float("nan"), dtype=BF16)
        view = memory[shift:].view(1, length, heads, size + shift)[..., :size]
        view.copy_(torch.randn(view.shape, generator=gen))
        return view

    q, k, v, out = rows(90, 2, d), rows(130, 1, d), rows(130, 1, dv), rows(90, 2, dv)
    expected = flash_attn_func(q, k, v, causal=True)
    memory = out._base.clone()
    with backend.emulator(mode="late"):
        flash_attn_2_cuda.fwd(q, k, v, out, None, 0.0, d**-0.5, True, -1, -1, 0.0, False, None)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=0)
    out.fill_(float("nan"))
    memory.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(float("nan"))
    torch.testing.assert_close(out._base, memory, equal_nan=True)  # nothing else was written to


@needs_emulator
@on_each_emulated
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("headdim", [32, 64, 96, 128, 256])
def test_dropout_drops_what_the_cpu_drops(backend, dtype, headdim):
    """With V the unit matrix, out is the probabilities."""
    shape = (2, 200, 2, headdim)
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, generator=gen).to(dtype) * 0.1 for _ in "qk")
    v = torch.zeros(shape, dtype=dtype)
    for first in (0, 90, 200 - headdim):
        v.zero_()
        for i in range(max(0, min(headdim, 200 - first))):
            v[:, first + i, :, i] = 1.0
        torch.manual_seed(5)
        expected = flash_attn_func(q, k, v, dropout_p=0.3)
        torch.manual_seed(5)
        with backend.emulator():
            out = flash_attn_func(q, k, v, dropout_p=0.3)
        assert torch.equal(out == 0, expected == 0)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=2e-2)


@needs_emulator
@on_each_emulated
def test_out_of_the_caller_and_overlapping_views(backend):
    """All of q, k, v and out in one tensor."""
    memory = torch.randn(1, 96, 4, 64).to(FP16)
    q, k, v = memory[:, :, 0:1], memory[:, :, 1:2], memory[:, :, 2:3]
    expected = flash_attn_func(q, k, v)
    with backend.emulator():
        out = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, 0.0, 0.125, False, -1, -1, 0.0, None, False
        )[0]
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)


@needs_emulator
@on_each_emulated
def test_batch_of_no_sequences(backend):
    q, k = torch.zeros(0, 3, 4, 64, dtype=FP16), torch.zeros(0, 5, 2, 64, dtype=FP16)
    with backend.emulator() as gpu:
        out, lse, _ = flash_attn_func(q, k, k, return_attn_probs=True)
        assert out.shape == q.shape and lse.shape == (0, 4, 3)
        assert gpu.counters == {}  # nothing is launched


@needs_emulator
def test_context_holds_for_its_thread_and_ends():
    q, k, v = qkv(cuda_case())
    on_cpu = flash_attn_func(q, k, v)
    seen = {}
    with flash_attn.emulator() as gpu:
        thread = threading.Thread(target=lambda: seen.update(other=flash_attn_func(q, k, v)))
        thread.start()
        thread.join()
        assert gpu.counters == {}
        with flash_attn.emulator(mode="late") as inner:
            flash_attn_func(q, k, v)
        assert list(inner.counters) == ["flash_fwd_sm80_bf16_d64_unmasked"]
        with pytest.raises(RuntimeError, match="lacks fp32"):
            flash_attn_func(q.float(), k.float(), v.float())
    assert torch.equal(seen["other"], on_cpu)
    assert torch.equal(flash_attn_func(q, k, v), on_cpu)
    assert flash_attn_func(q.float(), k.float(), v.float()).isfinite().all()


@needs_emulator
def test_whole_process_by_environment():
    code = (
        "import torch, flash_attn\n"
        "x = torch.randn(1, 40, 1, 64).half()\n"
        "flash_attn.flash_attn_func(x, x, x)\n"
        "print(flash_attn._library.lib.emulator_counters())\n"
        "try: flash_attn.flash_attn_func(*[x.float()] * 3)\n"
        "except RuntimeError as error: print(error)\n"
    )
    env = {**os.environ, "FLASH_ATTENTION_EMULATOR": "sm_80,checks=all,-init_fence,mode=late"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert "flash_fwd_sm80_fp16_d64_unmasked" in result.stdout
    assert "the CUDA backend lacks fp32" in result.stdout


def _lacking(name):
    q, k, v = qkv(cuda_case())
    calls = {
        "fp32": lambda: flash_attn_func(q.float(), k.float(), v.float()),
        "head dimension of v 520 (at most 512)": lambda: flash_attn_func(
            *[torch.ones(1, 8, 1, 520, dtype=BF16)] * 3
        ),
    }
    return calls[name]


@needs_emulator
@pytest.mark.parametrize("feature", ["fp32", "head dimension of v 520 (at most 512)"])
def test_what_is_missing_is_named(feature):
    call = _lacking(feature)
    with (
        flash_attn.emulator(),
        pytest.raises(RuntimeError, match="the CUDA backend lacks") as error,
    ):
        call()
    assert feature in str(error.value)
    assert str(error.value).endswith("; outside the emulator CPU tensors have it")


@needs_emulator
@pytest.mark.parametrize(
    ("dims", "missing"),
    [((264, 264), "head dimension 264"), ((64, 264), "head dimension of v 264")],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_forward_refuses_gradients_that_the_backward_lacks(dims, missing, is_packed):
    q, k, v = qkv(cuda_case(seqlens=(8, 8), dims=dims))

    def call():
        if not is_packed:
            return flash_attn_func(q, k, v)
        ends = torch.tensor([0, 8], dtype=torch.int32)
        return flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, 8, 8)

    v.requires_grad_()
    expected = call()
    with flash_attn.emulator():
        with pytest.raises(RuntimeError) as error:
            call()
        with torch.no_grad():
            torch.testing.assert_close(call(), expected, rtol=0, atol=2e-2)
    assert str(error.value) == (
        f"the CUDA backend lacks {missing} (at most 256) in the backward, and a gradient is "
        "required: under torch.no_grad() it has the forward"
    )


@needs_emulator
@pytest.mark.parametrize("options", [{"arch": "sm_1"}, {"mode": "lazy"}, {"seed": "x"}])
def test_unknown_options_raise(options):
    with pytest.raises(RuntimeError, match="the emulator"), flash_attn.emulator(**options):
        pass
    assert flash_attn_func(*qkv(cuda_case()), softcap=2.0).isfinite().all()


@needs_emulator
@pytest.mark.parametrize(
    "checks", ["all-race", "all,-proxy_fence,-init_fence", "none+race", "memory"]
)
def test_kinds_of_reports_are_switched(checks):
    q, k, v = qkv(cuda_case())
    with flash_attn.emulator(checks=checks):
        out = flash_attn_func(q, k, v)
    with flash_attn.emulator():
        assert torch.equal(flash_attn_func(q, k, v), out)


@needs_emulator
def test_unknown_kinds_of_reports_list_the_known():
    with (
        pytest.raises(RuntimeError, match="no kind 'fence'") as error,
        flash_attn.emulator(arch="sm_90a", checks="all-fence"),
    ):
        pass
    kinds = str(error.value).split("can be switched:")[1].split(".")[0].split(",")
    assert len(kinds) > 10
    for kind in kinds:
        assert re.search(rf"\b{kind.strip()}\b", flash_attn.emulator.__doc__)


@needs_kernels
def test_emulator_that_is_not_there(tmp_path):
    missing = str(tmp_path / "libgpu_emulator.so")
    with pytest.raises(RuntimeError, match=missing), flash_attn.emulator(library=missing):
        pass


@needs_kernels
def test_cuda_tensors_without_a_driver():
    """Raises, and names the library that is missing. CUDA tensors cannot be made without a GPU, so
    the C interface is asked."""
    code = """
import ctypes
from flash_attn import _library

class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("device_type", ctypes.c_int),
                ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("shape", ctypes.c_int64 * 5), ("stride", ctypes.c_int64 * 5)]

class Score(ctypes.Structure):
    _fields_ = [("softmax_scale", ctypes.c_double), ("softcap", ctypes.c_double),
                ("window_left", ctypes.c_int64), ("window_right", ctypes.c_int64),
                ("is_causal", ctypes.c_int32), ("tensors", ctypes.c_void_p * 3)]

class Forward(ctypes.Structure):
    _fields_ = [("tensors", ctypes.POINTER(Tensor) * 5), ("score", Score),
                ("rest", ctypes.c_byte * 256)]

def tensor(data, dtype, *shape):
    stride = [1]
    for n in reversed(shape[1:]):
        stride.insert(0, stride[0] * n)
    return ctypes.pointer(Tensor(data, dtype, 2, 0, len(shape), shape, tuple(stride)))

half = [tensor(4096 * i, 0, 1, 8, 1, 64) for i in range(1, 5)]
args = Forward((ctypes.POINTER(Tensor) * 5)(*half, tensor(65536, 2, 1, 1, 8)),
               Score(1.0, 0.0, -1, -1))
lib = ctypes.CDLL(str(_library.library_path().parent / "libflash_attn.so.2"))
lib.flash_attn_last_error.restype = ctypes.c_char_p
print(lib.flash_attn_mha_fwd(ctypes.byref(args)), lib.flash_attn_last_error().decode())
"""
    env = {**os.environ, "FLASH_ATTENTION_CUDA_DRIVER": "libcuda-that-is-not-there.so"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("4 CUDA tensors need NVIDIA's driver, which cannot be loaded")
    assert "libcuda-that-is-not-there.so" in result.stdout
