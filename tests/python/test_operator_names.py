"""Other packages declare operators of the same names: copies of FlashAttention-2's interface do."""

from __future__ import annotations

import subprocess
import sys

import pytest

DECLARE = """
import torch

@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def theirs(q: torch.Tensor, scale: float) -> torch.Tensor:
    return q * scale

@theirs.register_fake
def _(q, scale):
    return torch.empty_like(q)

@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq",))
def their_backward(dout: torch.Tensor, dq: torch.Tensor) -> torch.Tensor:
    return dout * 3
"""

OURS_WORK = """
import torch
import flash_attn
from flash_attn import flash_attn_interface as interface

def attend(q, k, v):
    return flash_attn.flash_attn_func(q, k, v, causal=True)

q, k, v = inputs = [torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3)]
arguments = (0.0, 0.3, True, -1, -1, 0.0, None, False)
out = attend(*inputs)
gradients = torch.autograd.grad(out.sum(), inputs)
heads_first = [x.transpose(1, 2) for x in inputs]
expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
expected = expected.transpose(1, 2)
torch.testing.assert_close(out, expected)
for a, e in zip(gradients, torch.autograd.grad(expected.sum(), inputs)):
    torch.testing.assert_close(a, e)
compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs)
assert torch.equal(compiled, out)
for a, e in zip(torch.autograd.grad(compiled.sum(), inputs), gradients):
    assert torch.equal(a, e)
direct = interface._flash_attn_forward(q, k, v, *arguments)[0]
assert torch.equal(interface._wrapped_flash_attn_forward(q, k, v, *arguments)[0], direct)
"""

THEIRS_WORK = """
x = torch.ones(3)
assert torch.equal(theirs(x, 2.0), x * 2)
assert torch.equal(torch.ops.flash_attn._flash_attn_forward(x, 2.0), x * 2)
assert torch.equal(torch.ops.flash_attn._flash_attn_backward(x, x.clone()), x * 3)
run = torch.compile(lambda x: torch.ops.flash_attn._flash_attn_forward(x, 2.0), backend="aot_eager")
assert torch.equal(run(x), x * 2)
"""

# A reference from before, which other packages keep, is their operator now, and no crash.
HELD = """
import torch
import flash_attn
held = torch.ops.flash_attn._flash_attn_forward.default
"""
STALE = """
assert torch.equal(held(torch.ones(3), 2.0), torch.full((3,), 2.0))
"""

ORDERS = {
    "declared twice, after the import": 2 * (OURS_WORK + DECLARE + THEIRS_WORK) + OURS_WORK,
    "declared before the import": DECLARE + OURS_WORK,
    "held": HELD + DECLARE + STALE + THEIRS_WORK,
}


@pytest.mark.parametrize("order", ORDERS)
def test_operators_of_the_same_names(order):
    run = subprocess.run([sys.executable, "-c", ORDERS[order]], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
