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
from operator import itemgetter
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from flash_attn import _composition as composition
from flash_attn import _dtensor, _emulator
from flash_attn._arguments import not_dense
from flash_attn._buffers import maybe_contiguous, new_gradient
from flash_attn._composition import unwrapped
from flash_attn._eager import needs_derivative, run
from flash_attn._functions import BACKWARD, FORWARD, VARLEN_BACKWARD, VARLEN_FORWARD
from flash_attn._library import largest_head_dims
from flash_attn._ops import registered
from flash_attn._schema import Operator

_transforms_active = torch._C._are_functorch_transforms_active

_INPUTS = ("q", "k", "v", "s_aux", "attn_bias", "alibi_slopes")
# What a backward operator takes besides the forward's numbers and inputs, in the order in which
# ``_gradients`` has it.
_SAVED = ("out", "softmax_lse", "rng_state")
_OWN = ("deterministic", "dout", "dlse", "dq", "dk", "dv", "ds_aux", "dattn_bias")
_SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k")


class _Call(NamedTuple):
    """A call of a forward operator without its tensors."""

    operator: Operator
    numbers: tuple  # in the order of the operator's
    wants_attn_bias: bool = False  # its gradient
    wants_alibi_slopes: bool = False


class _Saved(NamedTuple):
    """The tensors of a call that its derivatives need."""

    inputs: tuple  # q, k, v, s_aux, attn_bias, alibi_slopes
    out: torch.Tensor
    softmax_lse: torch.Tensor
    rng_state: torch.Tensor
    sequences: tuple  # () or (cu_seqlens_q, cu_seqlens_k)


def _refuse_wide_gradients(q, v) -> None:
    """Raise RuntimeError for head dims that the CUDA backend's backward lacks."""
    largest = largest_head_dims("cuda", "mha_bwd")
    for name, dim in (("head dimension", q.shape[-1]), ("head dimension of v", v.shape[-1])):
        if dim > largest:
            raise RuntimeError(
                f"the CUDA backend lacks {name} {dim} (at most {largest}) in the backward, and a "
                "gradient is required: under torch.no_grad() it has the forward"
            )


def _save(ctx, inputs, results) -> None:
    """Keep in ctx what the derivatives need."""
    operator, _, *args = inputs
    q, _, v, *_ = operator.inputs_of(args)
    if (q.is_cuda or _emulator.in_use()) and any(ctx.needs_input_grad):
        _refuse_wide_gradients(q, v)
    out, softmax_lse, s_dmask, rng_state = results
    saved = (*operator.inputs_of(args), out, softmax_lse, rng_state, *args[operator.sequences][:2])
    ctx.save_for_backward(*saved)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*saved)
    ctx.operator, ctx.numbers = operator, operator.numbers_of(args)
    ctx.forward_only = any(args[place] is not None for place in operator.forward_only)
    ctx.mark_non_differentiable(s_dmask, rng_state)
    ctx.set_materialize_grads(False)


def _saved(ctx, tensors) -> _Saved:
    if ctx.forward_only:
        raise RuntimeError("flash_attn has no backward with block_table, leftpad_k or seqused_k")
    return _Saved(tensors[:6], *tensors[6:9], tensors[9:])


def _primals(tensors) -> tuple:
    """Return tensors without their tangents at this level of differentiation."""
    return tuple(None if x is None else forward_ad.unpack_dual(x).primal for x in tensors)


class _Attention(torch.autograd.Function):
    """A forward operator's results with the gradient of its backward operator."""

    @staticmethod
    def forward(ctx, operator, keyset, *args):
        if keyset is None:  # without the dispatcher
            results = operator.kernel(args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = operator.redispatch(keyset, args)
        _save(ctx, (operator, keyset, *args), results)
        return results

    @staticmethod
    def backward(ctx, dout, dlse, _ds_dmask, _drng_state):
        saved = _saved(ctx, ctx.saved_tensors)
        gradients = [None] * len(ctx.needs_input_grad)
        if dout is None and dlse is None:
            return tuple(gradients)
        if dout is None:
            dout = torch.zeros_like(saved.out)
        places = ctx.operator.inputs_of_apply
        wanted = (ctx.needs_input_grad[place] for place in places[4:])
        call = _Call(ctx.operator, ctx.numbers, *wanted)
        is_derived = torch.is_grad_enabled() or forward_ad._current_level >= 0
        derive = _Gradients.apply if is_derived else _gradients
        found = derive(call, dout, dlse, *saved.inputs, *saved[1:4], *saved.sequences)
        for place, gradient in zip(places, found):
            gradients[place] = gradient
        return tuple(gradients)

    @staticmethod
    def jvp(ctx, *tangents):
        tangents = ctx.operator.inputs_of(tangents[2:])
        with _set_fwd_grad_enabled(True):  # torch leaves it off for the levels below, too
            saved = _saved(ctx, _primals(ctx.saved_tensors))
            call = _Call(ctx.operator, ctx.numbers)
            settings = _settings(call, saved.rng_state, saved.sequences)
            attention = partial(composition.attention, settings)
            return *_push_forward(attention, saved.inputs, tangents), None, None


class _FunctionalAttention(torch.autograd.Function):
    """The same for tensors that torch.func's transforms have wrapped."""

    @staticmethod
    def forward(operator, keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.through_dispatcher(args)

    setup_context = staticmethod(_save)
    backward = staticmethod(_Attention.backward)
    jvp = staticmethod(_Attention.jvp)

    @staticmethod
    def vmap(info, in_dims, operator, keyset, *args):
        if args[operator.dropout_p] > 0.0 and info.randomness != "different":
            raise RuntimeError(
                "vmap of attention with dropout needs vmap(..., randomness='different'): every "
                "call draws a mask of its own"
            )
        apply = partial(_FunctionalAttention.apply, operator, None)
        return _map(apply, info.batch_size, in_dims[2:], args)


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
    sequences = tuple(map(unwrapped, sequences))
    return composition.Settings(call.operator, call.numbers, sequences, unwrapped(rng_state))


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


def _gradients(call, dout, dlse, *tensors):
    """Return what the kernel makes of the gradients of q, k, v, s_aux, attn_bias, alibi_slopes.

    Those of s_aux, attn_bias and alibi_slopes are None where they are not wanted; the last is
    composed.
    """
    q, k, v, s_aux, attn_bias, _ = tensors[:6]
    with torch.no_grad():
        dq, dk, dv = new_gradient(q), new_gradient(k), new_gradient(v)
        ds_aux = None if s_aux is None else new_gradient(s_aux, torch.float32)
        dattn_bias = new_gradient(attn_bias, torch.float32) if call.wants_attn_bias else None
        if any(x.is_neg() for x in (dout, q, k, v)):  # not in compiled mutations
            dout, *inputs = (x.resolve_neg() for x in (dout, q, k, v))
            tensors = (*inputs, *tensors[3:])
        own = (True, dout, dlse, dq, dk, dv, ds_aux, dattn_bias)
        operator = call.operator
        run(operator.backward, operator.backward_args_of((*call.numbers, *own, *tensors)))
        if ds_aux is not None:
            ds_aux = ds_aux.to(s_aux.dtype)
        if dattn_bias is not None:
            dattn_bias = dattn_bias.to(attn_bias.dtype)
        dslopes = None
        if call.wants_alibi_slopes:
            dslopes = _gradient_of_slopes(call, dout, dlse, *tensors)
    return dq, dk, dv, ds_aux, dattn_bias, dslopes


def _gradient_of_slopes(call: _Call, dout, dlse, *tensors):
    settings = _settings(call, tensors[8], tensors[9:])
    return _pull_back(partial(composition.attention, settings), tensors[:6], (dout, dlse))[5]


def _record(operator: Operator, args):
    """Run the kernel so that derivatives can follow."""
    return _Attention.apply(operator, None, *args)


def _dispatch(operator: Operator, args):
    """Run the operator for tensors that are not plain, or where torch watches."""
    if _dtensor.is_dtensor(args[0]):
        return _dtensor.on_shards(run, operator, args)
    if args[0].is_nested:
        raise not_dense(operator.names[0], args[0])
    _dtensor.refuse({operator.names[place]: args[place] for place in operator.differentiable})
    if _transforms_active():
        return _FunctionalAttention.apply(operator, None, *args)
    return operator.through_dispatcher(args)


def _autograd_kernel(operator: Operator, keyset, *given, **by_name):
    args = operator.complete(given, by_name)
    if _dtensor.is_dtensor(args[0]) or _transforms_active():
        return _dispatch(operator, args)
    keyset = keyset & torch._C._after_autograd_keyset
    if needs_derivative(torch._C._any_requires_grad(*operator.inputs_of(args))):
        return _Attention.apply(operator, keyset, *args)
    return operator.overload.redispatch(keyset, *given, **by_name)


def _derive(operator: Operator, backward: Operator) -> None:
    """Give a forward operator its derivatives."""
    operator.backward = backward
    operator.inputs_of = operator.getter(" ".join(_INPUTS))
    operator.inputs_of_apply = tuple(2 + place for place in operator.differentiable)
    operator.numbers_of = itemgetter(*operator.numbers)
    numbers = [operator.names[place] for place in operator.numbers]
    given = [*numbers, *_OWN, *_INPUTS, *_SAVED, *_SEQUENCES]
    operator.backward_args_of = itemgetter(*map(given.index, backward.names))
    tensors = {operator.names[place] for place in operator.tensors}
    operator.forward_only = operator.places(" ".join(tensors - set(backward.names)))
    operator.record = partial(_record, operator)
    operator.dispatch = partial(_dispatch, operator)
    registered[operator.name].set_autograd(partial(_autograd_kernel, operator))


_derive(FORWARD, BACKWARD)
_derive(VARLEN_FORWARD, VARLEN_BACKWARD)
