"""What the functions and layers of ``fused_dense`` are made of: activations, the tokens of a group
of processes, checks, the steps of a backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from flash_attn._arguments import is_plain
from flash_attn.ops.activations import bias_act_bwd, gelu_bwd, gelu_fwd, sqrelu_bwd, sqrelu_fwd
from flash_attn.utils.distributed import (
    all_gather,
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    group_size,
    reduce_scatter,
    reduce_scatter_raw,
    replicate,
)

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_transforms_active = torch._C._are_functorch_transforms_active


def rows_of(x: Tensor) -> Tensor:
    """x (..., features) as (rows, features)."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def has_kernels(x: Tensor) -> bool:
    """Whether ``flash_attn.ops.activations`` computes with x."""
    return x.dtype in _KERNEL_DTYPES and (x.is_cpu or x.is_cuda)


class Activation(NamedTuple):
    """The function between the layers of an MLP.

    ``composed`` computes it from the pre-activation by operations that torch differentiates,
    ``kernel``, if there is one, by one of this library. ``backward(grad, kept)`` is the gradient of
    the pre-activation; kept is the pre-activation, or with ``from_output`` the function's value,
    which says as much. ``name`` is that of ``bias_act_bwd``, which computes it together with its
    sum over rows. ``use_gelu`` is the argument by which
    ``torch._addmm_activation`` computes it; None: it does not.
    """

    composed: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    name: str
    kernel: Optional[Callable[[Tensor], Tensor]] = None
    from_output: bool = False
    use_gelu: Optional[bool] = None

    def forward(self, pre_act: Tensor) -> Tensor:
        """Return its value at the pre-activation; no gradient."""
        is_fused = self.kernel is not None and has_kernels(pre_act)
        return (self.kernel if is_fused else self.composed)(pre_act)

    def of_product(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        """Return its value at x W^T + b, ``(..., out_features)``, in one operation if torch has it.

        torch's fused GELU is the tanh approximation on a GPU alone.
        """
        if bias is None or self.use_gelu is None or (self.use_gelu and not x.is_cuda):
            return self.forward(F.linear(x, weight, bias))
        value = torch._addmm_activation(bias, rows_of(x), weight.t(), use_gelu=self.use_gelu)
        return value.view(*x.shape[:-1], weight.shape[0])

    def gradients(
        self, grad: Tensor, pre_act: Optional[Tensor], value: Optional[Tensor], needs_bias: bool
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Return the gradients of the pre-activation and, as far as it is needed, of its bias.

        That of the value and the first result are ``(rows, features)``; in grad mode, they are
        there to be differentiated again.
        """
        if torch.is_grad_enabled():
            grad = grad.view(value.shape)
            grad = rows_of(torch.autograd.grad(value, pre_act, grad, create_graph=True)[0])
            return grad, grad.sum(0) if needs_bias else None
        kept = value if self.from_output else pre_act
        if needs_bias and has_kernels(kept):  # in one pass
            grad, of_bias = bias_act_bwd(grad, rows_of(kept), None, activation=self.name)
            return grad, of_bias.to(grad.dtype)
        grad = rows_of(self._backward(kept)(grad.view(kept.shape), kept))
        return grad, grad.sum(0) if needs_bias else None

    def _backward(self, kept: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        kernel = _BACKWARD_KERNELS.get(self.name)
        return kernel if kernel is not None and has_kernels(kept) else self.backward


def _gelu_backward(grad: Tensor, pre_act: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, pre_act, approximate="tanh")


def _relu_backward(grad: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, value, 0)


def _sqrelu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _sqrelu_backward(grad: Tensor, pre_act: Tensor) -> Tensor:
    return 2.0 * grad * F.relu(pre_act)


_BACKWARD_KERNELS = {"gelu_approx": gelu_bwd, "sqrelu": sqrelu_bwd}
ACTIVATIONS = {
    "gelu_approx": Activation(
        partial(F.gelu, approximate="tanh"), _gelu_backward, "gelu_approx", gelu_fwd, use_gelu=True
    ),
    "relu": Activation(F.relu, _relu_backward, "relu", from_output=True, use_gelu=False),
    "sqrelu": Activation(_sqrelu, _sqrelu_backward, "sqrelu", sqrelu_fwd),
}


class Tokens(NamedTuple):
    """How a layer whose weight is divided by rows gets its tokens, and what becomes of their
    gradient.

    ``start_*`` return a tensor and the handle to wait for before it is read; in grad mode, a tensor
    to differentiate.
    """

    process_group: object
    sequence_parallel: bool

    @property
    def is_alone(self) -> bool:
        return group_size(self.process_group) == 1

    def composed(self, x: Tensor) -> Tensor:
        if self.is_alone:
            return x
        return (all_gather if self.sequence_parallel else replicate)(x, self.process_group)

    def start_gather(self, x: Tensor):
        if torch.is_grad_enabled():
            return self.composed(x), None
        if self.is_alone or not self.sequence_parallel:
            return x, None
        return all_gather_raw(x, self.process_group, async_op=True)

    def start_reduce(self, grad: Tensor):
        if self.is_alone:
            return grad, None
        if torch.is_grad_enabled():
            reduce = reduce_scatter if self.sequence_parallel else all_reduce
            return reduce(grad, self.process_group), None
        reduce = reduce_scatter_raw if self.sequence_parallel else all_reduce_raw
        return reduce(grad, self.process_group, async_op=True)


ALONE = Tokens(process_group=None, sequence_parallel=False)


def finished(started) -> Tensor:
    tensor, handle = started
    if handle is not None:
        handle.wait()
    return tensor


def _described(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"


def check_one_of(name: str, value, choices) -> None:
    is_one = isinstance(value, (int, str)) and not isinstance(value, bool) and value in choices
    if not is_one:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_input(x: Tensor, tokens: Tokens = ALONE) -> None:
    """Raise ValueError if x has no features, or over a process group no tokens."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (..., in_features), got {_described(x)}")
    if x.dim() == 1 and not tokens.is_alone:
        raise ValueError(
            f"x must be (tokens, ..., in_features) over a process group, got {_described(x)}"
        )


def check_layer(in_features: int, weight: Tensor, bias: Optional[Tensor], layer: str = "") -> None:
    """Raise ValueError if x W^T + b has no meaning for the shapes."""
    if weight.dim() != 2 or weight.shape[1] != in_features:
        raise ValueError(
            f"weight{layer} must be (out_features, in_features) with {in_features} in_features, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias{layer} must be ({weight.shape[0]},) as weight{layer} is "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}"
        )


def _is_autocast_on(x: Tensor) -> bool:
    device_type = x.device.type  # the meta device has no autocast
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def check_dtypes(x: Tensor, **parameters: Optional[Tensor]) -> None:
    """Raise ValueError for dtypes that torch multiplies under autocast alone."""
    if _is_autocast_on(x):
        return
    for name, tensor in parameters.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(
                f"x and {name} must have the same dtype where autocast is off, got {x.dtype} and "
                f"{tensor.dtype}"
            )


def as_autocast(x: Tensor, *parameters: Optional[Tensor]) -> list[Optional[Tensor]]:
    """The tensors in the dtype in which autocast multiplies them: its own, but for fp64."""
    if not _is_autocast_on(x):
        return [x, *parameters]
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *parameters)]


def in_dtype_of_forward(backward):
    """Run a backward without autocast: its tensors have the dtype in which it is to compute."""

    @wraps(backward)
    def wrapped(ctx, grad_output, *grads):
        if not _is_autocast_on(grad_output):
            return backward(ctx, grad_output, *grads)
        with torch.autocast(grad_output.device.type, enabled=False):
            return backward(ctx, grad_output, *grads)

    return wrapped


def is_for_torch(*tensors: Optional[Tensor]) -> bool:
    """Whether torch is to take the computation apart, which it cannot do to autograd functions."""
    if torch.compiler.is_compiling() or _transforms_active() or forward_ad._current_level >= 0:
        return True
    return not all(t is None or is_plain(t) for t in tensors)


def input_gradient(tokens: Tokens, grad: Tensor, weight: Tensor, residual: tuple):
    """Start the gradient of x from that of x W^T. A GPU's product adds that of the residual branch
    to its sums; the CPU's would start from it and round at its size."""
    if residual and tokens.is_alone and grad.is_cuda:
        return torch.addmm(rows_of(residual[0]), grad, weight), None
    return tokens.start_reduce(grad @ weight)


def with_residual(tokens: Tokens, started, x_shape, residual: tuple) -> Tensor:
    """Finish it."""
    grad = finished(started).view(x_shape)
    if not residual or (tokens.is_alone and grad.is_cuda):
        return grad
    return grad + residual[0] if torch.is_grad_enabled() else grad.add_(residual[0])


def parameter_gradients(grad: Tensor, x: Optional[Tensor], needs_weight: bool, needs_bias: bool):
    """Gradients of W and b from that of x W^T + b, ``(rows, out_features)``."""
    weight = grad.t() @ rows_of(x) if needs_weight else None
    return weight, grad.sum(0) if needs_bias else None


def first_layer(activation: Activation, x, weight, bias, keeps_pre_act: bool):
    """The first layer's pre-activation, None where it is not needed, and value."""
    if activation.from_output or not keeps_pre_act:
        return None, activation.of_product(x, weight, bias)
    pre_act = F.linear(x, weight, bias)
    return pre_act, activation.forward(pre_act)


def kept_of(activation: Activation, pre_act, value, checkpoint_lvl: int, needs_value: bool):
    """What is kept of the first layer for the backward."""
    if checkpoint_lvl == 2:
        return None, None
    is_kept = activation.from_output or (checkpoint_lvl == 0 and needs_value)
    return pre_act, value if is_kept else None


def again(activation: Activation, gathered, weight, bias, kept: list, needs_value: bool):
    """The first layer's pre-activation and value, as far as the backward needs them, from what was
    kept or computed again. In grad mode all of it, as what was kept has no graph."""
    pre_act, value = kept
    if torch.is_grad_enabled():
        pre_act = F.linear(finished(gathered), weight, bias)
        return pre_act, activation.composed(pre_act)
    if pre_act is None and value is None:
        return first_layer(activation, finished(gathered), weight, bias, keeps_pre_act=True)
    if value is None and needs_value:
        value = activation.forward(pre_act)
    return pre_act, value


def check_options(activation, checkpoint_lvl, heuristic) -> None:
    check_one_of("activation", activation, tuple(ACTIVATIONS))
    check_one_of("checkpoint_lvl", checkpoint_lvl, (0, 1, 2))
    check_one_of("heuristic", heuristic, ("auto", *range(-1, 5)))


def reduced(x: Tensor, process_group, sequence_parallel: bool) -> Tensor:
    """The sum of all processes' results: this process's tokens of it, or all."""
    if group_size(process_group) == 1:
        return x
    return (reduce_scatter if sequence_parallel else all_reduce)(x, process_group)
