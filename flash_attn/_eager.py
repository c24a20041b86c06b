"""The short way of an eager call that needs nothing from torch's dispatcher.

The dispatcher's way from a public function to a kernel takes longer than attention over a short
cache. It is needed for gradients, torch.compile, tracing, torch.func, tensor subclasses and the
modes of ``torch.utils._python_dispatch``, and it is what the profiler sees; a call without any of
these may go straight to the implementation, with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TENSOR_CLASSES = (Tensor, torch.nn.Parameter)
_included_keys = torch._C._dispatch_tls_local_include_set
_profiler_enabled = torch._C._autograd._profiler_enabled
_function_modes = torch._C._len_torch_function_stack
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_is_tracked = torch._C._functorch.is_gradtrackingtensor

# Keys that this thread may add to those of its arguments: all but two ask for something here.
_ACTIVE_KEYS = ~(
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
).raw_repr()


def needs_no_dispatcher(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the dispatcher would only call the kernel with these tensors, gradients apart."""
    return (
        not _is_compiling()
        and not _included_keys().raw_repr() & _ACTIVE_KEYS
        and not _function_modes()
        and not _profiler_enabled()
        and q.__class__ in _TENSOR_CLASSES
        and k.__class__ in _TENSOR_CLASSES
        and v.__class__ in _TENSOR_CLASSES
        and (q.is_cpu or q.is_cuda)
    )


def needs_no_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether none of these tensors asks for a derivative here, in reverse or forward mode."""
    return forward_ad._current_level < 0 and not (
        _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    )


def refuse_derivatives(name: str, *tensors) -> None:
    """Raise RuntimeError if forward mode or torch.func would derive a tensor's function."""
    if forward_ad._current_level < 0 and not _transforms_active():
        return
    for x in tensors:
        if isinstance(x, Tensor) and (_is_tracked(x) or _fw_tangent(x) is not None):
            raise RuntimeError(f"{name} has no derivative; flash_attn_varlen_func has")


def refuse_tangents(name: str, *tensors) -> None:
    """Raise RuntimeError if forward mode would derive a tensor's function."""
    if forward_ad._current_level >= 0:
        for x in tensors:
            if isinstance(x, Tensor) and _fw_tangent(x) is not None:
                raise RuntimeError(f"{name} has no forward-mode derivative")


def _fw_tangent(x: Tensor):
    return forward_ad.unpack_dual(x).tangent if forward_ad._current_level >= 0 else None
