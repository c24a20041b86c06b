"""Calls of the C interface with CUDA tensors, some of whose index tensors have an element out of
range: the host cannot see it, the kernels must.

    FLASH_ATTENTION_CUDA_DRIVER=libgpu_emulator.so python unchecked_indices.py

runs all of CASES on the emulated GPU, whose memory ends with each tensor, and prints a JSON object:
for each name of a case what three calls returned, one with the bad element and two without, and
what was wrong with their results.
"""

from __future__ import annotations

import ctypes
import json
import os
from ctypes import POINTER, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p

import torch

from flash_attn import _library

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int32: 3, torch.int64: 4}


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("dtype", c_int), ("device_type", c_int), ("device_id", c_int32),
        ("ndim", c_int32), ("shape", c_int64 * 5), ("stride", c_int64 * 5),
    ]  # fmt: skip


def tensors(names):
    return [(name, POINTER(Tensor)) for name in names.split()]


class Score(ctypes.Structure):
    _fields_ = [
        ("softmax_scale", c_double), ("softcap", c_double), ("window_left", c_int64),
        ("window_right", c_int64), ("is_causal", c_int32),
        *tensors("alibi_slopes s_aux attn_bias"),
    ]  # fmt: skip


RUN = [("workspace", c_void_p), ("workspace_bytes", c_size_t), ("stream", c_void_p)]


class Forward(ctypes.Structure):
    _fields_ = [
        *tensors("q k v out softmax_lse"), ("score", Score), ("p_dropout", c_double),
        *tensors("rng_state s_dmask cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table"),
        ("max_seqlen_q", c_int64), ("max_seqlen_k", c_int64), ("zero_tensors", c_int32),
        ("num_splits", c_int32), *RUN,
    ]  # fmt: skip


class Cache(ctypes.Structure):
    _fields_ = [
        *tensors("q k_cache v_cache k v out softmax_lse"), ("score", Score),
        *tensors("cache_seqlens rotary_cos rotary_sin cache_batch_idx cache_leftpad block_table"),
        ("is_rotary_interleaved", c_int32), ("num_splits", c_int32), *RUN,
    ]  # fmt: skip


class Device:
    """Device 0 of the driver, through its own functions."""

    def __init__(self):
        self.driver = ctypes.CDLL(os.environ["FLASH_ATTENTION_CUDA_DRIVER"])
        context = c_void_p()
        self("cuInit", 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self("cuCtxPushCurrent_v2", context)
        self.allocations = []

    def __call__(self, function, *args):
        result = getattr(self.driver, function)(*args)
        assert result == 0, (function, result)

    def put(self, x):
        """A tensor of the C interface: a copy of ``x`` whose allocation ends where it does."""
        count, pointer = x.numel() * x.element_size(), c_void_p()
        self("cuMemAlloc_v2", ctypes.byref(pointer), c_size_t(count))
        self("cuMemcpyHtoD_v2", pointer, c_void_p(x.data_ptr()), c_size_t(count))
        self.allocations.append(pointer)
        return Tensor(
            pointer, DTYPES[x.dtype], 2, 0, x.dim(), tuple(x.shape), tuple(x.contiguous().stride())
        )

    def get(self, tensor, like):
        x = torch.empty_like(like)
        self("cuMemcpyDtoH_v2", c_void_p(x.data_ptr()), c_void_p(tensor.data),
             c_size_t(x.numel() * x.element_size()))  # fmt: skip
        return x

    def free(self):
        while self.allocations:
            self("cuMemFree_v2", self.allocations.pop())


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.float16)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


class KvcacheCall:
    """Three sequences, to each of which two rows are appended, rotated."""

    function, arguments = "flash_attn_mha_fwd_kvcache", Cache
    written = ("out", "softmax_lse", "k_cache", "v_cache")

    def __init__(self, paged):
        self.scalars = {"is_rotary_interleaved": 1}
        self.entries = [[2], [0], [3]]  # batch entries or pages of each sequence
        shape = (4, 48)
        self.tensors = {
            "cache_seqlens": int32(10, 20, 39),
            "cache_leftpad": int32(0, 3, 5),
        }
        if paged:
            self.entries, shape = [[7, 2, 1], [0, 9, 4], [3, 5, 6]], (10, 16)
            self.tensors["block_table"] = int32(*self.entries)
        else:
            self.tensors["cache_batch_idx"] = int32(2, 0, 3)
        self.tensors |= {
            "q": normal(3, 9, 2, 64),
            "k_cache": normal(*shape, 1, 64),
            "v_cache": normal(*shape, 1, 64),
            "k": normal(3, 2, 1, 64),
            "v": normal(3, 2, 1, 64),
            "rotary_cos": normal(48, 8),
            "rotary_sin": normal(48, 8),
            "out": torch.zeros(3, 9, 2, 64, dtype=torch.float16),
            "softmax_lse": torch.zeros(3, 2, 9),
        }

    def of_sequence(self, results, i):
        caches = (results[name][self.entries[i]] for name in ("k_cache", "v_cache"))
        return [results["out"][i], results["softmax_lse"][i], *caches]

    def others(self, results, sequences):
        """What belongs to none of the sequences."""
        mine = {entry for i in sequences for entry in self.entries[i]}
        rest = [i for i in range(len(results["k_cache"])) if i not in mine]
        return [results[name][rest] for name in ("k_cache", "v_cache")]


class VarlenCall:
    """Packed sequences of 5, 0 and 70 queries over 30, 20 and 100 keys; 5 rows of none."""

    function, arguments = "flash_attn_mha_varlen_fwd", Forward
    rows = ((0, 5), (5, 5), (5, 75))

    def __init__(self, paged, dropout):
        self.scalars = {"max_seqlen_q": 70, "max_seqlen_k": 100, "p_dropout": 0.3 * dropout}
        self.written = ("out", "softmax_lse", *(["s_dmask"] if dropout else []))
        shape = (12, 16, 1, 64) if paged else (150, 1, 64)
        self.tensors = {
            "cu_seqlens_q": int32(0, 5, 5, 75),
            "cu_seqlens_k": int32(0, 30, 50, 150),
            "seqused_k": int32(30, 10, 100),
            "leftpad_k": int32(0, 2, 7),
            "q": normal(80, 2, 64),
            "k": normal(*shape),
            "v": normal(*shape),
            "out": torch.zeros(80, 2, 64, dtype=torch.float16),
            "softmax_lse": torch.zeros(2, 80),
        }
        if paged:
            pages = [0, 9, 4, 4, 4, 4, 4], [3, 3, 3, 3, 3, 3, 3], [1, 2, 5, 6, 7, 8, 11]
            self.tensors["block_table"] = int32(*pages)
        if dropout:
            self.tensors["s_dmask"] = torch.zeros(3, 2, 128, 128, dtype=torch.float16)

    def of_sequence(self, results, i):
        rows = slice(*self.rows[i])
        s_dmask = [results["s_dmask"][i]] if "s_dmask" in results else []
        return [results["out"][rows], results["softmax_lse"][:, rows], *s_dmask]

    def others(self, results, sequences):
        return []


CALLS = {
    "kvcache": lambda: KvcacheCall(False),
    "paged_kvcache": lambda: KvcacheCall(True),
    "varlen": lambda: VarlenCall(False, False),
    "varlen_dropout": lambda: VarlenCall(False, True),
    "paged_varlen": lambda: VarlenCall(True, False),
    "paged_varlen_dropout": lambda: VarlenCall(True, True),
}

# Call, tensor, index, values; the sequences that are then without keys or queries.
MALFORMED = [
    # Of 45 cached rows the queries' positions reach beyond the rotary tables.
    ("kvcache paged_kvcache", "cache_seqlens", (1,), (INT32_MIN, -1, 45, 47, INT32_MAX), [1]),
    ("kvcache paged_kvcache", "cache_leftpad", (2,), (INT32_MIN, -1, 40, INT32_MAX), [2]),
    ("kvcache", "cache_batch_idx", (0,), (INT32_MIN, -1, 4, INT32_MAX), [0]),
    ("paged_kvcache", "block_table", (1, 1), (INT32_MIN, -1, 10, INT32_MAX), [1]),
    ("varlen varlen_dropout", "cu_seqlens_q", (0,), (INT32_MIN, -1, 1, INT32_MAX), [0]),
    ("varlen varlen_dropout", "cu_seqlens_q", (3,), (INT32_MIN, -1, 81, INT32_MAX), [2]),
    ("varlen", "cu_seqlens_q", (1,), (INT32_MIN, -1, INT32_MAX), [0, 1]),
    ("varlen", "cu_seqlens_q", (2,), (INT32_MIN, -1, 4, INT32_MAX), [1, 2]),
    ("varlen paged_varlen", "cu_seqlens_k", (0,), (INT32_MIN, -1, 1, INT32_MAX), [0]),
    ("varlen", "cu_seqlens_k", (3,), (INT32_MIN, -1, 151, INT32_MAX), [2]),
    ("varlen paged_varlen", "cu_seqlens_k", (2,), (INT32_MIN, -1, INT32_MAX), [1, 2]),
    ("paged_varlen varlen_dropout", "seqused_k", (2,), (INT32_MIN, -1, 101, INT32_MAX), [2]),
    ("varlen paged_varlen_dropout", "leftpad_k", (2,), (INT32_MIN, -1, 101, INT32_MAX), [2]),
    ("paged_varlen paged_varlen_dropout", "block_table", (2, 3), (INT32_MIN, -1, 12, INT32_MAX),
     [2]),
]  # fmt: skip


def cases():
    """``{name: (call, tensor, index, value, sequences)}``."""
    return {
        f"{call}-{tensor}{list(index)}={value}": (call, tensor, index, value, sequences)
        for calls, tensor, index, values, sequences in MALFORMED
        for call in calls.split()
        for value in values
    }


class Runner:
    def __init__(self):
        self.device = Device()
        self.library = ctypes.CDLL(str(_library.library_path().parent / "libflash_attn.so.2"))
        self.library.flash_attn_last_error.restype = ctypes.c_char_p

    def run(self, call):
        """``(status, sentence, results)``."""
        on_device = {name: self.device.put(x) for name, x in call.tensors.items()}
        pointers = {name: ctypes.pointer(x) for name, x in on_device.items()}
        state = torch.tensor([1, 2])
        pointers_of_host = {}
        if call.scalars.get("p_dropout"):
            host = Tensor(state.data_ptr(), DTYPES[torch.int64], 1, 0, 1, (2,), (1,))
            pointers_of_host["rng_state"] = ctypes.pointer(host)
        arguments = call.arguments(
            **pointers, **pointers_of_host, **call.scalars, score=Score(0.125, 0, -1, -1, 1)
        )
        status = getattr(self.library, call.function)(ctypes.byref(arguments))
        sentence = self.library.flash_attn_last_error().decode() if status else ""
        results = {n: self.device.get(on_device[n], call.tensors[n]) for n in call.written}
        self.device.free()
        return status, sentence, results


def complaints(call, results, expected, tensor, sequences):
    """What is wrong with the results of a call with a bad element of ``tensor``."""
    found = []
    for i in range(3):
        mine = call.of_sequence(results, i)
        if i not in sequences:
            if not all(map(torch.equal, mine, call.of_sequence(expected, i))):
                found.append(f"sequence {i} differs")
        elif tensor == "block_table":
            if not mine[0].isfinite().all():
                found.append(f"sequence {i} is not finite")
        elif tensor != "cu_seqlens_q" and mine[0].any():
            found.append(f"out of sequence {i} is not 0")
    good = [i for i in range(3) if i not in sequences]
    before = call.others(call.tensors, good)
    if not all(map(torch.equal, call.others(results, good), before)):
        found.append("the cache has changed elsewhere")
    return found


def main():
    runner = Runner()
    expected = {}
    for name, make in CALLS.items():
        status, sentence, expected[name] = runner.run(make())
        assert status == 0, sentence
    report = {}
    for name, (kind, tensor, index, value, sequences) in cases().items():
        call = CALLS[kind]()
        call.tensors[tensor][index] = value
        *bad, results = runner.run(call)
        wrong = complaints(call, results, expected[kind], tensor, sequences)
        *second, _ = runner.run(CALLS[kind]())
        *third, results = runner.run(CALLS[kind]())
        if not all(torch.equal(results[n], expected[kind][n]) for n in results):
            wrong.append("a later call differs")
        report[name] = {"calls": [bad, second, third], "wrong": wrong}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
