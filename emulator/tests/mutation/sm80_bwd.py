"""The backward kernel of csrc/flash_attn/src/sm80, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/sm80_bwd.py

Three CTAs that add to the same dQ, several visits each; blocks that the mask cuts and rows beyond
the end; one kernel that holds two blocks of queries and one that holds one.
"""

import os

import torch

import flash_attn

QUERIES, KEYS, HEAD_DIMS = 200, 300, (64, 96)


def _inputs(head_dim):
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, n, 1, head_dim) for n in (QUERIES, KEYS, KEYS, QUERIES)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def _reference(q, k, v, dout):
    leaves = [x.double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    q, k, v = leaves
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    gradients = torch.autograd.grad(scores.softmax(-1) @ v, leaves, dout.double().transpose(1, 2))
    return [x.transpose(1, 2) for x in gradients]


# Entered for good: the tool sets the options that change.
flash_attn.emulator("sm_80", library=os.environ.get("GPU_EMULATOR_LIBRARY"), threads=1).__enter__()
_CASES = []
for _head_dim in HEAD_DIMS:
    *_leaves, _dout = _inputs(_head_dim)
    _expected = _reference(*_leaves, _dout)
    _leaves = [x.requires_grad_() for x in _leaves]
    _CASES.append((flash_attn.flash_attn_func(*_leaves, causal=True), _leaves, _dout, _expected))


def run() -> bool:
    for out, leaves, dout, expected in _CASES:
        gradients = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        if any((x.double() - y).abs().max() > 0.05 for x, y in zip(gradients, expected)):
            return False
    return True
