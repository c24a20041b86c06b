"""Activation functions in one pass over memory, forward and backward.

Tensors have any shape, and are fp16, bf16 or fp32 on the CPU or CUDA; arithmetic is fp32. Results
are contiguous, of the dtype to which torch promotes the arguments. GELU is its tanh approximation
(arXiv:1606.08415). Functions without a gradient of their own say so by their names: ``*_fwd``,
``*_bwd``, ``*_back``.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn._arguments import check_operands
from flash_attn._fused import Fused, as_matrix, new_like
from flash_attn._library import bind

__all__ = [
    "FastGeLUFunction",
    "GeLUFunction",
    "SwiGLUFunction",
    "bias_act_bwd",
    "bias_gelu",
    "bias_gelu_back",
    "bias_gelu_impl",
    "fast_gelu_impl",
    "gated",
    "gelu_bwd",
    "gelu_fwd",
    "relu_bwd",
    "sqrelu_bwd",
    "sqrelu_fwd",
    "swiglu",
    "swiglu_bwd",
    "swiglu_fwd",
]

# The numbers of flash_attn/activations.h.
_GELU_TANH, _RELU, _SQRELU, _SILU, _SIGMOID = range(5)
_NAMED = {
    "gelu_approx": _GELU_TANH,
    "relu": _RELU,
    "sqrelu": _SQRELU,
    "silu": _SILU,
    "sigmoid": _SIGMOID,
}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_run_forward = bind("activation_fwd", "x bias y activation out")
_run_backward = bind("activation_bwd", "dout x bias y activation dx dy dbias")


def _optional_matrix(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else as_matrix(x)


def _vector(x: Optional[Tensor]) -> Optional[Tensor]:
    return x.view(1) if x is not None and x.dim() == 0 else x


def _forward_kernel(x, bias, y, activation):
    out = new_like(x)
    matrices = as_matrix(x), _vector(bias), _optional_matrix(y)
    _run_forward(*matrices, activation, as_matrix(out))
    return out


def _new_gradients(dout, x, bias, y, activation, with_dbias):
    """Return uninitialised dx, dy and dbias; empty ones are not wanted."""
    dy = x.new_empty(0) if y is None else new_like(y)
    shape = x.shape[-1:] if with_dbias else (0,)
    return new_like(x), dy, x.new_empty(shape, dtype=torch.float32)


def _backward_kernel(dout, x, bias, y, activation, with_dbias):
    dx, dy, dbias = _new_gradients(dout, x, bias, y, activation, with_dbias)
    matrices = as_matrix(dout), as_matrix(x), _vector(bias), _optional_matrix(y)
    results = as_matrix(dx), None if y is None else as_matrix(dy)
    _run_backward(*matrices, activation, *results, _vector(dbias) if with_dbias else None)
    return dx, dy, dbias


_backward = Fused(
    "activation_bwd(Tensor dout, Tensor x, Tensor? bias, Tensor? y, int activation, "
    "bool with_dbias) -> (Tensor dx, Tensor dy, Tensor dbias)",
    _backward_kernel,
    _new_gradients,
)


def _save(ctx, args, out) -> None:
    x, bias, y, ctx.activation = args
    ctx.save_for_backward(x, bias, y)


def _gradients(ctx, dout):
    x, bias, y = ctx.saved_tensors
    with_dbias = bias is not None and ctx.needs_input_grad[-3]
    dx, dy, dbias = _backward(dout, x, bias, y, ctx.activation, with_dbias)
    return dx, dbias.to(x.dtype) if with_dbias else None, None if y is None else dy, None


_forward = Fused(
    "activation_fwd(Tensor x, Tensor? bias, Tensor? y, int activation) -> Tensor",
    _forward_kernel,
    lambda x, bias, y, activation: new_like(x),
    _save,
    _gradients,
)


def _promoted(**tensors: Tensor) -> list[Tensor]:
    """Return tensors of one dtype, as torch's arithmetic would have them."""
    check_operands(**tensors)
    given = list(tensors.values())
    first = given[0]
    for (name, x), other in zip(tensors.items(), given):
        if name != "bias" and x.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape {tuple(first.shape)}, got {tuple(other.shape)}"
            )
    dtype = first.dtype
    if dtype in _DTYPES and all(x.dtype == dtype for x in given):
        return given
    has_float8 = any(_is_float8(x.dtype) for x in given)
    for x in () if has_float8 else given:
        dtype = torch.promote_types(dtype, x.dtype)
    if has_float8 or dtype not in _DTYPES:
        name = next(name for name, x in tensors.items() if x.dtype not in _DTYPES)
        raise ValueError(f"{name} must be fp16, bf16 or fp32, got {tensors[name].dtype}")
    return [x.to(dtype) for x in given]


def _is_float8(dtype: torch.dtype) -> bool:
    """Which torch promotes to nothing."""
    return dtype.is_floating_point and dtype.itemsize == 1


def _with_bias(bias: Tensor, **tensors: Tensor) -> list[Tensor]:
    """Return the tensors and bias, of one dtype, bias contiguous."""
    *tensors, bias = _promoted(**tensors, bias=bias)
    if tensors[0].shape[-1:] != bias.shape:
        raise ValueError(
            f"bias must have the shape {tuple(tensors[0].shape[-1:])}, got {tuple(bias.shape)}"
        )
    return [*tensors, bias.contiguous()]


def _unary(x: Tensor, activation: int) -> Tensor:
    (x,) = _promoted(x=x)
    return _forward(x, None, None, activation)


def _unary_bwd(g: Tensor, x: Tensor, activation: int) -> Tensor:
    g, x = _promoted(g=g, x=x)
    return _backward(g, x, None, None, activation, False)[0]


def _number_of(activation: str) -> int:
    if isinstance(activation, str) and activation in _NAMED:
        return _NAMED[activation]
    raise ValueError(f"activation must be one of {', '.join(_NAMED)}, got {activation!r}")


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(y + bias).

    Args:
        y: ``(..., n)``.
        bias: ``(n,)``.

    Differentiable in both. Raises TypeError for what is no tensor, ValueError for a wrong shape.
    """
    y, bias = _with_bias(bias, y=y)
    return _forward(y, bias, None, _GELU_TANH)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Return the gradient of y in ``bias_gelu(y, bias)``: g gelu'(y + bias), of y's shape."""
    g, y, bias = _with_bias(bias, g=g, y=y)
    return _backward(g, y, bias, None, _GELU_TANH, False)[0]


def bias_act_bwd(
    g: Tensor, y: Tensor, bias: Optional[Tensor], *, activation: str = "gelu_approx"
) -> tuple[Tensor, Tensor]:
    """Return the gradients (dx, dbias) of f(y + bias) for the gradient g of its result.

    Args:
        g, y: ``(..., n)``.
        bias: ``(n,)``; None: y has it already.
        activation: f: "gelu_approx", "relu", "sqrelu", "silu" or "sigmoid".

    dx is of the promoted dtype; dbias fp32, summed before dx is rounded, in an order that the shape
    alone decides. Raises TypeError for what is no tensor, ValueError for a wrong shape or name.
    """
    number = _number_of(activation)
    g, y, bias = (*_promoted(g=g, y=y), None) if bias is None else _with_bias(bias, g=g, y=y)
    dx, _, dbias = _backward(g, y, bias, None, number, True)
    return dx, dbias


def gated(x: Tensor, y: Tensor, *, activation: str = "silu") -> Tensor:
    """Return f(x) * y, differentiable in both: SwiGLU, GEGLU, ReGLU, GLU (arXiv:2002.05202).

    Args:
        x, y: of one shape; may be the halves of one tensor, ``chunk(2, dim=-1)``.
        activation: f: "silu", "gelu_approx", "relu", "sqrelu" or "sigmoid".

    Raises TypeError for what is no tensor, ValueError where the shapes differ or for another name.
    """
    number = _number_of(activation)
    x, y = _promoted(x=x, y=y)
    return _forward(x, None, y, number)


def gelu_fwd(x: Tensor) -> Tensor:
    """Return gelu(x)."""
    return _unary(x, _GELU_TANH)


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Return g gelu'(x)."""
    return _unary_bwd(g, x, _GELU_TANH)


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Return 0 where x <= 0, elsewhere g."""
    return _unary_bwd(g, x, _RELU)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """Return relu(x)^2."""
    return _unary(x, _SQRELU)


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Return 2 g relu(x)."""
    return _unary_bwd(g, x, _SQRELU)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """Return silu(x) * y (arXiv:2002.05202), differentiable in both.

    Args:
        x, y: of one shape; may be the halves of one tensor, ``chunk(2, dim=-1)``.

    Raises TypeError for what is no tensor, ValueError where the shapes differ.
    """
    return gated(x, y)


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """Return silu(x) * y."""
    return swiglu(x, y)


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (dx, dy) of ``swiglu(x, y)`` for the gradient g of its result."""
    x, y, g = _promoted(x=x, y=y, g=g)
    return _backward(g, x, None, y, _SILU, False)[:2]


class GeLUFunction(torch.autograd.Function):
    """``bias_gelu``."""

    @staticmethod
    def forward(ctx, input, bias):
        ctx.save_for_backward(input, bias)
        return bias_gelu(input, bias)

    @staticmethod
    def backward(ctx, grad_output):
        input, bias = ctx.saved_tensors
        dx, dbias = bias_act_bwd(grad_output, input, bias)
        return dx.to(input.dtype), dbias.to(bias.dtype)


class FastGeLUFunction(torch.autograd.Function):
    """gelu of one tensor."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return gelu_fwd(input)

    @staticmethod
    def backward(ctx, grad_output):
        return gelu_bwd(grad_output, *ctx.saved_tensors)


class SwiGLUFunction(torch.autograd.Function):
    """``swiglu``."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return swiglu_fwd(x, y)

    @staticmethod
    def backward(ctx, dout):
        x, y = ctx.saved_tensors
        dx, dy = swiglu_bwd(x, y, dout)
        return dx.to(x.dtype), dy.to(y.dtype)


def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(input + bias), as ``bias_gelu``."""
    return bias_gelu(input, bias)


def fast_gelu_impl(input: Tensor) -> Tensor:
    """Return gelu(input), differentiable."""
    return _unary(input, _GELU_TANH)
