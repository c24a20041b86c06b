"""What the operators do: allocate the results, call the library.

Tensors reach the library as they are, by DLPack, but for the few that it cannot read so. What it
writes is allocated here; what it is given is checked there. A call's arguments are a tuple in the
order of the operator's declaration, and the library takes them in that order: their names are bound
once, when this module is imported.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Callable

import torch

from flash_attn import _buffers as buffers
from flash_attn._arguments import (
    ERRORS,
    FP8,
    check_tensors,
    explained,
    refuse_fp8_keys,
    without_negation,
)
from flash_attn._buffers import maybe_contiguous
from flash_attn._functions import (
    BACKWARD,
    FORWARD,
    FP8_FORWARD,
    FP8_KVCACHE,
    FP8_KVCACHE_APPEND,
    FP8_VARLEN_FORWARD,
    KVCACHE,
    KVCACHE_APPEND,
    VARLEN_BACKWARD,
    VARLEN_FORWARD,
)
from flash_attn._library import bind
from flash_attn._schema import Operator

# Arguments that the library knows by another name, or ("_") does without.
_LIBRARY_NAMES = {
    "dropout_p": "p_dropout",
    "causal": "is_causal",
    "window_size_left": "window_left",
    "window_size_right": "window_right",
    "rotary_interleaved": "is_rotary_interleaved",
    "return_softmax": "_",
    "out_dtype": "_",
}


def _readable(operator: Operator, args):
    """Return a call's arguments as the library reads them: with copies where it cannot."""
    for x in operator.copied_of(args):
        if x is not None and (x.is_neg() or not x.is_contiguous()):
            return _with_copies(operator, list(args))
    for x in operator.others_of(args):
        if x is not None and x.is_neg():
            return _with_copies(operator, list(args))
    return args


def _with_copies(operator: Operator, args: list) -> list:
    for place in operator.tensors:
        x = args[place]
        if x is not None and x.is_neg():
            args[place] = without_negation(operator.names[place], x, place in operator.written)
    for place in operator.copied:
        args[place] = maybe_contiguous(args[place])
    return args


def _check_out(out) -> None:
    check_tensors(out=out)
    if out.is_neg():
        without_negation("out", out, is_written=True)


def _attend(operator: Operator, args, wants_all: bool = True, out=None, rng_state=None):
    """Attention of a dense or packed batch: (out, softmax_lse, S_dmask, rng_state).

    ``out``: the caller's buffer for it; ``rng_state``: of an earlier call. Without ``wants_all``
    results besides out may be None.
    """
    args = _readable(operator, args)
    q, k, v = args[:3]
    refuse_fp8_keys("k", k)
    if out is None:
        out = operator.layout.out(q, v)
    else:
        _check_out(out)
    softmax_lse = operator.layout.lse(q) if wants_all else None
    dropout_p = args[operator.dropout_p]
    if rng_state is None and (wants_all or dropout_p > 0.0):
        rng_state = buffers.new_rng_state(dropout_p)
    s_dmask = None
    if args[operator.return_softmax]:
        s_dmask = operator.layout.s_dmask(q, k, *args[operator.sequences])
    operator.function(*args, out, softmax_lse, s_dmask, rng_state)
    if s_dmask is None and wants_all:
        s_dmask = q.new_empty(0)
    return out, softmax_lse, s_dmask, rng_state


def _differentiate(operator: Operator, args, wants_all: bool = True):
    """Gradients of a dense or packed batch: writes dq, dk, dv and so on, returns softmax_d."""
    args = _readable(operator, args)
    place = operator.place
    softmax_d = operator.layout.softmax_d(args[place["q"]], *args[operator.sequences])
    for name in ("q", "k", "v"):
        if args[place["d" + name]] is None:
            args = list(args)
            args[place["d" + name]] = buffers.new_gradient(args[place[name]])
    operator.function(*args, softmax_d)
    return softmax_d


def _append(operator: Operator, args, wants_all: bool = True, out=None):
    """As ``_attend_cache``, but without k and v the cache is not written to."""
    if args[operator.place["k"]] is None and args[operator.place["v"]] is None:
        args = KVCACHE.named(dict(zip(operator.names, args)))
        operator = KVCACHE
    return _attend_cache(operator, args, wants_all, out)


def _attend_cache(operator: Operator, args, wants_all: bool = True, out=None):
    """Attention over a cache, after appending to it: (out, softmax_lse), None if not wanted."""
    args = _readable(operator, args)
    q, k_cache, v_cache = args[:3]
    refuse_fp8_keys("k_cache", k_cache)
    if out is None:
        out = buffers.dense_out(q, v_cache)
    else:
        _check_out(out)
    softmax_lse = buffers.dense_lse(q) if wants_all else None
    operator.function(*args, out, softmax_lse)
    if operator.written:
        buffers.raise_versions(*(args[place] for place in operator.written))
    return out, softmax_lse


def fp8_results(operator: Operator, args, wants_lse: bool = True):
    """Return uninitialised (out, softmax_lse) of an operator with factors."""
    q, _, v = args[:3]
    dtype = args[operator.place["out_dtype"]]
    if dtype is None and q.dtype is FP8:
        dtype = torch.bfloat16
    return operator.layout.out(q, v, dtype), operator.layout.lse(q) if wants_lse else None


def _attend_fp8(operator: Operator, args, wants_all: bool = True):
    """Attention with factors, after appending to a cache if it has one: (out, softmax_lse)."""
    args = _readable(operator, args)
    out, softmax_lse = fp8_results(operator, args, wants_all)
    operator.function(*args, out, softmax_lse)
    if operator.written:
        buffers.raise_versions(*(args[place] for place in operator.written))
    return out, softmax_lse


def _explaining(operator: Operator, kernel: Callable) -> Callable:
    """Return ``kernel`` of an operator, with errors that name the argument at fault."""

    def run(args, wants_all: bool = True, **more):
        try:
            return kernel(operator, args, wants_all, **more)
        except ERRORS as error:
            raise explained(error, {**dict(zip(operator.names, args)), **more}) from None

    return run


def _implement(operator: Operator, kernel: Callable, function: str, results: str, copied: str):
    """Run an operator by a function of the library, which takes buffers of the results as well.

    ``copied``: the tensors of which the library wants the last dimension contiguous.
    """
    names = [_LIBRARY_NAMES.get(name, name) for name in operator.names]
    operator.function = bind(function, " ".join(names) + " " + results)
    operator.copied = operator.places(copied)
    operator.copied_of = itemgetter(*operator.copied)
    others = (place for place in operator.tensors if place not in operator.copied)
    operator.others_of = itemgetter(*others)
    operator.kernel = _explaining(operator, kernel)


_RESULTS = "out softmax_lse s_dmask rng_state"
_GIVEN = "dout q k v out"
_CACHE_TENSORS = "cache_seqlens rotary_cos rotary_sin cache_batch_idx cache_leftpad block_table"

_implement(FORWARD, _attend, "mha_fwd", _RESULTS, copied="q k v")
_implement(VARLEN_FORWARD, _attend, "mha_varlen_fwd", _RESULTS, copied="q k v")
_implement(BACKWARD, _differentiate, "mha_bwd", "softmax_d", copied=_GIVEN)
_implement(VARLEN_BACKWARD, _differentiate, "mha_varlen_bwd", "softmax_d", copied=_GIVEN)
_CACHE = ("mha_fwd_kvcache", "out softmax_lse")
_implement(KVCACHE, _attend_cache, *_CACHE, copied=f"q {_CACHE_TENSORS}")
_implement(KVCACHE_APPEND, _append, *_CACHE, copied=f"q k v {_CACHE_TENSORS}")
_FP8_CACHE_TENSORS = "cache_seqlens cache_batch_idx cache_leftpad block_table"
_implement(FP8_FORWARD, _attend_fp8, "mha_fwd", "out softmax_lse", copied="q k v")
_implement(FP8_VARLEN_FORWARD, _attend_fp8, "mha_varlen_fwd", "out softmax_lse", copied="q k v")
_implement(FP8_KVCACHE, _attend_fp8, *_CACHE, copied=f"q {_FP8_CACHE_TENSORS}")
_implement(FP8_KVCACHE_APPEND, _attend_fp8, *_CACHE, copied=f"q k v {_FP8_CACHE_TENSORS}")
