"""Gradients of the forward operators.

They are differentiable in q, k, v, s_aux and attn_bias, through both out and softmax_lse. The
autograd kernels are written by hand because ``torch.library.register_autograd`` does not accept
keyword-only tensors.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import torch

from flash_attn import _kernels as kernels
from flash_attn import _ops
from flash_attn._buffers import new_gradient
from flash_attn._eager import is_plain, needs_no_dispatcher


class _Operators(NamedTuple):
    """A forward operator and its backward.

    The arguments after q, k, v begin alike in both: tensors of the sequences, numbers,
    alibi_slopes.
    """

    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    forward_kernel: Callable
    backward_kernel: Callable
    num_sequence_tensors: int
    alibi_slopes: int  # its place


_DENSE = _Operators(
    torch.ops.flash_attn._flash_attn_forward.default,
    torch.ops.flash_attn._flash_attn_backward.default,
    kernels.forward,
    kernels.backward,
    num_sequence_tensors=0,
    alibi_slopes=6,
)
_VARLEN = _Operators(
    torch.ops.flash_attn._flash_attn_varlen_forward.default,
    torch.ops.flash_attn._flash_attn_varlen_backward.default,
    kernels.varlen_forward,
    kernels.varlen_backward,
    num_sequence_tensors=2,
    alibi_slopes=10,
)
# Of the varlen operator's arguments after q, k, v: how many have no default, and the defaults of
# the others. The dispatcher leaves out trailing arguments that equal their default.
_VARLEN_REQUIRED = 7
_VARLEN_DEFAULTS = (-1, -1, 0.0, None, False, None, None, None, False, 0)
_VARLEN_FORWARD_ONLY = slice(12, 15)  # block_table, leftpad_k, seqused_k


class _Attention(torch.autograd.Function):
    """A forward operator's result with the gradient of its backward operator."""

    @staticmethod
    def forward(ctx, operators, keyset, q, k, v, s_aux, attn_bias, *args):
        if keyset is None:  # without the dispatcher
            results = operators.forward_kernel(q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = operators.forward.redispatch(
                    keyset, q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias
                )
        out, softmax_lse, s_dmask, rng_state = results
        sequences = args[: operators.num_sequence_tensors]
        alibi_slopes = args[operators.alibi_slopes]
        ctx.save_for_backward(
            q, k, v, out, softmax_lse, rng_state, s_aux, attn_bias, alibi_slopes, *sequences
        )
        ctx.operators = operators
        ctx.numbers = args[operators.num_sequence_tensors : operators.alibi_slopes]
        ctx.forward_only = any(x is not None for x in args[_VARLEN_FORWARD_ONLY])
        ctx.mark_non_differentiable(s_dmask, rng_state)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, dout, dlse, _ds_dmask, _drng_state):
        with torch.no_grad():
            gradients = _gradients(ctx, dout, dlse)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _refuse_second_derivative(gradients)
        return None, None, *gradients, *(None,) * (len(ctx.needs_input_grad) - 7)


def _gradients(ctx, dout, dlse):
    """Return the gradients of q, k, v, s_aux and attn_bias; dout or dlse may be None."""
    if ctx.forward_only:
        raise RuntimeError("flash_attn has no backward with block_table, leftpad_k or seqused_k")
    if dout is None and dlse is None:
        return (None,) * 5
    q, k, v, out, softmax_lse, rng_state, s_aux, attn_bias, alibi_slopes, *sequences = (
        ctx.saved_tensors
    )
    dq, dk, dv = new_gradient(q), new_gradient(k), new_gradient(v)
    ds_aux = dattn_bias = None
    if s_aux is not None:
        ds_aux = new_gradient(s_aux, torch.float32)
    if ctx.needs_input_grad[6]:
        dattn_bias = new_gradient(attn_bias, torch.float32)
    if dout is None:
        dout = torch.zeros_like(out)
    operators = ctx.operators
    run = operators.backward_kernel if needs_no_dispatcher(dout, q, v) else operators.backward
    run(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        *sequences,
        *ctx.numbers,
        alibi_slopes,
        True,
        rng_state,
        dlse=dlse,
        s_aux=s_aux,
        ds_aux=ds_aux,
        attn_bias=attn_bias,
        dattn_bias=dattn_bias,
    )
    if ds_aux is not None:
        ds_aux = ds_aux.to(s_aux.dtype)
    if dattn_bias is not None:
        dattn_bias = dattn_bias.to(attn_bias.dtype)
    return dq, dk, dv, ds_aux, dattn_bias


def _refuse_second_derivative(gradients):
    """Return the gradients such that differentiating them raises RuntimeError."""
    message = b"flash_attn has no second derivative"
    refuse = torch._C._functions.DelayedError(message, len(gradients))
    return refuse(*(g if g is None else g.detach().requires_grad_() for g in gradients))


def _needs_grad(*tensors) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def forward(q, k, v, *args, s_aux, attn_bias):
    """Call the operator of a dense batch, or do without the dispatcher."""
    return _call(_DENSE, q, k, v, args, s_aux, attn_bias)


def varlen_forward(q, k, v, *args, s_aux, attn_bias):
    """Call the operator of a packed batch, or do without the dispatcher."""
    args += _VARLEN_DEFAULTS[len(args) - _VARLEN_REQUIRED :]
    return _call(_VARLEN, q, k, v, args, s_aux, attn_bias)


def _call(operators, q, k, v, args, s_aux, attn_bias):
    extensions = [x for x in (s_aux, attn_bias) if x is not None]
    if not (needs_no_dispatcher(q, k, v) and all(map(is_plain, extensions))):
        return operators.forward(q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias)
    if _needs_grad(q, k, v, *extensions):
        return _Attention.apply(operators, None, q, k, v, s_aux, attn_bias, *args)
    return operators.forward_kernel(q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias)


def _forward(keyset, q, k, v, *args, s_aux=None, attn_bias=None):
    keyset = keyset & torch._C._after_autograd_keyset
    if _needs_grad(q, k, v, s_aux, attn_bias):
        return _Attention.apply(_DENSE, keyset, q, k, v, s_aux, attn_bias, *args)
    return _DENSE.forward.redispatch(keyset, q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias)


def _varlen_forward(keyset, q, k, v, *args, s_aux=None, attn_bias=None):
    keyset = keyset & torch._C._after_autograd_keyset
    if _needs_grad(q, k, v, s_aux, attn_bias):
        args += _VARLEN_DEFAULTS[len(args) - _VARLEN_REQUIRED :]
        return _Attention.apply(_VARLEN, keyset, q, k, v, s_aux, attn_bias, *args)
    return _VARLEN.forward.redispatch(keyset, q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias)


_ops.operators["_flash_attn_forward"].set_autograd(_forward)
_ops.operators["_flash_attn_varlen_forward"].set_autograd(_varlen_forward)
