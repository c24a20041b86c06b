"""Calls of the C interface with CUDA tensors, some of whose index tensors have an element out of
range: the host cannot see it, the kernels must.

    FLASH_ATTENTION_CUDA_DRIVER=libgpu_emulator.so python unchecked_indices.py [DEVICE CALLS...]

runs the cases of CALLS, by default all, on an emulated GPU, whose memory ends with each tensor, and
prints a JSON object: for each name of a case what three calls returned, one with the bad element
and two without, and what was wrong with their results.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from ctypes import POINTER, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p

import torch

from flash_attn import _library

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
DTYPES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.uint8: 5,
}


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
DESCALES = "q_descale k_descale v_descale"


class Forward(ctypes.Structure):
    _fields_ = [
        *tensors("q k v out softmax_lse"), ("score", Score), ("p_dropout", c_double),
        *tensors("rng_state s_dmask cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table"),
        ("max_seqlen_q", c_int64), ("max_seqlen_k", c_int64), ("zero_tensors", c_int32),
        ("num_splits", c_int32), *RUN, *tensors(DESCALES),
    ]  # fmt: skip


class Backward(ctypes.Structure):
    _fields_ = [
        *tensors("dout q k v out softmax_lse dq dk dv softmax_d dlse ds_aux dattn_bias"),
        ("score", Score), ("p_dropout", c_double), *tensors("rng_state"),
        ("deterministic", c_int32), *tensors("cu_seqlens_q cu_seqlens_k"),
        ("max_seqlen_q", c_int64), ("max_seqlen_k", c_int64), ("zero_tensors", c_int32), *RUN,
    ]  # fmt: skip


class Cache(ctypes.Structure):
    _fields_ = [
        *tensors("q k_cache v_cache k v out softmax_lse"), ("score", Score),
        *tensors("cache_seqlens rotary_cos rotary_sin cache_batch_idx cache_leftpad block_table"),
        ("is_rotary_interleaved", c_int32), ("num_splits", c_int32), *RUN,
        *tensors(DESCALES),
    ]  # fmt: skip


class Device:
    """A device of the driver, through its own functions."""

    def __init__(self, number=0):
        self.number = number
        self.driver = ctypes.CDLL(os.environ["FLASH_ATTENTION_CUDA_DRIVER"])
        context = c_void_p()
        self("cuInit", 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        self("cuCtxPushCurrent_v2", context)
        self.allocations = []

    def __call__(self, function, *args):
        result = getattr(self.driver, function)(*args)
        assert result == 0, (function, result)

    def put(self, x):
        """A tensor of the C interface: a copy of ``x`` whose allocation ends where it does."""
        pointer = c_void_p()
        self("cuMemAlloc_v2", ctypes.byref(pointer), c_size_t(x.numel() * x.element_size()))
        self.allocations.append(pointer)
        stride = tuple(x.contiguous().stride())
        place = 2, self.number
        tensor = Tensor(pointer, DTYPES[x.dtype], *place, x.dim(), tuple(x.shape), stride)
        self.write(tensor, x)
        return tensor

    def write(self, tensor, x):
        count = c_size_t(x.numel() * x.element_size())
        x = x.contiguous()
        self("cuMemcpyHtoD_v2", c_void_p(tensor.data), c_void_p(x.data_ptr()), count)

    def get(self, tensor, like):
        x = torch.empty_like(like)
        self("cuMemcpyDtoH_v2", c_void_p(x.data_ptr()), c_void_p(tensor.data),
             c_size_t(x.numel() * x.element_size()))  # fmt: skip
        return x

    def checks(self, kinds):
        self("gpuEmulatorSetOption", self.number, b"checks", kinds.encode())

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

    def __init__(self, paged, seqlen_q, num_splits=0, dims=(64, 64)):
        self.scalars = {"is_rotary_interleaved": 1, "num_splits": num_splits}
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
            "q": normal(3, seqlen_q, 2, dims[0]),
            "k_cache": normal(*shape, 1, dims[0]),
            "v_cache": normal(*shape, 1, dims[1]),
            "k": normal(3, 2, 1, dims[0]),
            "v": normal(3, 2, 1, dims[1]),
            "rotary_cos": normal(max(48, 40 + seqlen_q), 8),
            "rotary_sin": normal(max(48, 40 + seqlen_q), 8),
            "out": torch.zeros(3, seqlen_q, 2, dims[1], dtype=torch.float16),
            "softmax_lse": torch.zeros(3, 2, seqlen_q),
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
    """Packed sequences of 5, 0 and 70 or 7 queries over 30, 20 and 100 keys; 5 rows of none."""

    function, arguments = "flash_attn_mha_varlen_fwd", Forward

    def __init__(self, paged, dropout=False, longest=(70, 100)):
        last = 5 + longest[0]
        self.rows = ((0, 5), (5, 5), (5, last))
        self.scalars = {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
        if dropout:
            self.scalars["p_dropout"] = 0.3
        self.written = ("out", "softmax_lse", *(["s_dmask"] if dropout else []))
        shape = (12, 16, 1, 64) if paged else (150, 1, 64)
        self.tensors = {
            "cu_seqlens_q": int32(0, 5, 5, last),
            "cu_seqlens_k": int32(0, 30, 50, 150),
            "seqused_k": int32(30, 10, 100),
            "leftpad_k": int32(0, 2, 7),
            "q": normal(last + 5, 2, 64),
            "k": normal(*shape),
            "v": normal(*shape),
            "out": torch.zeros(last + 5, 2, 64, dtype=torch.float16),
            "softmax_lse": torch.zeros(2, last + 5),
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


class BackwardCall:
    """Packed sequences of 5, 0 and 150 queries over 30, 20 and 300 keys, which several CTAs
    share; 5 rows of none."""

    function, arguments = "flash_attn_mha_varlen_bwd", Backward
    written = ("dq", "dk", "dv", "softmax_d")

    def __init__(self):
        self.scalars = {"max_seqlen_q": 150, "max_seqlen_k": 300}
        self.tensors = {
            "cu_seqlens_q": int32(0, 5, 5, 155),
            "cu_seqlens_k": int32(0, 30, 50, 350),
            "q": normal(160, 2, 64),
            "k": normal(350, 1, 64),
            "v": normal(350, 1, 64),
            "out": normal(160, 2, 64),
            "dout": normal(160, 2, 64),
            "softmax_lse": torch.full((2, 160), 5.0),
            "dq": torch.zeros(160, 2, 64, dtype=torch.float16),
            "dk": torch.zeros(350, 1, 64, dtype=torch.float16),
            "dv": torch.zeros(350, 1, 64, dtype=torch.float16),
            "softmax_d": torch.zeros(2, 160 + 3 * 128),
        }

    def of_sequence(self, results, i):
        rows = slice(*((0, 5), (5, 5), (5, 155))[i])
        keys = slice(*((0, 30), (30, 50), (50, 350))[i])
        return [results["dq"][rows], results["dk"][keys], results["dv"][keys]]

    def others(self, results, sequences):
        return []


CALLS = {
    "kvcache": lambda: KvcacheCall(False, 70),
    "paged_kvcache": lambda: KvcacheCall(True, 70),
    "decode": lambda: KvcacheCall(False, 9),
    "paged_decode": lambda: KvcacheCall(True, 9),
    "shared_decode": lambda: KvcacheCall(False, 9, num_splits=3),
    "paged_shared_decode": lambda: KvcacheCall(True, 9, num_splits=3),
    # Few enough queries for the decode kernel to append.
    "decode_step": lambda: KvcacheCall(False, 3),
    "paged_decode_step": lambda: KvcacheCall(True, 3),
    "paged_wide_decode_step": lambda: KvcacheCall(True, 3, num_splits=3, dims=(576, 512)),
    "wide_decode": lambda: KvcacheCall(False, 9, dims=(264, 72)),
    "paged_wide_decode": lambda: KvcacheCall(True, 9, num_splits=3, dims=(576, 512)),
    "varlen": lambda: VarlenCall(False),
    "long_varlen": lambda: VarlenCall(False, longest=(300, 100)),  # of several tiles
    "varlen_dropout": lambda: VarlenCall(False, True),
    "paged_varlen": lambda: VarlenCall(True),
    "paged_varlen_dropout": lambda: VarlenCall(True, True),
    # Few queries of sequences that might be long.
    "packed_decode": lambda: VarlenCall(False, longest=(7, 600)),
    "paged_packed_decode": lambda: VarlenCall(True, longest=(7, 600)),
    "varlen_bwd": BackwardCall,
}


def outside(*more):
    return (INT32_MIN, -1, *more, INT32_MAX)


DENSE = "kvcache decode shared_decode wide_decode"
PAGED = "paged_kvcache paged_decode paged_shared_decode paged_wide_decode"
STEPS = "paged_decode_step paged_wide_decode_step"
# Calls, tensor, index, values; the sequences that are then without keys or queries.
MALFORMED = [
    # Of 45 cached rows the queries' positions reach beyond the rotary tables.
    (f"{DENSE} {PAGED}", "cache_seqlens", (1,), outside(45, 47), [1]),
    (f"decode_step {STEPS}", "cache_seqlens", (1,), outside(47), [1]),
    (f"{DENSE} {PAGED} decode_step {STEPS}", "cache_leftpad", (2,), outside(40), [2]),
    (f"{DENSE} decode_step", "cache_batch_idx", (0,), outside(4), [0]),
    (f"{PAGED} {STEPS}", "block_table", (1, 1), outside(10), [1]),
    ("varlen varlen_dropout", "cu_seqlens_q", (0,), outside(1), [0]),
    ("varlen varlen_dropout", "cu_seqlens_q", (3,), outside(81), [2]),
    ("long_varlen", "cu_seqlens_q", (3,), outside(311), [2]),
    ("packed_decode", "cu_seqlens_q", (3,), outside(18), [2]),
    ("varlen_bwd", "cu_seqlens_q", (0,), outside(1), [0]),
    ("varlen_bwd", "cu_seqlens_q", (1,), outside(), [0, 1]),
    ("varlen_bwd", "cu_seqlens_q", (2,), outside(4), [1, 2]),
    ("varlen_bwd", "cu_seqlens_q", (3,), outside(161), [2]),
    ("varlen_bwd", "cu_seqlens_k", (0,), outside(1), [0]),
    ("varlen_bwd", "cu_seqlens_k", (2,), outside(), [1, 2]),
    ("varlen_bwd", "cu_seqlens_k", (3,), outside(351), [2]),
    ("varlen packed_decode", "cu_seqlens_q", (1,), outside(), [0, 1]),
    ("varlen packed_decode", "cu_seqlens_q", (2,), outside(4), [1, 2]),
    ("varlen paged_varlen packed_decode", "cu_seqlens_k", (0,), outside(1), [0]),
    ("varlen packed_decode", "cu_seqlens_k", (3,), outside(151), [2]),
    ("varlen paged_varlen", "cu_seqlens_k", (2,), outside(), [1, 2]),
    ("paged_varlen varlen_dropout paged_packed_decode", "seqused_k", (2,), outside(101), [2]),
    ("varlen paged_varlen_dropout packed_decode", "leftpad_k", (2,), outside(101), [2]),
    ("paged_varlen paged_varlen_dropout paged_packed_decode", "block_table", (2, 3),
     outside(12), [2]),
]  # fmt: skip


# Of the backward: sequences that overlap, more of their blocks than there is room for.
OVERLAPPING = [
    ("cu_seqlens_q", (0, 150, 5, 155)),
    ("cu_seqlens_q", (0, 155, 0, 155)),
    ("cu_seqlens_q", (5, 155, 5, 0)),
    ("cu_seqlens_k", (0, 300, 50, 350)),
    ("cu_seqlens_k", (0, 350, 50, 350)),
    ("cu_seqlens_k", (350, 50, 350, 0)),
]


def cases(chosen=CALLS):
    """Those of some calls: ``{name: (call, tensor, index, value, sequences)}``."""
    return {
        f"{call}-{tensor}{list(index)}={value}": (call, tensor, index, value, sequences)
        for calls, tensor, index, values, sequences in MALFORMED
        for call in calls.split()
        if call in chosen
        for value in values
    }


class Runner:
    def __init__(self, device=0):
        self.device = Device(device)
        self.library = ctypes.CDLL(str(_library.library_path().parent / "libflash_attn.so.2"))
        self.library.flash_attn_last_error.restype = ctypes.c_char_p
        self.state = torch.tensor([1, 2])  # of dropout's generator

    def prepare(self, call, stream=None):
        """``(on_device, enqueue)``: the call's tensors by name, and a function that makes the call
        on a stream and returns its status."""
        on_device = {name: self.device.put(x) for name, x in call.tensors.items()}
        pointers = {name: ctypes.pointer(x) for name, x in on_device.items()}
        if call.scalars.get("p_dropout"):
            host = Tensor(self.state.data_ptr(), DTYPES[torch.int64], 1, 0, 1, (2,), (1,))
            pointers["rng_state"] = ctypes.pointer(host)
        arguments = call.arguments(
            **pointers, **call.scalars, stream=stream, score=Score(0.125, 0, -1, -1, 1)
        )

        def enqueue():
            size = c_size_t()
            function = getattr(self.library, call.function + "_workspace_size")
            status = function(ctypes.byref(arguments), ctypes.byref(size))
            if status:
                return status
            if size.value:
                workspace = self.device.put(torch.zeros(size.value, dtype=torch.uint8))
                arguments.workspace, arguments.workspace_bytes = workspace.data, size.value
            return getattr(self.library, call.function)(ctypes.byref(arguments))

        return on_device, enqueue

    def sentence(self):
        """Of the last error."""
        return self.library.flash_attn_last_error().decode()

    def results(self, call, on_device):
        return {n: self.device.get(on_device[n], call.tensors[n]) for n in call.written}

    def run(self, call):
        """``(status, sentence, results)``."""
        on_device, enqueue = self.prepare(call)
        status = enqueue()
        sentence = self.sentence() if status else ""
        results = self.results(call, on_device)
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
    device, *chosen = sys.argv[1:] or [0, *CALLS]
    runner = Runner(int(device))
    expected = {}
    for name in chosen:
        make = CALLS[name]
        status, sentence, expected[name] = runner.run(make())
        assert status == 0, sentence
    report = {}
    for name, (kind, tensor, index, value, sequences) in cases(chosen).items():
        call = CALLS[kind]()
        call.tensors[tensor][index] = value
        *bad, results = runner.run(call)
        wrong = complaints(call, results, expected[kind], tensor, sequences)
        *second, _ = runner.run(CALLS[kind]())
        *third, results = runner.run(CALLS[kind]())
        if not all(torch.equal(results[n], expected[kind][n]) for n in results):
            wrong.append("a later call differs")
        report[name] = {"calls": [bad, second, third], "wrong": wrong}
    if {"varlen", "varlen_bwd"} <= {*chosen}:
        report |= overlapping(runner)
    print(json.dumps(report))


def overlapping(runner):
    """Reports of sequences that overlap."""
    report = {}
    # Two sequences write the same rows.
    runner.device.checks("all-race")
    call = CALLS["varlen"]()
    call.tensors["cu_seqlens_q"] = int32(0, 70, 5, 75)
    report["overlapping"] = [runner.run(call)[:2], runner.run(CALLS["varlen"]())[:2]]
    for tensor, entries in OVERLAPPING:
        call = CALLS["varlen_bwd"]()
        call.tensors[tensor] = int32(*entries)
        results = [runner.run(call)[:2], runner.run(CALLS["varlen_bwd"]())[:2]]
        report[f"overlapping_bwd-{tensor}={entries}"] = results
    return report


if __name__ == "__main__":
    main()
