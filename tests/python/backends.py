"""The backends that cases run on: the CPU, CUDA kernels on the emulated GPU, CUDA kernels on a
GPU."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

import flash_attn
from flash_attn import _library

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

HAVE_KERNELS = "cuda sm80" in str(_library.lib.kernels())
HAVE_EMULATOR = (_library.library_path().parent / "libgpu_emulator.so").is_file()
needs_kernels = pytest.mark.skipif(not HAVE_KERNELS, reason="built without nvcc")
needs_emulator = pytest.mark.skipif(
    not (HAVE_KERNELS and HAVE_EMULATOR), reason="built without nvcc or the emulated GPU"
)


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where a case runs, and what it can be there."""

    name: str
    choices: dict = dataclasses.field(
        default_factory=dict
    )  # of a case's fields, instead of CHOICES
    cache_choices: dict = dataclasses.field(default_factory=dict)  # the same of cache_cases
    dtype: torch.dtype = FP32  # of small inputs
    max_backward_dim: int = 576
    lse_slack: float = 0.0  # of the exponent function, relative to the largest LSE

    def __str__(self):
        return self.name

    def calls(self, seed=0):
        """A context whose calls of this thread run here; ``seed`` varies how."""
        return contextlib.nullcontext()

    def here(self, x):
        """A tensor, or what is none, on the device that takes calls."""
        return x

    def has_backward(self, dims):
        return max(dims) <= self.max_backward_dim

    @property
    def inputs(self):
        """What small_cases makes for it, of a dtype that it has."""
        return {"dtype": self.dtype, "grad": True}


@dataclasses.dataclass(frozen=True)
class EmulatedBackend(Backend):
    arch: str = "sm_80"

    __str__ = Backend.__str__

    def calls(self, seed=0):
        return self.emulator(mode=("eager", "late", "random")[seed % 3], seed=seed)

    def emulator(self, **options):
        return flash_attn.emulator(arch=self.arch, **options)


class GpuBackend(Backend):
    def here(self, x):
        return x.cuda() if isinstance(x, torch.Tensor) else x


# What the CUDA kernels have, at sizes that the emulated GPU runs in a moment.
CUDA = {
    "choices": {
        "dtype": [FP16, BF16],
        "batch": [1, 1, 2],
        "seqlens": [
            (1, 1), (1, 70), (17, 64), (64, 17), (65, 129), (128, 128), (129, 257), (200, 30),
            (31, 200), (130, 0), (257, 190), (128, 65), (150, 150),
        ],
        "heads": [(1, 1), (2, 1), (4, 2), (3, 1)],
        "dims": [
            (64, 64), (128, 128), (64, 64), (128, 128), (96, 96), (32, 32), (40, 72), (128, 64),
            (8, 120), (33, 50), (1, 1), (192, 128), (192, 192), (256, 256), (160, 160), (77, 203),
            (576, 512), (264, 300),
        ],
        "window_size": [(-1, -1), (-1, -1), (-1, -1), (0, 0), (16, 0), (-1, 7), (50, 30), (70, -1)],
        "softmax_scale": [None, None, None, 0.3, -0.4, 0.0],
    },
    "cache_choices": {
        "dtype": [FP16, BF16],
        "batch": [1, 2, 3],
        "capacity": [60, 130, 300],
        "heads": [(1, 1), (4, 4), (4, 2), (6, 1)],
        "dims": [
            (64, 64), (128, 128), (40, 40), (192, 128), (256, 256), (17, 17), (96, 33), (576, 512),
        ],
        "num_splits": [0, 0, 1, 3],
    },
    "dtype": FP16,
    "max_backward_dim": 256,
    "lse_slack": 2e-6,
}  # fmt: skip

CPU = Backend("cpu")  # on the instruction set in use: the fixture `isa`
EMULATOR = EmulatedBackend("emulator", **CUDA)
GPU = GpuBackend("gpu", **CUDA)
# Whose kernels are those of csrc/flash_attn/src/hopper where they have what a call asks for: most
# of these.
HOPPER = EmulatedBackend(
    "hopper",
    **{
        **CUDA,
        "choices": {
            **CUDA["choices"],
            "seqlens": [
                (65, 70),
                (17, 64),
                (64, 17),
                (65, 129),
                (128, 128),
                (129, 257),
                (200, 30),
                (131, 400),
                (130, 1),
                (257, 190),
                (128, 65),
                (150, 150),
                (400, 129),
                (70, 512),
            ],
            "dims": [
                (64, 64),
                (128, 128),
                (96, 96),
                (192, 128),
                (192, 192),
                (256, 256),
                (32, 32),
                (64, 128),
                (80, 80),
                (40, 72),
                (8, 120),
                (128, 64),
                (160, 160),
                (248, 8),
                (56, 56),
            ],
        },
    },
    arch="sm_90a",
)

# Those that take CPU tensors, as parameters of a test.
OF_CPU_TENSORS = [CPU, pytest.param(EMULATOR, marks=needs_emulator)]
on_each_emulated = pytest.mark.parametrize("backend", [EMULATOR, HOPPER], ids=str)
on_each_backend = pytest.mark.parametrize("backend", OF_CPU_TENSORS, ids=str)


def on_each_backend_with(name, *values):
    """Parameters ``name`` and backend: all values on the CPU, the first alone on the others."""
    pairs = [(value, CPU) for value in values]
    pairs.append(pytest.param(values[0], EMULATOR, marks=needs_emulator))
    return pytest.mark.parametrize((name, "backend"), pairs, ids=str)
