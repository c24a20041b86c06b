"""Derivatives of the forward operators.

They are differentiable in q, k, v, s_aux, attn_bias and alibi_slopes, through both out and
softmax_lse, in reverse and in forward mode, and any number of times. First gradients come from the
kernels, all else from ``_composition.py``. The autograd kernels are written by hand because
``torch.library.register_autograd`` does not accept keyword-only tensors.

Each derivative has two faces: ``_Attention`` for autograd alone, without the cost of
``setup_context``, and ``_FunctionalAttention`` for torch.func's transforms.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from flash_attn import _composition as composition
from flash_attn import _dtensor, _ops
from flash_attn import _kernels as kernels
from flash_attn._arguments import is_plain, not_dense
from flash_attn._buffers import maybe_contiguous, new_gradient
from flash_attn._eager import needs_no_dispatcher

_transforms_active = torch._C._are_functorch_transforms_active


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
_NUM_INPUTS = 5  # q, k, v, s_aux, attn_bias; alibi_slopes comes among the arguments


def _save(ctx, inputs, results) -> None:
    """Keep in ctx what the derivatives need."""
    operators, _, q, k, v, s_aux, attn_bias, *args = inputs
    out, softmax_lse, s_dmask, rng_state = results
    place = operators.alibi_slopes
    saved = (q, k, v, s_aux, attn_bias, args[place], out, softmax_lse, rng_state)
    sequences = args[: operators.num_sequence_tensors]
    ctx.save_for_backward(*saved, *sequences)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*saved, *sequences)
    ctx.operators = operators
    ctx.numbers = args[operators.num_sequence_tensors : place]
    ctx.forward_only = any(x is not None for x in args[_VARLEN_FORWARD_ONLY])
    ctx.mark_non_differentiable(s_dmask, rng_state)
    ctx.set_materialize_grads(False)


class _Saved(NamedTuple):
    """What ``_save`` kept."""

    inputs: tuple  # q, k, v, s_aux, attn_bias, alibi_slopes
    out: torch.Tensor
    softmax_lse: torch.Tensor
    rng_state: torch.Tensor
    sequences: tuple  # () or (cu_seqlens_q, cu_seqlens_k)


def _saved(ctx, tensors) -> _Saved:
    if ctx.forward_only:
        raise RuntimeError("flash_attn has no backward with block_table, leftpad_k or seqused_k")
    return _Saved(tensors[:6], *tensors[6:9], tensors[9:])


def _primals(tensors) -> tuple:
    """Return tensors without their tangents at this level of differentiation."""
    return tuple(None if x is None else forward_ad.unpack_dual(x).primal for x in tensors)


class _Call(NamedTuple):
    """A call without its tensors."""

    operators: _Operators
    numbers: tuple
    wants_attn_bias: bool = False  # its gradient
    wants_alibi_slopes: bool = False


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
        _save(ctx, (operators, keyset, q, k, v, s_aux, attn_bias, *args), results)
        return results

    @staticmethod
    def backward(ctx, dout, dlse, _ds_dmask, _drng_state):
        saved = _saved(ctx, ctx.saved_tensors)
        missing = len(ctx.needs_input_grad) - 7
        if dout is None and dlse is None:
            return (None,) * (7 + missing)
        if dout is None:
            dout = torch.zeros_like(saved.out)
        place = ctx.operators.alibi_slopes
        wants_slopes = ctx.needs_input_grad[7 + place]
        call = _Call(ctx.operators, ctx.numbers, ctx.needs_input_grad[6], wants_slopes)
        is_derived = torch.is_grad_enabled() or forward_ad._current_level >= 0
        run = _Gradients.apply if is_derived else _gradients
        *gradients, dslopes = run(call, dout, dlse, *saved.inputs, *saved[1:4], *saved.sequences)
        return None, None, *gradients, *(None,) * place, dslopes, *(None,) * (missing - place - 1)

    @staticmethod
    def jvp(ctx, *tangents):
        place = 7 + ctx.operators.alibi_slopes
        tangents = (*tangents[2:7], tangents[place])
        with _set_fwd_grad_enabled(True):  # torch leaves it off for the levels below, too
            saved = _saved(ctx, _primals(ctx.saved_tensors))
            settings = _settings(
                _Call(ctx.operators, ctx.numbers), saved.rng_state, saved.sequences
            )
            attention = partial(composition.attention, settings)
            return *_push_forward(attention, saved.inputs, tangents), None, None


class _FunctionalAttention(torch.autograd.Function):
    """The same for tensors that torch.func's transforms have wrapped."""

    @staticmethod
    def forward(operators, keyset, q, k, v, s_aux, attn_bias, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return operators.forward(q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias)

    setup_context = staticmethod(_save)
    backward = staticmethod(_Attention.backward)
    jvp = staticmethod(_Attention.jvp)

    @staticmethod
    def vmap(info, in_dims, operators, keyset, *inputs):
        args = inputs[_NUM_INPUTS:]
        dropout_p = args[operators.alibi_slopes - 6]
        if dropout_p > 0.0 and info.randomness != "different":
            raise RuntimeError(
                "vmap of attention with dropout needs vmap(..., randomness='different'): every "
                "call draws a mask of its own"
            )
        run = partial(_FunctionalAttention.apply, operators, None)
        return _map(run, info.batch_size, in_dims[2:], inputs)


class _Gradients(torch.autograd.Function):
    """The gradients of a call as a differentiable function of dout, dlse and its inputs.

    out and softmax_lse, which the kernel reads besides, are functions of the inputs: the inputs'
    derivatives have their part.
    """

    @staticmethod
    def forward(call, dout, dlse, *tensors):
        return _gradients(call, dout, dlse, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, results):
        ctx.call, *tensors = inputs
        ctx.returned = [x is not None for x in results]
        ctx.save_for_backward(*tensors)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        f, primals = _composed_gradients(ctx, ctx.saved_tensors)
        cotangents = [c for c, x in zip(cotangents, ctx.returned) if x]
        pulled = _pull_back(f, primals, cotangents)
        return None, *pulled, *(None,) * (len(ctx.needs_input_grad) - 1 - len(pulled))

    @staticmethod
    def jvp(ctx, _call, *tangents):
        with _set_fwd_grad_enabled(True):
            f, primals = _composed_gradients(ctx, _primals(ctx.saved_tensors))
            pushed = iter(_push_forward(f, primals, tangents[: len(primals)]))
        return tuple(next(pushed) if x else None for x in ctx.returned)

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        return _map(partial(_Gradients.apply, call), info.batch_size, in_dims[1:], tensors)


def _composed_gradients(ctx, saved):
    """Return a function of (dout, dlse, *inputs) that composes what ``_gradients`` returned."""
    primals, (_, _, rng_state) = saved[:8], saved[8:11]
    settings = _settings(ctx.call, rng_state, saved[11:])

    def gradients(dout, dlse, *inputs):
        pulled = _pull_back(partial(composition.attention, settings), inputs, (dout, dlse))
        return tuple(g for g, x in zip(pulled, ctx.returned) if x)

    return gradients, primals


def _settings(call: _Call, rng_state, sequences) -> composition.Settings:
    *max_seqlens, p, scale, causal, left, right, softcap = call.numbers
    return composition.Settings(
        tuple(map(composition.unwrapped, sequences)),
        tuple(max_seqlens),
        p,
        scale,
        causal,
        left,
        right,
        softcap,
        composition.unwrapped(rng_state),
    )


def _without_gaps(f, inputs):
    """Return f as a function of those inputs that are not None, and these."""

    def g(*present):
        rest = iter(present)
        return f(*(None if x is None else next(rest) for x in inputs))

    return g, [x for x in inputs if x is not None]


def _pull_back(f, inputs, cotangents):
    """Return f's vector-Jacobian product; inputs and cotangents may be None."""
    g, present = _without_gaps(f, inputs)
    with _in_fp32(present[0]):
        outputs, pull_back = torch.func.vjp(g, *present)
        cotangents = (torch.zeros_like(y) if c is None else c for c, y in zip(cotangents, outputs))
        pulled = iter(pull_back(tuple(cotangents)))
    return tuple(None if x is None else next(pulled) for x in inputs)


def _push_forward(f, inputs, tangents):
    """Return f's Jacobian-vector product; inputs and tangents may be None.

    The vector-Jacobian product is linear in its cotangents: pulling the tangents back through it
    once more pushes them forward, and forward mode, which does not nest in itself, is not needed.
    """
    g, present = _without_gaps(f, inputs)
    tangents = [
        torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents) if x is not None
    ]
    with _in_fp32(present[0]):
        with torch.no_grad():
            zeros = tuple(torch.zeros_like(y) for y in g(*present))
        _, push_forward = torch.func.vjp(lambda *c: torch.func.vjp(g, *present)[1](c), *zeros)
        return push_forward(tuple(tangents))


def _in_fp32(x: torch.Tensor):
    """Context in which autocast does not round the composition's products to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def _map(f, batch_size: int, in_dims, args):
    """vmap's rule: call f for each of a batch of arguments, and stack the results."""
    if batch_size == 0:  # one element of zeros tells the shapes
        args = [
            a if d is None else a.new_zeros((*a.shape[:d], *a.shape[d:][1:]))
            for a, d in zip(args, in_dims)
        ]
        in_dims = [None] * len(args)
    results = []
    for i in range(max(batch_size, 1)):
        element = (
            a if d is None else maybe_contiguous(a.select(d, i)) for a, d in zip(args, in_dims)
        )
        results.append(f(*element))
    outputs = tuple(None if x[0] is None else torch.stack(x)[:batch_size] for x in zip(*results))
    return outputs, tuple(None if x is None else 0 for x in outputs)


def _gradients(call, dout, dlse, q, k, v, s_aux, attn_bias, alibi_slopes, *saved):
    """Return what the kernel makes of the gradients of q, k, v, s_aux, attn_bias, alibi_slopes.

    Those of s_aux, attn_bias and alibi_slopes are None where they are not wanted; the last is
    composed.
    """
    out, softmax_lse, rng_state, *sequences = saved
    operators, numbers, wants_attn_bias, wants_alibi_slopes = call
    with torch.no_grad():
        dq, dk, dv = new_gradient(q), new_gradient(k), new_gradient(v)
        ds_aux = dattn_bias = dslopes = None
        if s_aux is not None:
            ds_aux = new_gradient(s_aux, torch.float32)
        if wants_attn_bias:
            dattn_bias = new_gradient(attn_bias, torch.float32)
        if dout.is_neg() or q.is_neg() or k.is_neg() or v.is_neg():  # not in compiled mutations
            dout, q, k, v = (x.resolve_neg() for x in (dout, q, k, v))
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
            *numbers,
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
        if wants_alibi_slopes:
            attention = partial(composition.attention, _settings(call, rng_state, sequences))
            inputs = (q, k, v, s_aux, attn_bias, alibi_slopes)
            dslopes = _pull_back(attention, inputs, (dout, dlse))[5]
    return dq, dk, dv, ds_aux, dattn_bias, dslopes


def _needs_derivative(*tensors) -> bool:
    """Whether a gradient is wanted, or the derivative in forward mode may be."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def forward(q, k, v, *args, s_aux, attn_bias):
    """Call the operator of a dense batch, or do without the dispatcher."""
    return _call(_DENSE, q, k, v, args, s_aux, attn_bias)


def varlen_forward(q, k, v, *args, s_aux, attn_bias):
    """Call the operator of a packed batch, or do without the dispatcher."""
    args += _VARLEN_DEFAULTS[len(args) - _VARLEN_REQUIRED :]
    return _call(_VARLEN, q, k, v, args, s_aux, attn_bias)


def _call(operators, q, k, v, args, s_aux, attn_bias):
    alibi_slopes = args[operators.alibi_slopes]
    if not needs_no_dispatcher(q, k, v) or not _are_plain(s_aux, attn_bias, alibi_slopes):
        return _dispatch(operators, q, k, v, args, s_aux, attn_bias)
    if _needs_derivative(q, k, v, s_aux, attn_bias, alibi_slopes):
        return _Attention.apply(operators, None, q, k, v, s_aux, attn_bias, *args)
    return operators.forward_kernel(q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias)


def _are_plain(*tensors) -> bool:
    return all(x is None or is_plain(x) for x in tensors)


def _dispatch(operators, q, k, v, args, s_aux, attn_bias):
    if _dtensor.is_dtensor(q):
        return _on_shards(operators, q, k, v, args, s_aux, attn_bias)
    if q.is_nested:
        raise not_dense("q", q)
    slopes = args[operators.alibi_slopes]
    _dtensor.refuse(k=k, v=v, s_aux=s_aux, attn_bias=attn_bias, alibi_slopes=slopes)
    if _transforms_active():
        return _FunctionalAttention.apply(operators, None, q, k, v, s_aux, attn_bias, *args)
    return operators.forward(q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias)


def _on_shards(operators, q, k, v, args, s_aux, attn_bias):
    if operators is _DENSE:
        return _dtensor.dense(forward, q, k, v, args, s_aux, attn_bias)
    return _dtensor.packed(varlen_forward, q, k, v, args, s_aux, attn_bias)


def _autograd_kernel(operators, keyset, q, k, v, args, s_aux, attn_bias):
    if _dtensor.is_dtensor(q):
        return _on_shards(operators, q, k, v, args, s_aux, attn_bias)
    if _transforms_active():
        return _FunctionalAttention.apply(operators, None, q, k, v, s_aux, attn_bias, *args)
    keyset = keyset & torch._C._after_autograd_keyset
    if _needs_derivative(q, k, v, s_aux, attn_bias, args[operators.alibi_slopes]):
        return _Attention.apply(operators, keyset, q, k, v, s_aux, attn_bias, *args)
    return operators.forward.redispatch(keyset, q, k, v, *args, s_aux=s_aux, attn_bias=attn_bias)


def _forward(keyset, q, k, v, *args, s_aux=None, attn_bias=None):
    return _autograd_kernel(_DENSE, keyset, q, k, v, args, s_aux, attn_bias)


def _varlen_forward(keyset, q, k, v, *args, s_aux=None, attn_bias=None):
    args += _VARLEN_DEFAULTS[len(args) - _VARLEN_REQUIRED :]
    return _autograd_kernel(_VARLEN, keyset, q, k, v, args, s_aux, attn_bias)


_ops.operators["_flash_attn_forward"].set_autograd(_forward)
_ops.operators["_flash_attn_varlen_forward"].set_autograd(_varlen_forward)
