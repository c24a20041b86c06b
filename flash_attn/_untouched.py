"""Modules whose work an operator may do in their place."""

from __future__ import annotations

from torch import nn


def is_untouched(module: nn.Module, *kinds: type) -> bool:
    """Whether a call of a module is its class's forward and nothing more.

    Hooks, a forward of its own, subclasses (as parametrization makes) and other modules in its
    place (as adapters are) want to be called.

    Args:
        kinds: classes, one of which must be the module's, not a parent of it.
    """
    if type(module) not in kinds or "forward" in module.__dict__:
        return False
    forward = module._forward_hooks or module._forward_pre_hooks
    return not (forward or module._backward_hooks or module._backward_pre_hooks)
