"""FlashAttention-3's torch operators, ``torch.ops.flash_attn_3.*``.

All but ``_combine`` are composed of this package's other operators, into which torch takes them
apart before anything else: gradients, fake tensors and ``torch.compile`` are theirs. The empty
tensors at the end of results are workspaces of FlashAttention-3's kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_attn._arguments import as_int
from flash_attn.v3._forward import (
    backward,
    check_partial,
    combine_into,
    forward,
    scheduler_metadata,
)

_FORWARD_TENSORS = (
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, "
    "SymInt? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, "
    "Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, "
)
SCHEMAS = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, "
    "Tensor(v_new!)? v_new=None, Tensor? q_v=None, Tensor(out!)? out=None, "
    + _FORWARD_TENSORS
    + "bool is_causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, SymInt num_splits=0, bool? pack_gqa=None, "
    "SymInt sm_margin=0) "
    "-> (Tensor(out!) out, Tensor softmax_lse, Tensor out_accum, Tensor lse_accum)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0.0, bool deterministic=False, "
    "SymInt sm_margin=0) -> (Tensor softmax_d, Tensor softmax_lse_log2, Tensor dq_accum, "
    "Tensor dk_accum, Tensor dv_accum)",
    "fwd_combine": "(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
    "ScalarType? out_dtype=None) -> (Tensor(out!) out, Tensor lse)",
    "get_scheduler_metadata": "(SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "SymInt num_heads, SymInt num_heads_k, SymInt headdim, SymInt headdim_v, "
    "ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? leftpad_k=None, SymInt? page_size=None, SymInt max_seqlen_k_new=0, "
    "bool is_causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, bool has_softcap=False, SymInt num_splits=0, "
    "bool? pack_gqa=None, SymInt sm_margin=0) -> Tensor",
    "_flash_attn_forward": "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, "
    "Tensor? v_new=None, Tensor? qv=None, Tensor? out_=None, "
    + _FORWARD_TENSORS
    + "bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, "
    "Tensor? scheduler_metadata=None, SymInt num_splits=1, bool? pack_gqa=None, "
    "SymInt sm_margin=0) -> (Tensor out, Tensor softmax_lse, Tensor out_accum, Tensor lse_accum)",
    "_flash_attn_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? sequed_q=None, Tensor? sequed_k=None, SymInt? max_seqlen_q=None, "
    "SymInt? max_seqlen_k=None, Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, "
    "Tensor(dv!)? dv=None, float? softmax_scale=None, bool is_causal=False, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, "
    "bool deterministic=False, SymInt sm_margin=0) -> Tensor",
    "_combine": "(Tensor out_partial, Tensor lse_partial, ScalarType out_dtype) "
    "-> (Tensor out, Tensor lse)",
}
_LEFT_OF_FORWARD = 25  # arguments before the window
_LEFT_OF_BACKWARD = 17


def workspaces(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return out_accum and lse_accum, which hold nothing."""
    return tuple(like.new_empty(0, dtype=torch.float32) for _ in range(2))


def _with_window(args: tuple, left: int) -> tuple:
    """Return arguments with the two numbers of the window as a pair."""
    return (*args[:left], args[left : left + 2], *args[left + 2 :])


def _fwd(*args):
    out, lse = forward(*_with_window(args, _LEFT_OF_FORWARD))
    return (out, lse, *workspaces(out))


def _bwd(*args):
    softmax_d = backward(*_with_window(args, _LEFT_OF_BACKWARD))
    empty = softmax_d.new_empty(0)
    lse_log2 = args[5].float() * math.log2(math.e)
    return softmax_d, lse_log2, empty, empty.clone(), empty.clone()


def flash_attn_backward(*args) -> Tensor:
    """``_flash_attn_backward``: its order of arguments put into that of ``bwd``."""
    first, sequences, gradients, rest = args[:6], args[6:12], args[12:15], args[15:]
    cu_q, cu_k, used_q, used_k, max_q, max_k = sequences
    order = (*first, *gradients, cu_q, cu_k, used_q, used_k, max_q, max_k, *rest)
    return backward(*_with_window(order, _LEFT_OF_BACKWARD))


def combine(out_partial, lse_partial, out=None, out_dtype=None) -> tuple[Tensor, Tensor]:
    """Merge partial results: (out, lse); ``out`` is written where it is given."""
    dtype = check_partial(out_partial, lse_partial, out, out_dtype)
    result, lse = torch.ops.flash_attn_3._combine(out_partial, lse_partial, dtype)
    return (result if out is None else out.copy_(result)), lse


def _combine_kernel(out_partial: Tensor, lse_partial: Tensor, out_dtype) -> tuple[Tensor, Tensor]:
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype)
    return out, combine_into(out_partial.contiguous(), lse_partial.contiguous(), out)


def _fake_combine(out_partial: Tensor, lse_partial: Tensor, out_dtype) -> tuple[Tensor, Tensor]:
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype)
    return out, lse_partial.new_empty(lse_partial.shape[1:])


def _get_scheduler_metadata(batch_size, *args) -> Tensor:
    seqused_k = args[7]
    return scheduler_metadata(as_int("batch_size", batch_size), seqused_k.device)


def _by_place(name: str, function):
    """Return ``function``, which takes all arguments by place, for torch's calls."""
    arguments = getattr(torch.ops.flash_attn_3, name).default._schema.arguments
    names = [a.name for a in arguments]
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

    def call(*args, **kwargs):
        given = {**defaults, **dict(zip(names, args)), **kwargs}
        return function(*(given[name] for name in names))

    return call


_library = torch.library.Library("flash_attn_3", "FRAGMENT")
_IMPLEMENTATIONS = {
    "fwd": _fwd,
    "bwd": _bwd,
    "fwd_combine": combine,
    "get_scheduler_metadata": _get_scheduler_metadata,
    "_flash_attn_forward": _fwd,
    "_flash_attn_backward": flash_attn_backward,
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _function in _IMPLEMENTATIONS.items():
    _library.impl(_name, _by_place(_name, _function), "CompositeImplicitAutograd")
for _device in ("CPU", "CUDA"):
    _library.impl("_combine", _combine_kernel, _device)
_library._register_fake("_combine", _fake_combine)
