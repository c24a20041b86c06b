"""Calls that are captured into CUDA graphs, on the emulated GPU, and replayed on other contents of
the same tensors.

    FLASH_ATTENTION_CUDA_DRIVER=libgpu_emulator.so python captured_calls.py [DEVICE CALLS...]

makes those of unchecked_indices.CALLS, by default all, and prints a JSON object: for each what was
wrong; and the error of the call after a replay that met a page that does not exist.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import c_void_p

import torch
from unchecked_indices import CALLS as UNCHECKED
from unchecked_indices import Runner, int32

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
# S_dmask takes seconds, and once is enough.
CALLS = {name: make for name, make in UNCHECKED.items() if name != "paged_varlen_dropout"}


def with_other_contents(make):
    """The call with other tokens, lengths and pages, and with as many of them."""
    call = make()
    rows = call.tensors["q"].shape[0]
    contents = {
        "cache_seqlens": int32(0, 39, 7),
        "cache_leftpad": int32(0, 9, 7),
        "cache_batch_idx": int32(1, 3, 0),
        "cu_seqlens_q": int32(0, 2, 5, rows - 7),
        "cu_seqlens_k": int32(0, 40, 40, 140),
        "seqused_k": int32(40, 0, 90),
        "leftpad_k": int32(3, 0, 11),
    }
    for name, x in call.tensors.items():
        if name in contents:
            call.tensors[name] = contents[name]
        elif name == "block_table":
            call.tensors[name] = x.flip(0, 1)
        elif name not in call.written:
            call.tensors[name] = x.roll(1, 0)
    return call


class Graph:
    """What is enqueued on a stream, captured."""

    def __init__(self, device, stream, enqueue):
        self.device, self.stream = device, stream
        graph, self.executable = c_void_p(), c_void_p()
        device("cuStreamBeginCapture_v2", stream, RELAXED)
        self.status = enqueue()
        device("cuStreamEndCapture", stream, ctypes.byref(graph))
        device("cuGraphInstantiateWithFlags", ctypes.byref(self.executable), graph, 0)

    def replay(self):
        self.device("cuGraphLaunch", self.executable, self.stream)
        self.device("cuStreamSynchronize", self.stream)


def all_equal(results, others):
    return all(torch.equal(results[name], others[name]) for name in others)


def faults(runner, stream, make):
    """What is wrong with a graph of a call."""
    first, other = make(), with_other_contents(make)
    on_device, enqueue = runner.prepare(first, stream)
    graph = Graph(runner.device, stream, enqueue)
    if graph.status:
        return [runner.sentence()]
    found = []
    if not all_equal(first.tensors, runner.results(first, on_device)):
        found.append("the capture wrote to a tensor")
    replayed = []
    for call in (first, other, first):
        for name, x in call.tensors.items():
            runner.device.write(on_device[name], x)
        graph.replay()
        replayed.append(runner.results(call, on_device))
    runner.device.free()
    eager = [runner.run(call) for call in (first, other)]
    for results, (status, sentence, expected) in zip(replayed, (*eager, eager[0])):
        if status or not all_equal(results, expected):
            found.append(f"a replay differs {sentence}")
    if all_equal(eager[0][2], eager[1][2]):
        found.append("other contents change nothing")
    return found


def error_after_bad_page(runner, stream):
    call = CALLS["paged_decode"]()
    on_device, enqueue = runner.prepare(call, stream)
    graph = Graph(runner.device, stream, enqueue)
    table = call.tensors["block_table"].clone()
    table[1, 1] = len(call.tensors["k_cache"])
    runner.device.write(on_device["block_table"], table)
    graph.replay()
    runner.device.free()
    return runner.run(CALLS["paged_decode"]())[1]


def main():
    device, *chosen = sys.argv[1:] or [0, *CALLS]
    runner = Runner(int(device))
    stream = c_void_p()
    runner.device("cuStreamCreate", ctypes.byref(stream), 0)
    report = {name: faults(runner, stream, CALLS[name]) for name in chosen}
    print(json.dumps({**report, "bad page": error_after_bad_page(runner, stream)}))


if __name__ == "__main__":
    main()
