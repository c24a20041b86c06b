"""What the functions over several processes check of their arguments before anything is sent."""

from __future__ import annotations

import functools
import zlib
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from flash_attn import _emulator
from flash_attn._arguments import ERRORS, check_optional, check_tensors, explained, not_dense
from flash_attn._autograd import _refuse_wide_gradients
from flash_attn._functions import FORWARD, VARLEN_FORWARD
from flash_attn.distributed._agreement import Call
from flash_attn.distributed._calls import Scores
from flash_attn.distributed.layout import LAYOUTS, check_layout, count, seqlens_of, shares
from flash_attn.flash_attn_interface import _score

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Arguments(NamedTuple):
    """The arguments of a call, as one process has them."""

    q: Tensor
    k: Tensor
    v: Tensor
    score: tuple  # dropout_p, softmax_scale, causal, left, right, softcap
    alibi_slopes: Optional[Tensor]
    s_aux: Optional[Tensor]
    layout: str
    cu_seqlens: tuple = ()  # or those of queries and keys, whole

    @property
    def window(self) -> tuple[int, int]:
        """(left, right), -1: no limit."""
        _, _, causal, left, right, _ = self.score
        return left, 0 if causal else right

    @property
    def scores(self) -> Scores:
        dropout_p, scale, _, _, _, softcap = self.score
        return Scores(dropout_p, scale, softcap, self.alibi_slopes)

    @property
    def needs_gradient(self) -> bool:
        inputs = (self.q, self.k, self.v, self.s_aux)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def checked(
    q, k, v, numbers: tuple, alibi_slopes, s_aux, layout: str, cu_seqlens: tuple = ()
) -> Arguments:
    """Return the arguments of a call.

    Args:
        numbers: dropout_p, softmax_scale, causal, window_size, softcap.
        cu_seqlens: of queries and keys; () of a dense batch.

    Raises:
        TypeError, ValueError, RuntimeError: one is invalid; the message names it.
    """
    check_tensors(q=q, k=k, v=v)
    check_optional(alibi_slopes=alibi_slopes, s_aux=s_aux)
    for name, x in (("q", q), ("k", k), ("v", v)):
        error = not_dense(name, x)
        if error is not None:
            raise error
        dims = (
            ("total", "nheads", "headdim")
            if cu_seqlens
            else ("batch", "seqlen", "nheads", "headdim")
        )
        if x.dim() != len(dims):
            raise ValueError(f"{name} must be ({', '.join(dims)}), got shape {tuple(x.shape)}")
    token_dim = 0 if cu_seqlens else 1
    if k.shape[token_dim] != v.shape[token_dim]:
        raise ValueError(
            f"k and v must have as many tokens, got {k.shape[token_dim]} and {v.shape[token_dim]}"
        )
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "alibi_slopes must not require a gradient: attention over several processes has none "
            "for them (flash_attn_func has)"
        )
    score = _score(q, *numbers)
    arguments = Arguments(q, k, v, score, alibi_slopes, s_aux, check_layout(layout), cu_seqlens)
    _check_by_library(arguments)
    if arguments.needs_gradient and (q.is_cuda or _emulator.in_use()):
        _refuse_wide_gradients(q, v)
    return arguments


def _check_by_library(arguments: Arguments) -> None:
    """Let the library check everything but lengths, in a call without tokens."""
    packed = bool(arguments.cu_seqlens)
    operator = VARLEN_FORWARD if packed else FORWARD
    dropout_p, scale, causal, left, right, softcap = arguments.score
    given = {
        **{
            n: x.detach()[:0] if packed else x.detach()[:, :0] for n, x in zip("qkv", arguments[:3])
        },
        "dropout_p": dropout_p,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": softcap,
        "alibi_slopes": arguments.alibi_slopes,
        "s_aux": None if arguments.s_aux is None else arguments.s_aux.detach(),
        "return_softmax": False,
        "zero_tensors": False,
        "num_splits": 0,
    }
    if packed:
        empty = torch.zeros_like(arguments.cu_seqlens[0])
        given.update(cu_seqlens_q=empty, cu_seqlens_k=empty, max_seqlen_q=0, max_seqlen_k=0)
    rng_state = torch.zeros(2, dtype=torch.int64)  # draws nothing
    try:
        operator.kernel(operator.named(given), rng_state=rng_state)
    except ERRORS as error:
        raise explained(error, given) from None


def told(kind: str, arguments: Arguments) -> Call:
    """What a process tells the others of its call."""
    q, k, v = arguments[:3]
    dropout_p, scale, causal, left, right, softcap = arguments.score
    slopes, token_dim = arguments.alibi_slopes, 0 if arguments.cu_seqlens else 1
    same = {
        "the place of q's dtype in (float16, bfloat16, float32)": _DTYPES.index(q.dtype),
        "q's number of heads": q.shape[-2],
        "k's number of heads": k.shape[-2],
        "q's head dim": q.shape[-1],
        "v's head dim": v.shape[-1],
        "dropout_p": dropout_p,
        "softmax_scale": scale,
        "causal": causal,
        "window_size[0]": left,
        "window_size[1]": right,
        "softcap": softcap,
        "the place of layout in ('contiguous', 'zigzag')": LAYOUTS.index(arguments.layout),
        "alibi_slopes' number of dimensions": 0 if slopes is None else slopes.dim(),
        "whether s_aux is given": arguments.s_aux is not None,
        "whether a gradient is required": arguments.needs_gradient,
    }
    if arguments.cu_seqlens:
        for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), arguments.cu_seqlens):
            same[f"the CRC-32 of {name}"] = zlib.crc32(x.cpu().numpy().tobytes())
    else:
        same["q's batch"] = q.shape[0]
    return Call(kind, same, {"q": q.shape[token_dim], "k": k.shape[token_dim]})


def packed_seqlens(arguments: Arguments) -> tuple[list[int], list[int]]:
    """Return the whole lengths of packed sequences of queries and of keys."""
    seqlens_q, seqlens_k = (
        seqlens_of(name, x)
        for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), arguments.cu_seqlens)
    )
    if len(seqlens_q) != len(seqlens_k):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {len(seqlens_q) + 1} and "
            f"{len(seqlens_k) + 1}"
        )
    return seqlens_q, seqlens_k


def check_packed_shares(arguments: Arguments, rank: int, size: int) -> None:
    """Raise ValueError unless a process has its share of every packed sequence, and no more."""
    for name, x, seqlens in zip("qk", arguments[:2], packed_seqlens(arguments)):
        share = sum(count(shares(n, size, arguments.layout)[rank]) for n in seqlens)
        if x.shape[0] != share:
            raise ValueError(
                f"{name} has {x.shape[0]} tokens, but this process' share of cu_seqlens_{name}'s "
                f"{sum(seqlens)} in layout {arguments.layout!r} is {share} (see shard_varlen)"
            )


def outside_graphs(function: Callable) -> Callable:
    """Decorate a function that torch.compile is to call rather than to trace."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
