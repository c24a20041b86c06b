"""Fused operators: torch operators over functions of the library, each made of a few functions.

A ``Fused`` is called with all its arguments by position, of which the first is a tensor. It takes
the short way of ``_eager`` to its kernel where nothing asks for torch's dispatcher, and is
``torch.ops.flash_attn.<name>`` for torch.compile, torch.export and everything else that does.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Callable, Optional

import torch
from torch import Tensor

from flash_attn._arguments import ERRORS, check_optional, check_tensors, explained
from flash_attn._eager import has_derivative, run

_library = torch.library.Library("flash_attn", "FRAGMENT")


class Fused:
    """A fused operator.

    Args:
        schema: ``"name(Tensor x, Tensor? bias, int n) -> Tensor"``, without default values.
        kernel: takes all arguments, allocates the results, calls the library and returns them.
        fake: the same without the call: what torch.compile and torch.export need.
        save: ``save(ctx, args, results)`` keeps what the gradients need.
        backward: ``backward(ctx, *grads)`` returns a gradient or None for each argument. A result
            without a gradient has None for it. None: the operator has no derivative.
        tags: of torch's operator.
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable,
        fake: Callable,
        save: Optional[Callable] = None,
        backward: Optional[Callable] = None,
        tags: tuple = (),
    ):
        parsed = torch._C.parse_schema(f"flash_attn::{schema}")
        self.name = parsed.name.split("::")[1]
        self.names = tuple(argument.name for argument in parsed.arguments)
        kinds = [str(argument.type) for argument in parsed.arguments]
        self._required = [i for i, kind in enumerate(kinds) if kind == "Tensor"]
        self._optional = [i for i, kind in enumerate(kinds) if kind == "Optional[Tensor]"]
        self._function, self._save, self._backward = kernel, save, backward
        self.differentiable = backward is not None
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        for device in ("CPU", "CUDA"):
            _library.impl(self.name, self._kernel_of_dispatcher, device)
        _library._register_fake(self.name, self._on_one_device(fake))
        self.overload = getattr(torch.ops.flash_attn, self.name).default
        if self.differentiable:
            torch.library.register_autograd(
                self.overload, self._pull_back, setup_context=self._setup_context, lib=_library
            )

    def __call__(self, *args):
        results = run(self, args)
        if self.differentiable or results is None or not torch.is_grad_enabled():
            return results
        if not any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return results
        if isinstance(results, Tensor):
            return without_derivative(self.name, (results,))[0]
        return without_derivative(self.name, tuple(results))

    # What ``_eager.run`` wants of an operator.

    def required_of(self, args) -> list:
        """Return the tensors of a call that must be given."""
        return [args[i] for i in self._required]

    def optional_of(self, args) -> list:
        """Return those that may be None."""
        return [args[i] for i in self._optional]

    def check(self, args) -> None:
        """Raise TypeError for the first argument that should be a tensor and is not."""
        check_tensors(**{self.names[i]: args[i] for i in self._required})
        check_optional(**{self.names[i]: args[i] for i in self._optional})

    def kernel(self, args, wants_all: bool = True):
        """Run the operator without a thought of gradients."""
        args = [x.resolve_neg() if isinstance(x, Tensor) and x.is_neg() else x for x in args]
        try:
            with torch.no_grad():
                return self._function(*args)
        except ERRORS as error:
            raise explained(error, dict(zip(self.names, args))) from None

    def _on_one_device(self, fake: Callable) -> Callable:
        """Return ``fake`` with a check: torch calls it for real tensors beside one on meta, too."""

        def checked(*args):
            for name, x in zip(self.names, args):
                if isinstance(x, Tensor) and name != "rng_state" and x.device != args[0].device:
                    raise ValueError(
                        f"{name} must be on {self.names[0]}'s device, {args[0].device}, got "
                        f"{x.device}"
                    )
            return fake(*args)

        return checked

    def _kernel_of_dispatcher(self, *args):
        self.check(args)  # torch lets None pass for a tensor
        return self.kernel(args)

    def record(self, args):
        """Run the kernel so that gradients can follow."""
        return _Recorded.apply(self, *args)

    def dispatch(self, args):
        """Call torch's operator; raise RuntimeError where it lacks what is asked for."""
        if not torch.compiler.is_compiling():
            for x in (*self.required_of(args), *self.optional_of(args)):
                if isinstance(x, Tensor) and has_derivative(x):
                    raise RuntimeError(
                        f"{self.name} has a gradient, but no derivative by torch.func or in "
                        "forward mode"
                    )
        return self.overload(*args)

    def _setup_context(self, ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        self._save(ctx, inputs, output)

    def _pull_back(self, ctx, *grads) -> tuple:
        if all(g is None for g in grads):
            return (None,) * len(self.names)
        return without_derivative(self.name, self._backward(ctx, *grads))


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator, *args):
        results = operator.kernel(args)
        operator._setup_context(ctx, args, results)
        ctx.operator = operator
        return results

    @staticmethod
    def backward(ctx, *grads):
        return None, *ctx.operator._pull_back(ctx, *grads)


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, differentiable, *gradients):
        ctx.name = name
        return tuple(None if x is None else x.detach() for x in gradients)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.name} has no second derivative")


def without_derivative(name: str, gradients: tuple) -> tuple:
    """Return gradients, some of them None, whose own backward raises RuntimeError.

    ``name``: of what has no second derivative.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return _WithoutDerivative.apply(name, torch.empty(0, requires_grad=True), *gradients)


def without_autocast(x: Tensor):
    """Return a context without autocast on the device of ``x``, which may have none (meta)."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def as_matrix(x: Tensor) -> Tensor:
    """Return a tensor as (rows, cols), cols its last dimension with stride 1.

    It is copied only if it has no such view.
    """
    if x.dim() < 2:
        x = x.reshape(1, -1)
    elif x.dim() > 2:
        x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def new_like(x: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor with the shape, dtype and device of ``x``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
