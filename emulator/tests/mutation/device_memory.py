"""The forward attention kernel of csrc/flash_attn/src/sm80 on tensors in device memory.

    FLASH_ATTENTION_CUDA_DRIVER=libgpu_emulator.so python device_memory.py complete|partial

The tensors come from cuMemAlloc and reach the kernel as CUDA tensors do. `complete`: all of q, k
and v is written before; `partial`: all but the last row of v. Prints the largest error, or fails
with the emulator's report.
"""

import ctypes
import os
import sys

import torch

from flash_attn._library import bind

SEQLEN, HEADS, HEAD_DIM = 200, 2, 64
SHAPE = (1, SEQLEN, HEADS, HEAD_DIM)
CUDA_DEVICE, FLOAT, BFLOAT = 2, 2, 4  # of DLPack


class Tensor(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class DeviceTensor:
    """A dense tensor in memory of cuMemAlloc; it speaks DLPack."""

    def __init__(self, shape, code, bits):
        count = 1
        for extent in shape:
            count *= extent
        self.bytes = count * bits // 8
        self.pointer = ctypes.c_uint64()
        check(cuda.cuMemAlloc_v2(ctypes.byref(self.pointer), ctypes.c_size_t(self.bytes)))
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        device = (ctypes.c_int32 * 2)(CUDA_DEVICE, 0)
        self._tensor = Tensor(
            self.pointer.value, device, len(shape), code, bits, 1, self._shape, None, 0, None, None
        )

    def write(self, values, count=None):
        size = ctypes.c_size_t(self.bytes if count is None else count)
        check(cuda.cuMemcpyHtoD_v2(self.pointer, ctypes.c_void_p(values.data_ptr()), size))

    def __dlpack_device__(self):
        return CUDA_DEVICE, 0

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return new(ctypes.addressof(self._tensor), b"dltensor", None)


def check(result):
    if result != 0:
        raise RuntimeError(f"CUresult {result}")


cuda = ctypes.CDLL(os.environ["FLASH_ATTENTION_CUDA_DRIVER"])
context = ctypes.c_void_p()
check(cuda.cuInit(0))
check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
check(cuda.cuCtxSetCurrent(context))

torch.manual_seed(1)
values = [torch.randn(SHAPE).bfloat16() for _ in range(3)]
q, k, v, out = (DeviceTensor(SHAPE, BFLOAT, 16) for _ in range(4))
lse = DeviceTensor((1, HEADS, SEQLEN), FLOAT, 32)
for tensor, value in zip((q, k), values, strict=False):
    tensor.write(value)
v.write(values[2], v.bytes - (2 * HEAD_DIM if sys.argv[1] == "partial" else 0))

scale = HEAD_DIM**-0.5
try:
    names = "q k v out softmax_lse softmax_scale window_left window_right"
    bind("mha_fwd", names)(q, k, v, out, lse, scale, -1, -1)
except RuntimeError:
    report = ctypes.create_string_buffer(4096)
    cuda.gpuEmulatorLastReport(0, report, ctypes.c_size_t(len(report)))
    sys.exit(report.value.decode())

result = torch.empty(SHAPE, dtype=torch.bfloat16)
size = ctypes.c_size_t(out.bytes)
check(cuda.cuMemcpyDtoH_v2(ctypes.c_void_p(result.data_ptr()), out.pointer, size))
x, y, z = (value.double().transpose(1, 2) for value in values)
expected = ((x @ y.mT * scale).softmax(-1) @ z).transpose(1, 2)
print(f"error {(result.double() - expected).abs().max():.4f}")
