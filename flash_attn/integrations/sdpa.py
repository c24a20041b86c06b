"""``torch.nn.functional.scaled_dot_product_attention`` on the CPU by this package.

PyTorch has a place for this: on the CPU its function ends in the operator
``aten::_scaled_dot_product_flash_attention_for_cpu`` and, for gradients, in that operator's
backward, and an operator's kernel can be replaced. PyTorch still chooses: dropout, a mask that
needs a gradient and differing head dims of q and v go to its own plain implementation and never
arrive here. What arrives and has no counterpart here (fp64, head dims above 576) is handed to the
kernel that was replaced.

``torch.nn.attention.varlen.varlen_attn``, which has no kernel for the CPU, gets one by the same
registration (``varlen.py``).

    from flash_attn.integrations import sdpa

    sdpa.register()  # for the process
    sdpa.unregister()
    with sdpa.registered():  # for a while
        ...

``torch.nn.attention.activate_flash_attention_impl("flash_attn")`` does the same where PyTorch has
it; it needs no import but ``flash_attn``.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from flash_attn._buffers import dense_lse, dense_softmax_d, maybe_contiguous
from flash_attn._library import bind
from flash_attn.integrations import varlen

__all__ = ["is_registered", "register", "registered", "unregister"]

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = _FORWARD + "_backward"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 576  # FLASH_ATTN_MAX_HEAD_DIM of the C header

_NUMBERS = "p_dropout softmax_scale is_causal window_left window_right softcap"
_attend = bind("mha_fwd", f"q k v out softmax_lse attn_bias {_NUMBERS}")
_differentiate = bind(
    "mha_bwd", f"dout q k v out softmax_lse dq dk dv softmax_d attn_bias {_NUMBERS}"
)


class _Call(NamedTuple):
    """One call in this package's layout, (batch, seqlen, nheads, headdim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_bias: Optional[Tensor]
    numbers: tuple  # as _NUMBERS


def _is_supported(query: Tensor, dropout_p: float, is_causal: bool, attn_mask) -> bool:
    mask_dtypes = (query.dtype, torch.float32)
    return (
        dropout_p == 0.0
        and query.dtype in _DTYPES
        and query.shape[-1] <= _MAX_HEAD_DIM
        and (attn_mask is None or (attn_mask.dtype in mask_dtypes and not is_causal))
    )


def _translate(query, key, value, is_causal, attn_mask, scale) -> _Call:
    q, k, v = (maybe_contiguous(x.transpose(1, 2)) for x in (query, key, value))
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    # PyTorch aligns a causal mask to the top left corner, this package to the bottom right.
    window_right = seqlen_q - seqlen_k if is_causal and seqlen_q > seqlen_k else -1
    if is_causal and seqlen_q < seqlen_k:
        k, v = k[:, :seqlen_q], v[:, :seqlen_q]
    if attn_mask is not None and attn_mask.dim() == 2:
        attn_mask = attn_mask[None, None]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    numbers = (0.0, scale, is_causal and window_right < 0, -1, window_right, 0.0)
    return _Call(q, k, v, attn_mask, numbers)


def _forward(query, key, value, is_causal, attn_mask, scale):
    call = _translate(query, key, value, is_causal, attn_mask, scale)
    out = torch.empty_like(query)
    softmax_lse = dense_lse(call.q)
    _attend(call.q, call.k, call.v, out.transpose(1, 2), softmax_lse, call.attn_bias, *call.numbers)
    # Compiled graphs expect the strides of PyTorch's own kernel.
    return out, softmax_lse.transpose(1, 2).contiguous().transpose(1, 2)


def _zeros(x: Tensor) -> Tensor:
    """Zeros (batch, seqlen, nheads, headdim) for the gradient of x with heads before seqlen."""
    batch, heads, seqlen, headdim = x.shape
    return x.new_zeros((batch, seqlen, heads, headdim))


def _backward(grad_out, query, key, value, out, softmax_lse, is_causal, attn_mask, scale):
    call = _translate(query, key, value, is_causal, attn_mask, scale)
    dq, dk, dv = (_zeros(x) for x in (query, key, value))
    _differentiate(
        maybe_contiguous(grad_out.transpose(1, 2)),
        call.q,
        call.k,
        call.v,
        out.transpose(1, 2),
        softmax_lse.contiguous(),
        dq,
        dk[:, : call.k.shape[1]],
        dv[:, : call.v.shape[1]],
        dense_softmax_d(call.q),
        call.attn_bias,
        *call.numbers,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class _Registration:
    """Two replaced kernels of PyTorch's; ``remove()`` puts the old ones back."""

    def __init__(self):
        if not hasattr(torch.library, "get_kernel"):
            raise RuntimeError(
                "flash_attn.integrations.sdpa needs torch.library.get_kernel; "
                f"PyTorch {torch.__version__} is too old"
            )
        self._own_forward = torch.library.get_kernel(f"aten::{_FORWARD}", "CPU")
        self._own_backward = torch.library.get_kernel(f"aten::{_BACKWARD}", "CPU")
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # PyTorch warns about every replaced kernel; here that is the purpose.
            warnings.simplefilter("ignore", UserWarning)
            self._library.impl(_FORWARD, self._run_forward, "CPU", with_keyset=True)
            self._library.impl(_BACKWARD, self._run_backward, "CPU", with_keyset=True)
            varlen.add_kernels(self._library)

    def _run_forward(
        self,
        keyset,
        query,
        key,
        value,
        dropout_p=0.0,
        is_causal=False,
        *,
        attn_mask=None,
        scale=None,
    ):
        if _is_supported(query, dropout_p, is_causal, attn_mask):
            return _forward(query, key, value, is_causal, attn_mask, scale)
        return self._own_forward.call_boxed(
            keyset, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )

    def _run_backward(
        self,
        keyset,
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        dropout_p,
        is_causal,
        *,
        attn_mask=None,
        scale=None,
    ):
        tensors = (grad_out, query, key, value, out, logsumexp)
        if _is_supported(query, dropout_p, is_causal, attn_mask):
            return _backward(*tensors, is_causal, attn_mask, scale)
        return self._own_backward.call_boxed(
            keyset, *tensors, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )

    def remove(self) -> None:
        self._library._destroy()


_registration: Optional[_Registration] = None


def is_registered() -> bool:
    """Whether ``scaled_dot_product_attention`` on the CPU runs on this package now."""
    return _registration is not None


def register() -> None:
    """Run ``scaled_dot_product_attention`` on the CPU on this package, forward and backward.

    fp16, bf16 and fp32, (batch, nheads, seqlen, headdim), with ``is_causal`` (aligned to the top
    left corner, as PyTorch has it), ``attn_mask``, ``scale`` and ``enable_gqa``. The rest goes to
    PyTorch as before. ``torch.nn.attention.varlen`` gets kernels for the CPU. Calling it again is
    harmless.

    Raises:
        RuntimeError: PyTorch has no ``torch.library.get_kernel``.
    """
    global _registration
    if _registration is None:
        _registration = _Registration()


def unregister() -> None:
    """Give ``scaled_dot_product_attention`` back to PyTorch, if it was taken."""
    global _registration
    if _registration is not None:
        _registration.remove()
        _registration = None


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Context in which ``scaled_dot_product_attention`` runs on this package."""
    was_registered = is_registered()
    register()
    try:
        yield
    finally:
        if not was_registered:
            unregister()


class Handle:
    """What torch.nn.attention's registry keeps of an activated implementation."""

    def remove(self) -> None:
        """Deactivate it."""
        unregister()
