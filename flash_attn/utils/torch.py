"""``custom_fwd`` and ``custom_bwd`` of any torch, for autograd functions under autocast."""

from __future__ import annotations

from typing import Callable

import torch

__all__ = ["custom_amp_decorator", "custom_bwd", "custom_fwd"]


def custom_amp_decorator(dec: Callable, cuda_amp_deprecated: bool) -> Callable:
    """Return a decorator of autocast with a device, "cuda" where none is given.

    Args:
        dec: ``custom_fwd`` or ``custom_bwd``.
        cuda_amp_deprecated: whether ``dec`` takes ``device_type``: those of ``torch.amp`` do, those
            of ``torch.cuda.amp`` before do not.
    """

    def decorator(*args, **kwargs):
        if cuda_amp_deprecated:
            kwargs.setdefault("device_type", "cuda")
        return dec(*args, **kwargs)

    return decorator


if hasattr(torch.amp, "custom_fwd"):
    custom_fwd = custom_amp_decorator(torch.amp.custom_fwd, True)
    custom_bwd = custom_amp_decorator(torch.amp.custom_bwd, True)
else:
    custom_fwd = custom_amp_decorator(torch.cuda.amp.custom_fwd, False)
    custom_bwd = custom_amp_decorator(torch.cuda.amp.custom_bwd, False)
