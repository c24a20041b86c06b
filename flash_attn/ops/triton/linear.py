"""A linear layer with an activation behind it, and the gradient of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from flash_attn._arguments import check_operands, flag
from flash_attn.ops._dense import check_dtypes, check_input, check_layer, check_one_of
from flash_attn.ops.triton.k_activations import (
    get_triton_activation_bwd_kernel,
    get_triton_activation_kernel,
)

__all__ = ["get_configs_io_bound", "init_to_zero", "triton_dgrad_act", "triton_linear_act"]

_ACTIVATIONS = ("id", "gelu", "gelu_approx", "squared_relu", "relu", "leaky_relu")


def init_to_zero(name: str) -> Callable[[dict], Tensor]:
    """Return a function of a kernel's arguments that fills the one of this name with zeros."""
    return lambda arguments: arguments[name].zero_()


def get_configs_io_bound() -> list:
    """Return the configurations that an autotuner is to try: none, there is nothing to tune."""
    return []


def triton_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    activation: str = "id",
    save_act_input: bool = False,
):
    """Compute f(x W^T + b); differentiable.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``, or None.
        activation: f: "id", or the name of an ``Activation``.
        save_act_input: whether to return x W^T + b, too.

    Returns:
        ``(..., out_features)``, or a pair of it and f's input.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes or dtypes do not fit, or there is no such activation.
    """
    save_act_input = flag("save_act_input", save_act_input)
    check_operands({"bias": bias}, x=x, weight=weight)
    check_one_of("activation", activation, _ACTIVATIONS)
    check_input(x)
    check_layer(x.shape[-1], weight, bias)
    check_dtypes(x, weight=weight, bias=bias)
    act_input = F.linear(x, weight, bias)
    out = act_input
    if activation != "id":
        out = get_triton_activation_kernel(activation)(act_input)
    return (out, act_input) if save_act_input else out


def triton_dgrad_act(
    grad_output: Tensor, weight: Tensor, activation: str = "id", act_input: Optional[Tensor] = None
) -> Tensor:
    """Compute (g W) f'(a): the gradient that the linear layer with ``weight`` passes back through
    the activation before it.

    Args:
        grad_output: g, ``(..., out_features)``.
        weight: ``(out_features, in_features)``.
        activation: f: "id", or the name of an ``Activation``.
        act_input: a, ``(..., in_features)``, what f was applied to. "id" needs none.

    Returns:
        ``(..., in_features)``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes or dtypes do not fit, there is no such activation, or it needs
            ``act_input``.
    """
    check_operands({"act_input": act_input}, grad_output=grad_output, weight=weight)
    check_one_of("activation", activation, _ACTIVATIONS)
    if weight.dim() != 2 or grad_output.dim() == 0 or grad_output.shape[-1] != weight.shape[0]:
        raise ValueError(
            "weight must be (out_features, in_features) with grad_output (..., out_features), got "
            f"{tuple(weight.shape)} and {tuple(grad_output.shape)}"
        )
    check_dtypes(grad_output, weight=weight, act_input=act_input)
    grad_input = grad_output @ weight
    if activation == "id":
        return grad_input
    if act_input is None or act_input.shape != grad_input.shape:
        raise ValueError(
            f"activation {activation!r} needs act_input {tuple(grad_input.shape)}, got "
            f"{None if act_input is None else tuple(act_input.shape)}"
        )
    return grad_input * get_triton_activation_bwd_kernel(activation)(act_input)
