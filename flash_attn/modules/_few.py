"""Few elements without gradients, such as the tokens of a decoding step.

To call an operator of the library takes longer than such elements do, and torch's own is called
sooner; what it computes is the same but for rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A row of 2048 for each of 8 sequences: the norm of so many takes torch as long as the library.
_MOST = 1 << 14


def are_few(x: Tensor) -> bool:
    """Whether to leave ``x`` to torch."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.is_cpu and x.numel() <= _MOST


def rms_norm_of_few(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply ``flash_attn.ops.triton.layer_norm.RMSNorm`` without dropout by torch's operator.

    Returns:
        Of x's shape, in the dtype of the norm's weight.
    """
    weight, dtype = norm.weight, norm.weight.dtype
    if norm.zero_centered_weight:
        x, weight = x.float(), weight.float() + 1.0
    elif weight.dtype != x.dtype:
        wider = torch.promote_types(weight.dtype, x.dtype)
        x, weight = x.to(wider), weight.to(wider)
    return F.rms_norm(x, weight.shape, weight, norm.eps).to(dtype)
