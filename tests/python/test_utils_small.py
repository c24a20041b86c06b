"""flash_attn.utils.library and flash_attn.utils.torch, without Triton and without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_attn.utils.library import triton_op
from flash_attn.utils.torch import custom_bwd, custom_fwd


def scaled(x: Tensor, factor: float) -> Tensor:
    return x.sin() * factor


@pytest.mark.parametrize(
    "options",
    [{}, {"allow_decomposition": False}, {"schema": "(Tensor x, float factor) -> Tensor"}],
    ids=["default", "opaque", "schema"],
)
def test_operator(options):
    """An operator computes, is differentiable by its rule, and compiles to the same."""
    name = f"test_utils_small::scaled_{len(options)}_{'schema' in options}"
    operator = triton_op(name, mutates_args=(), **options)(scaled)
    operator.register_autograd(
        lambda ctx, grad: (grad * ctx.saved_tensors[0].cos() * ctx.factor, None),
        setup_context=lambda ctx, inputs, output: (
            ctx.save_for_backward(inputs[0]),
            setattr(ctx, "factor", inputs[1]),
        ),
    )
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(operator(x, 3.0), x.sin() * 3.0)
    assert torch.autograd.gradcheck(lambda x: operator(x, 3.0), x)
    compiled = torch.compile(lambda x: operator(x, 3.0) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x.sin() * 3.0 + 1)
    assert torch.library.opcheck(operator, (x.detach(), 3.0))


def test_operator_that_writes():
    def fill(x: Tensor, value: float) -> None:
        x.fill_(value)

    operator = triton_op("test_utils_small::fill", fill, mutates_args={"x"})
    x = torch.zeros(3)
    operator(x, 2.0)
    assert torch.equal(x, torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="mutates_args"):
        triton_op("test_utils_small::fill2", fill, mutates_args={"y"})


@pytest.mark.parametrize("device", [{"device_type": "cpu"}, {}])
def test_custom_fwd_and_bwd(device):
    """A function cast to fp32 under autocast of its device; "cuda" where none is given."""
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        @custom_fwd(cast_inputs=torch.float32, **device)
        def forward(ctx, x):
            seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @custom_bwd(**device)
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return 2 * ctx.saved_tensors[0] * grad

    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Square.apply(x)
    y.sum().backward()
    is_cast = bool(device)
    assert seen == [(torch.float32 if is_cast else torch.bfloat16, not is_cast), False]
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
