"""Runs axpy.ptx on the emulated GPU: python axpy.py libgpu_emulator.so axpy.ptx"""

import ctypes
import sys

import numpy as np

cuda = ctypes.CDLL(sys.argv[1])
DEVICE = 0  # an A100; 1 is an H100


def check(result):
    if result != 0:
        report = ctypes.create_string_buffer(4096)
        cuda.gpuEmulatorLastReport(DEVICE, report, ctypes.c_size_t(len(report)))
        raise RuntimeError(f"CUresult {result}: {report.value.decode()}")


context, module, kernel = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
check(cuda.cuInit(0))
check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), DEVICE))
check(cuda.cuCtxSetCurrent(context))
with open(sys.argv[2], "rb") as file:
    check(cuda.cuModuleLoadData(ctypes.byref(module), file.read()))
check(cuda.cuModuleGetFunction(ctypes.byref(kernel), module, b"axpy"))


def launch(y, x, a, n):
    """Arrays are used where they are, once their memory is registered."""
    for array in (y, x):
        check(cuda.cuMemHostRegister_v2(array.ctypes, ctypes.c_size_t(array.nbytes), 0))
    arguments = [array.ctypes.data_as(ctypes.c_void_p) for array in (y, x)]
    arguments += [ctypes.c_float(a), ctypes.c_int(n)]
    pointers = (ctypes.c_void_p * 4)(*(ctypes.addressof(argument) for argument in arguments))
    grid = ((n + 127) // 128, 1, 1)
    try:
        check(cuda.cuLaunchKernel(kernel, *grid, 128, 1, 1, 0, None, pointers, None))
    finally:
        for array in (y, x):
            check(cuda.cuMemHostUnregister(array.ctypes))


y, x = np.ones(1000, np.float32), np.arange(1000, dtype=np.float32)
launch(y, x, 0.5, 1000)
np.testing.assert_array_equal(y, 1 + 0.5 * x)

# One element too many: an error that says where, and the process lives on.
try:
    launch(y, x, 0.5, 1001)
    raise AssertionError("not noticed")
except RuntimeError as error:
    print(error)

check(cuda.gpuEmulatorSetOption(DEVICE, b"mode", b"late"))
table = ctypes.create_string_buffer(1 << 16)
launch(y, x, 0.5, 1000)
cuda.gpuEmulatorCountersTable(DEVICE, table, ctypes.c_size_t(len(table)))
print(table.value.decode())
