"""The kernels' calls of a ring, of all its processes in turn: on the CPU, and on the emulated GPU,
whose arguments (parts of tensors, of softmax_lse, biases of keys) the other tests do not see."""

from __future__ import annotations

import contextlib

import pytest
import torch
from backends import needs_emulator
from reference import assert_attention_close, attention_and_gradients
from small_cases import randn

import flash_attn
from flash_attn.distributed import _calls, layout
from flash_attn.distributed._blocks import visible_blocks

SIZE, SEQLEN, HEADS, HEADS_K, DIM = 2, 40, 4, 2, 32
BACKENDS = ["cpu", pytest.param("cuda", marks=needs_emulator)]
CASES = {
    "causal": {"causal": True},
    "window": {"window_size": (7, 3)},
    "alibi": {"causal": True, "alibi_slopes": "heads"},
    "alibi, full, of each sequence": {"alibi_slopes": "batch"},
    # |softmax_lse| above 1024: the backward looks for a reference of its own (far_rows.h).
    "far scores": {"causal": True, "softmax_scale": 300.0},
}


def ring_in_turn(x, window, scores, kind):
    """Each process' (positions, out, lse, dq), and dk and dv summed over them, by the calls."""
    held = layout.shares(SEQLEN, SIZE, kind)
    where = [layout.indices_of(s) for s in held]
    results, sums = {}, [torch.zeros(x["k"].shape) for _ in range(2)]
    for mine, rows in zip(held, where):
        q, dout = (x[n][:, rows].contiguous() for n in ("q", "dout"))
        dlse = x["dlse"][..., rows].contiguous()
        calls = []
        for theirs, places in zip(held, where):
            blocks = visible_blocks(mine, theirs, *window, scores.slopes is not None)
            keys = [x[n][:, places].contiguous() for n in "kv"]
            calls += [(call, places, keys) for call in _calls.dense_calls(blocks)]
        merged = _calls.Merged(1, q.shape, (len(q), HEADS, len(rows)), q.device)
        for call, _, keys in calls:
            merged.add(call.rows, *call.forward(scores, q, *keys, None))
        out, lse = merged.result(q.dtype, None)
        saved = {"dout": dout, "q": q, "out": out, "softmax_lse": lse, "dlse": dlse}
        total = _calls.Sum(1, q.shape, q.device)
        for call, places, keys in calls:
            dq, *gradients = call.backward(scores, saved, *keys, None)
            total.add(dq, call.rows)
            for part, whole in zip(gradients, sums):
                whole[:, places[call.keys]] += part.float()
        for name, part in (("out", out), ("dq", total.result(q.dtype))):
            results.setdefault(name, torch.empty_like(x["q"]))[:, rows] = part
        results.setdefault("lse", torch.empty_like(x["dlse"]))[..., rows] = lse
    return {**results, "dk": sums[0].to(x["k"].dtype), "dv": sums[1].to(x["v"].dtype)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("case", CASES)
def test_calls_of_all_processes_are_the_whole(case, kind, backend):
    options = dict(CASES[case])
    shapes = {"q": HEADS, "k": HEADS_K, "v": HEADS_K, "dout": HEADS}
    x = {n: randn(2, SEQLEN, h, DIM, seed=h, dtype=torch.float16) for n, h in shapes.items()}
    x["dlse"] = randn(2, HEADS, SEQLEN, seed=9)
    slopes = options.get("alibi_slopes")
    if slopes is not None:
        shape = (HEADS,) if slopes == "heads" else (2, HEADS)
        slopes = options["alibi_slopes"] = randn(*shape, seed=8).abs() / 4
    left, right = options.get("window_size", (-1, -1))
    scores = _calls.Scores(0.0, options.get("softmax_scale", DIM**-0.5), 0.0, slopes)
    window = (left, 0 if options.get("causal") else right)
    with flash_attn.emulator() if backend == "cuda" else contextlib.nullcontext():
        actual = ring_in_turn(x, window, scores, kind)
    inputs = {n: x[n] for n in "qkv"}
    exact, plain = (
        attention_and_gradients(inputs, options, x["dout"], x["dlse"], dtype)
        for dtype in (torch.float64, torch.float16)
    )
    for name, result in actual.items():
        assert_attention_close(result, exact[name], plain[name], name)
