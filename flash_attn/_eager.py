"""The short way of an eager call that needs nothing from torch's dispatcher.

The dispatcher's way from a public function to a kernel takes longer than attention over a short
cache. It is needed for gradients, torch.compile, tracing, torch.func, tensor subclasses and the
modes of ``torch.utils._python_dispatch``, and it is what the profiler sees; a call without any of
these may go straight to the implementation, with the same result.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Parameter = torch.nn.Parameter
_included_keys = torch._C._dispatch_tls_local_include_set
_profiler_enabled = torch._C._autograd._profiler_enabled
_function_modes = torch._C._len_torch_function_stack
# Other tracers show in their tensors or their modes.
_is_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_is_tracked = torch._C._functorch.is_gradtrackingtensor

# Keys that this thread may add to those of its arguments: all but two ask for something here.
_ACTIVE_KEYS = ~(
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
).raw_repr()


def run(operator, args, wants_all: bool = True):
    """Run an operator the shortest way: here alone is decided whether the dispatcher is needed.

    Args:
        operator: an ``Operator``.
        args: all its arguments, in order; tensors may still be something else.
        wants_all: False: of the results all but the first may be None.

    Returns:
        what the operator returns.

    Raises:
        TypeError: an argument that should be a tensor is not one.
    """
    if (
        _is_compiling()
        or _included_keys().raw_repr() & _ACTIVE_KEYS
        or _function_modes()
        or _profiler_enabled()
        or (requires_grad := _plain_requires_grad(operator, args)) is None
    ):
        operator.check(args)
        return operator.dispatch(args)
    if operator.differentiable and needs_derivative(requires_grad):
        return operator.record(args)
    return operator.kernel(args, wants_all)


def is_plain() -> bool:
    """Whether nobody but the kernels has to do with a call on plain tensors without gradients."""
    return not (
        _is_compiling()
        or _included_keys().raw_repr() & _ACTIVE_KEYS
        or _function_modes()
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _plain_requires_grad(operator, args) -> Optional[bool]:
    """Return whether a tensor requires a gradient, or None.

    None: a tensor that must be given is not, or one is of a subclass, or on another device.
    """
    requires_grad = False
    for x in operator.required_of(args):
        if x.__class__ is not Tensor and x.__class__ is not _Parameter:
            return None
        if x.requires_grad:
            requires_grad = True
    for x in operator.optional_of(args):
        if x is not None:
            if x.__class__ is not Tensor and x.__class__ is not _Parameter:
                return None
            requires_grad = requires_grad or x.requires_grad
    return requires_grad if args[0].is_cpu or args[0].is_cuda else None


def needs_derivative(requires_grad: bool) -> bool:
    """Whether a gradient is wanted, or the derivative in forward mode may be."""
    return forward_ad._current_level >= 0 or (requires_grad and _is_grad_enabled())


def has_derivative(x: Tensor) -> bool:
    """Whether torch.func's transforms or forward mode derive by ``x``."""
    return _is_tracked(x) or _fw_tangent(x) is not None


def refuse_derivatives(name: str, *tensors) -> None:
    """Raise RuntimeError if forward mode or torch.func would derive a tensor's function."""
    if forward_ad._current_level < 0 and not _transforms_active():
        return
    for x in tensors:
        if isinstance(x, Tensor) and has_derivative(x):
            raise RuntimeError(f"{name} has no derivative; flash_attn_varlen_func has")


def refuse_tangents(name: str, *tensors) -> None:
    """Raise RuntimeError if forward mode would derive a tensor's function."""
    if forward_ad._current_level >= 0:
        for x in tensors:
            if isinstance(x, Tensor) and _fw_tangent(x) is not None:
                raise RuntimeError(f"{name} has no forward-mode derivative")


def refuse_shared_randomness(name: str) -> None:
    """Raise RuntimeError under a ``torch.vmap`` whose randomness is not "different"."""
    if not _transforms_active():
        return
    for interpreter in torch._C._functorch.get_interpreter_stack():
        if interpreter.key() != torch._C._functorch.TransformType.Vmap:
            continue
        randomness = torch._C._functorch.CVmapInterpreterPtr(interpreter).randomness()
        if randomness != torch._C._functorch.RandomnessType.Different:
            raise RuntimeError(
                f"vmap of {name} with dropout needs vmap(..., randomness='different'): every call "
                "draws a mask of its own"
            )


def _fw_tangent(x: Tensor):
    return forward_ad.unpack_dual(x).tangent if forward_ad._current_level >= 0 else None
