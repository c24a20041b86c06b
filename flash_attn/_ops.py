"""The torch operators of this package: fake kernels and registration in ``torch.ops.flash_attn``.

A package that declares an operator of these names by ``torch.library.custom_op`` replaces it in
``torch.ops``; the functions of this package go on with their own.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Callable

import torch

from flash_attn import _buffers as buffers
from flash_attn import _kernels  # gives the operators their kernels
from flash_attn._arguments import refuse_fp8_keys
from flash_attn._functions import (
    BACKWARD,
    FORWARD,
    FP8_OPERATORS,
    KVCACHE,
    KVCACHE_APPEND,
    VARLEN_BACKWARD,
    VARLEN_FORWARD,
)
from flash_attn._schema import Operator

# ------------------------------------------------------------------------------------------------
# Fake kernels: shapes and dtypes alone, for torch.compile and torch.export.


def _fake_attend(operator: Operator, args):
    q, k, v = args[:3]
    refuse_fp8_keys("k", k)
    s_dmask = q.new_empty(0)
    if args[operator.return_softmax]:
        s_dmask = operator.layout.s_dmask(q, k, *args[operator.sequences])
    rng_state = torch.empty(2, dtype=torch.int64, device="cpu")
    return operator.layout.out(q, v), operator.layout.lse(q), s_dmask, rng_state


def _fake_differentiate(operator: Operator, args):
    return operator.layout.softmax_d(args[operator.place["q"]], *args[operator.sequences])


def _fake_attend_cache(operator: Operator, args):
    q, k_cache, v_cache = args[:3]
    refuse_fp8_keys("k_cache", k_cache)
    return buffers.dense_out(q, v_cache), buffers.dense_lse(q)


# ------------------------------------------------------------------------------------------------
# Registration

_library = torch.library.Library("flash_attn", "FRAGMENT")


def _swap(old, new) -> None:
    """Put an operator in another's place wherever a module of this package names it."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("flash_attn.")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _with_all_arguments(operator: Operator, function: Callable) -> Callable:
    """Return a function of a call as the dispatcher makes it, by ``function(args)``."""
    complete = operator.complete
    return lambda *args, **kwargs: function(complete(args, kwargs))


def _into_given(operator: Operator, args):
    """Compute gradients into a caller's tensors, of which autograd is told."""
    softmax_d = operator.kernel(args)
    buffers.raise_versions(*(args[place] for place in operator.written))
    return softmax_d


class _Registration(torch.library.Library):
    """The library of one operator, under its own name or another."""

    def __init__(self, name: str, operator: Operator, fake: Callable, tags: tuple):
        super().__init__("flash_attn", "FRAGMENT")
        self.name, self.operator, self.fake, self.tags = name, operator, fake, tags
        self.autograd = None
        self.define(name + operator.schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        # Implementations read negative views; torch's own way gives up on those written to.
        self.impl(name, torch.library.fallthrough_kernel, "Negative")
        is_backward = operator in (BACKWARD, VARLEN_BACKWARD)
        kernel = partial(_into_given, operator) if is_backward else operator.kernel
        for device in ("CPU", "CUDA"):
            self.impl(name, _with_all_arguments(operator, kernel), device)
        # torch.library.register_fake would give it to an earlier custom_op of this name.
        self._register_fake(name, _with_all_arguments(operator, partial(fake, operator)))
        self.packet = getattr(torch.ops.flash_attn, name)
        operator.overload = self.packet.default

    def set_autograd(self, kernel) -> None:
        """Register the kernel that derives gradients."""
        self.autograd = kernel
        self.impl(self.name, kernel, "Autograd", with_keyset=True)

    def _destroy(self) -> None:
        """Give the name away and go on under another: ``torch.library.custom_op`` calls this."""
        # An operator with any kernel stays known: other packages may hold it, too.
        _library.impl(self.name, torch.library.fallthrough_kernel, "PrivateUse3")
        super()._destroy()
        heir = _Registration("_own" + self.name, self.operator, self.fake, self.tags)
        registered[self.operator.name] = heir
        if self.autograd is not None:
            heir.set_autograd(self.autograd)
        _swap(self.packet, heir.packet)


registered: dict[str, _Registration] = {}


def _register(operator: Operator, fake: Callable, tags: tuple = ()) -> None:
    declared = getattr(torch._library.custom_ops, "OPDEF_TO_LIB", {})
    earlier = declared.pop(f"flash_attn::{operator.name}", None)
    if earlier is not None:
        earlier._destroy()
    registration = _Registration(operator.name, operator, fake, tags)
    declared[f"flash_attn::{operator.name}"] = registered[operator.name] = registration


# Dropout draws from a generator: two equal calls must not be merged, nor one call be run twice.
_RANDOM = (torch.Tag.nondeterministic_seeded,)

for _operator in (FORWARD, VARLEN_FORWARD):
    _register(_operator, _fake_attend, _RANDOM)
for _operator in (BACKWARD, VARLEN_BACKWARD):
    _register(_operator, _fake_differentiate)
for _operator in (KVCACHE, KVCACHE_APPEND):
    _register(_operator, _fake_attend_cache)
for _operator in FP8_OPERATORS:
    _register(_operator, _kernels.fp8_results)
for _operator in (KVCACHE, KVCACHE_APPEND, *FP8_OPERATORS):
    registered[_operator.name].set_autograd(torch.library.fallthrough_kernel)
