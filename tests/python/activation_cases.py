"""Activation functions of tensors amid NaN, for the tests of the CPU and of the emulated GPU."""

from __future__ import annotations

import dataclasses
import functools

import torch
from guard_bands import Guarded
from reference import assert_attention_close
from torch.nn import functional as F

from flash_attn.ops import activations

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FP32, FP16, BF16)
FUNCTIONS = {
    "gelu_approx": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sqrelu": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


@dataclasses.dataclass(frozen=True)
class ActivationCase:
    activation: str
    dtype: torch.dtype
    bias: bool = False
    gate: bool = False
    shape: tuple = (5, 1000)
    before: int = 16
    gap: int = 16

    def __str__(self):
        named = [name for name in ("bias", "gate") if getattr(self, name)]
        shape = "x".join(map(str, self.shape))
        place = f"at{self.before}+{self.gap}"
        return "-".join([self.activation, str(self.dtype)[6:], shape, place, *named])

    def tensors(self):
        """dout, x, bias and y; None: not wanted."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return (2 * torch.randn(shape, generator=generator)).to(self.dtype)

        return (
            normal(*self.shape),
            normal(*self.shape),
            normal(*self.shape[-1:]) if self.bias else None,
            normal(*self.shape) if self.gate else None,
        )


def cases(shapes=((5, 1000),)):
    """Every function, dtype and operand, at places that are aligned and that are not."""
    found = []
    for i, (name, dtype) in enumerate((n, d) for n in FUNCTIONS for d in DTYPES):
        for operands in range(4):
            place = {"before": 16, "gap": 16} if (i + operands) % 2 else {"before": 3, "gap": 5}
            bias, gate = bool(operands & 1), bool(operands & 2)
            found += [ActivationCase(name, dtype, bias, gate, shape, **place) for shape in shapes]
    return found


@functools.cache
def expected(case, dtype):
    """out, dx, dbias and dy by torch in ``dtype``."""
    dout, *inputs = (None if t is None else t.to(dtype) for t in case.tensors())
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    x, bias, y = leaves
    out = FUNCTIONS[case.activation](x if bias is None else x + bias)
    out = out if y is None else out * y
    grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], dout))
    return out.detach(), *(None if t is None else next(grads) for t in leaves)


def check(case: ActivationCase, context) -> None:
    """Forward and backward within ``context()``: values, and what lies beside the tensors."""
    given = [None if t is None else Guarded(t, case.before, case.gap) for t in case.tensors()]
    dout, x, bias, y = (None if g is None else g.x for g in given)
    bias = None if bias is None else bias.contiguous()
    number = list(FUNCTIONS).index(case.activation)
    with context():
        out = activations._forward(x, bias, y, number)
        dx, dy, dbias = activations._backward(dout, x, bias, y, number, case.bias)
    for g in given:
        if g is not None:
            g.assert_untouched()
    actual = out, dx, dbias if case.bias else None, dy if case.gate else None
    both = zip(
        ("out", "dx", "dbias", "dy"), actual, expected(case, FP64), expected(case, case.dtype)
    )
    for name, result, exact, plain in both:
        assert (result is None) == (exact is None)
        if result is not None:
            assert_attention_close(result, exact, plain, name)


FP64 = torch.float64
