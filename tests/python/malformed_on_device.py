"""Malformed calls of the C interface with CUDA tensors, beside the same calls with CPU tensors.

    FLASH_ATTENTION_CUDA_DRIVER=libgpu_emulator.so python malformed_on_device.py EXAMPLES

makes EXAMPLES random calls of each function of the library, most of them broken, and prints a JSON
object: for each function how many calls raised and how many returned with CUDA tensors, and the
calls that did otherwise than they should: their number and what they said on the CPU and there.
"""

from __future__ import annotations

import ctypes
import json
import random
import re
import sys
from ctypes import POINTER, c_int32, c_int64, c_size_t, c_uint8, c_uint16, c_uint64, c_void_p

import numpy as np
import torch
from malformed_calls import ENTRIES, break_argument
from unchecked_indices import Device

from flash_attn import _library

CUDA_DEVICE = 2  # of DLPack
CODES = {  # of DLPack, with the number of bits
    torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.float32: (2, 32), torch.float64: (2, 64),
    torch.int8: (0, 8), torch.uint8: (1, 8), torch.int32: (0, 32), torch.int64: (0, 64),
    torch.bool: (6, 8), torch.complex64: (5, 64), torch.float8_e4m3fn: (10, 8),
}  # fmt: skip
ERRORS = (RuntimeError, TypeError, ValueError, OverflowError)
# What the host finds in the elements of index tensors that it can read, and kernels in others.
OF_CONTENTS = re.compile(
    r"\[\d+\]|must start at 0|must not decrease|ends at|longer than the max_seqlen|appends twice"
    r"|exceeds the|max\(seqlens_k\)|addressable by|cos/sin seqlen"
)
LACKS = "the CUDA backend lacks"
EARLIER = "an earlier call on CUDA device 0 was given values out of range"


class Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [
        ("data", c_void_p), ("device", c_int32 * 2), ("ndim", c_int32), ("code", c_uint8),
        ("bits", c_uint8), ("lanes", c_uint16), ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)), ("byte_offset", c_uint64), ("manager", c_void_p),
        ("deleter", c_void_p),
    ]  # fmt: skip


class DeviceTensor:
    """What a CPU tensor would be at an address of device memory; it speaks DLPack."""

    def __init__(self, x, storage):
        code, bits = CODES[x.dtype]
        self._shape = (c_int64 * max(x.dim(), 1))(*x.shape)
        self._strides = (c_int64 * max(x.dim(), 1))(*x.stride())
        data = storage + x.storage_offset() * x.element_size()
        device = (c_int32 * 2)(CUDA_DEVICE, 0)
        self._tensor = Managed(
            data, device, x.dim(), code, bits, 1, self._shape, self._strides, 0, None, None
        )

    def __dlpack_device__(self):
        return CUDA_DEVICE, 0

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [c_void_p, ctypes.c_char_p, c_void_p]
        return new(ctypes.addressof(self._tensor), b"dltensor", None)


def has_memory(x):
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta


class Memory:
    """Copies of tensors' storages on the device: one for all tensors that share it."""

    def __init__(self, device):
        self.device, self.storages = device, {}

    def address(self, storage):
        """As far from a multiple of 16 as the original."""
        begin, size, shift = storage.data_ptr(), storage.nbytes(), storage.data_ptr() % 16
        if begin not in self.storages:
            pointer = c_void_p()
            self.device("cuMemAlloc_v2", ctypes.byref(pointer), c_size_t(size + 16))
            self.device.allocations.append(pointer)
            self.storages[begin] = pointer.value + shift, size
            source, target = c_void_p(begin), c_void_p(pointer.value + shift)
            if size:
                self.device("cuMemcpyHtoD_v2", target, source, c_size_t(size))
        return self.storages[begin][0]

    def put(self, name, x):
        """rng_state stays on the host, where the library wants it."""
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        if not has_memory(x) or name == "rng_state":
            return x
        return DeviceTensor(x, self.address(x.untyped_storage()))

    def differs(self):
        """Whether a storage on the device is no longer what the original is."""
        for begin, (pointer, size) in self.storages.items():
            copy = (c_uint8 * size)()
            if size:
                self.device("cuMemcpyDtoH_v2", copy, c_void_p(pointer), c_size_t(size))
            if bytes(copy) != ctypes.string_at(begin, size):
                return True
        return False


def sentence_of(entry, arguments):
    """Of a call's error; "" if it returns. torch's own go on with addresses of functions."""
    try:
        entry.call(arguments)
    except ERRORS as error:
        return str(error).splitlines()[0]
    return ""


def is_right(host, device):
    """Whether a call with CUDA tensors may end so, where it ends so on the CPU."""
    if device == host:
        return True
    if host == "":
        return LACKS in device
    return bool(OF_CONTENTS.search(host)) and (device == "" or LACKS in device)


def malformed_call(entry, r):
    """Arguments that DLPack can tell: a negative view has its sign elsewhere."""
    while True:
        arguments = entry.draw(r)
        for _ in range(r.choice([0, 1, 1, 1, 2, 4])):
            break_argument(r, arguments)
        if not any(isinstance(x, torch.Tensor) and x.is_neg() for x in arguments.values()):
            return arguments


def compare(entry, device, seed):
    """``(host, device)``: sentences of the call with CPU tensors and with CUDA tensors; the
    latter's has a remark if it raised and wrote all the same."""
    arguments = malformed_call(entry, random.Random(seed))
    memory = Memory(device)
    on_device = {name: memory.put(name, x) for name, x in arguments.items()}
    sentence = sentence_of(entry, on_device)
    if sentence.startswith(EARLIER):  # of the call before; it has been told now
        sentence = sentence_of(entry, on_device)
    if sentence and memory.differs():
        sentence += " (but memory has changed)"
    host = sentence_of(entry, arguments)
    device.free()
    return host, sentence


def main():
    device = Device()
    _library.lib.set_allocator(lambda size, *_: Memory(device).put("", torch.empty(size).byte()))
    report = {}
    for entry in ENTRIES:
        if not entry.name.startswith("lib."):
            continue
        results = [compare(entry, device, seed) for seed in range(int(sys.argv[1]))]
        report[entry.name] = {
            "raised": sum(on_device != "" for _, on_device in results),
            "returned": sum(on_device == "" for _, on_device in results),
            "wrong": [(seed, *x) for seed, x in enumerate(results) if not is_right(*x)],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
