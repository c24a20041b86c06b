"""Activations and their derivatives, element by element, on tensors of any floating dtype.

``name(x)`` is the function, ``name_grad(x)`` its derivative at x.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Activation",
    "cosh",
    "gelu",
    "gelu_approx",
    "gelu_approx_grad",
    "gelu_grad",
    "get_triton_activation_bwd_kernel",
    "get_triton_activation_kernel",
    "leaky_relu",
    "leaky_relu_grad",
    "relu",
    "relu_grad",
    "squared_relu",
    "squared_relu_grad",
    "tanh",
]

tanh = torch.tanh
cosh = torch.cosh
relu = F.relu
leaky_relu = F.leaky_relu
gelu = F.gelu


class Activation(str, Enum):
    """Names of the activations."""

    SquaredReLU = "squared_relu"
    GeLU = "gelu"
    GeLUApprox = "gelu_approx"
    LeakyReLU = "leaky_relu"
    ReLU = "relu"


def relu_grad(x: Tensor) -> Tensor:
    """Return 1 where x > 0, otherwise 0."""
    return (x > 0).to(x.dtype)


def leaky_relu_grad(x: Tensor) -> Tensor:
    """Return 1 where x > 0, otherwise 0.01."""
    return torch.where(x > 0, 1.0, 0.01).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)**2."""
    return F.relu(x).square()


def squared_relu_grad(x: Tensor) -> Tensor:
    """Return 2 max(x, 0)."""
    return 2.0 * F.relu(x)


def gelu_grad(x: Tensor) -> Tensor:
    """Return the derivative of GELU, x times the normal distribution function of x."""
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x)


def gelu_approx(x: Tensor) -> Tensor:
    """Return GELU's tanh approximation."""
    return F.gelu(x, approximate="tanh")


def gelu_approx_grad(x: Tensor) -> Tensor:
    """Return the derivative of GELU's tanh approximation."""
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")


_FUNCTIONS = {
    Activation.SquaredReLU: (squared_relu, squared_relu_grad),
    Activation.GeLU: (gelu, gelu_grad),
    Activation.GeLUApprox: (gelu_approx, gelu_approx_grad),
    Activation.LeakyReLU: (leaky_relu, leaky_relu_grad),
    Activation.ReLU: (relu, relu_grad),
}


def _functions(activation):
    try:
        return _FUNCTIONS[Activation(activation)]
    except ValueError:
        names = ", ".join(repr(a.value) for a in Activation)
        raise ValueError(f"activation must be one of {names}, got {activation!r}") from None


def get_triton_activation_kernel(
    activation: Optional[Activation],
) -> Optional[Callable[[Tensor], Tensor]]:
    """Return the function of tensors that computes the activation, given by its name; None for
    None.

    Raises:
        ValueError: there is none of the name.
    """
    return None if activation is None else _functions(activation)[0]


def get_triton_activation_bwd_kernel(
    activation: Optional[Activation],
) -> Optional[Callable[[Tensor], Tensor]]:
    """Return the function of tensors that computes the activation's derivative, to be multiplied by
    the gradient; None for None.

    Raises:
        ValueError: there is none of the name.
    """
    return None if activation is None else _functions(activation)[1]
