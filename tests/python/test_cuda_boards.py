"""Every CUDA kernel on emulated devices of all kinds: tools/gpu_launches.py's calls."""

from __future__ import annotations

import functools

import pytest
import torch
from backends import needs_emulator
from scripts import ROOT, import_script

import flash_attn

pytestmark = needs_emulator

launches = import_script(ROOT / "tools" / "gpu_launches.py")
TOLERANCE = {"fp16": 2e-3, "bf16": 1.6e-2, "fp32": 1e-5}
# Of fused operators alone: of results beyond 1, of which there are sums over rows.
RELATIVE_TOLERANCE = {"fp16": 1e-3, "bf16": 8e-3, "fp32": 1e-5}


@functools.cache
def on_device(dtype, name, arch="sm_80", mode="eager"):
    """``(results, counters)``."""
    with flash_attn.emulator(arch, mode=mode) as gpu:
        results = launches.calls(dtype, "cpu")[name]()
    return results, gpu.counters


NAMES = {dtype: list(launches.calls(dtype, "cpu")) for dtype in launches.DTYPES}
CALLS = pytest.mark.parametrize(("dtype", "name"), [(d, name) for d in NAMES for name in NAMES[d]])
CALLS_OF_BF16 = pytest.mark.parametrize("name", NAMES["bf16"])


def assert_results_are_the_cpus(results, dtype, name):
    expected = launches.calls(dtype, "cpu")[name]()
    relative = RELATIVE_TOLERANCE[dtype] if name.startswith("operator") else 0
    for actual, exact in zip(results, expected):
        torch.testing.assert_close(actual.cpu(), exact, rtol=relative, atol=TOLERANCE[dtype])


@CALLS
def test_results_are_the_cpus(dtype, name):
    assert_results_are_the_cpus(on_device(dtype, name)[0], dtype, name)


def test_every_kernel_is_called():
    """Of those that generate_kernels.py lists, some by devices with little memory, some by H100."""
    of_hopper = {key: ["sm_90a"] for key in ("dense d", "decode of 20 rows d", "latent decode d")}
    others = {"backward d": ["sm_86", "sm_90a"], **of_hopper}
    launched = {
        kernel
        for dtype in NAMES
        for name in NAMES[dtype]
        for arch in ["sm_80", *others.get(name.split("=")[0], [])]
        for kernel in on_device(dtype, name, arch)[1]
    }
    for call in launches.calls_of_fp8("cpu").values():
        with flash_attn.emulator("sm_90a") as gpu:
            call()
        launched |= gpu.counters.keys()
    assert launched == {kernel.name for kernel in launches.generate_kernels.KERNELS}


@CALLS_OF_BF16
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("sm_86", "bf16"), ("sm_89", "fp16"), ("sm_120", "bf16"), ("sm_90a", "bf16")],
)
def test_other_devices(name, arch, dtype):
    """Smaller ones have 99 KiB of shared memory for a CTA; sm_120 has no machine code of its own;
    sm_90a has kernels of its own for a part. The same kernels give the same bits."""
    actual, counters = on_device(dtype, name, arch, "late")
    expected, kernels = on_device(dtype, name)
    if counters.keys() != kernels.keys():
        assert_results_are_the_cpus(actual, dtype, name)
        return
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
