"""Every CUDA kernel on emulated devices with less shared memory: tools/gpu_launches.py's calls."""

from __future__ import annotations

import functools

import pytest
import torch
from backends import needs_emulator
from scripts import ROOT, import_script

import flash_attn

pytestmark = needs_emulator

launches = import_script(ROOT / "tools" / "gpu_launches.py")
TOLERANCE = {"fp16": 2e-3, "bf16": 1.6e-2}


@functools.cache
def on_device(dtype, name, arch="sm_80", mode="eager"):
    """``(results, counters)``."""
    with flash_attn.emulator(arch, mode=mode) as gpu:
        results = launches.calls(dtype, "cpu")[name]()
    return results, gpu.counters


NAMES = list(launches.calls("bf16", "cpu"))
CALLS = pytest.mark.parametrize("name", NAMES)


def assert_results_are_the_cpus(results, dtype, name):
    expected = launches.calls(dtype, "cpu")[name]()
    for actual, exact in zip(results, expected):
        torch.testing.assert_close(actual.cpu(), exact, rtol=0, atol=TOLERANCE[dtype])


@CALLS
@pytest.mark.parametrize("dtype", launches.DTYPES)
def test_results_are_the_cpus(name, dtype):
    assert_results_are_the_cpus(on_device(dtype, name)[0], dtype, name)


@pytest.mark.parametrize("dtype", launches.DTYPES)
def test_every_kernel_is_called(dtype):
    """Of attention's that generate_kernels.py lists, some by devices with little memory."""
    launched = {
        kernel
        for name in NAMES
        for arch in (("sm_80", "sm_86") if name.startswith("backward d=") else ("sm_80",))
        for kernel in on_device(dtype, name, arch)[1]
    }
    other = next(name for name in launches.DTYPES if name != dtype)
    kernels = launches.generate_kernels.KERNELS
    known = {kernel.name for kernel in kernels if not kernel.kind.operator}
    assert launched == {kernel for kernel in known if f"_{other}" not in kernel}


@CALLS
@pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_86", "bf16"), ("sm_89", "fp16"), ("sm_120", "bf16")]
)
def test_smaller_devices(name, arch, dtype):
    """They have 99 KiB of shared memory for a CTA; sm_120 has no machine code of its own. The same
    kernels give the same bits."""
    actual, counters = on_device(dtype, name, arch, "late")
    expected, kernels = on_device(dtype, name)
    if counters.keys() != kernels.keys():
        assert_results_are_the_cpus(actual, dtype, name)
        return
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
