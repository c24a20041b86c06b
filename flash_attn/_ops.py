"""The torch operators of this package: schemas, fake kernels, registration.

``torch.ops.flash_attn``:

- ``_flash_attn_forward``, ``_flash_attn_varlen_forward``: (out, softmax_lse, S_dmask, rng_state);
  differentiable in q, k, v, s_aux and attn_bias through both out and softmax_lse
  (``_autograd.py``).
- ``_flash_attn_backward``, ``_flash_attn_varlen_backward``: write dq, dk, dv (and ds_aux,
  dattn_bias), return softmax_d.
- ``_flash_attn_kvcache_forward``, ``_flash_attn_kvcache_append_forward``: (out, softmax_lse); the
  second first appends k and v to the cache in place. Without gradient.

A package that declares an operator of these names by ``torch.library.custom_op`` replaces it in
``torch.ops``; the functions of this package go on with their own.
"""

from __future__ import annotations

import sys

import torch

from flash_attn import _buffers as buffers
from flash_attn import _kernels as kernels

_FORWARD = """(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal,
    SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes,
    bool return_softmax, *, Tensor? s_aux=None, Tensor? attn_bias=None
    ) -> (Tensor out, Tensor softmax_lse, Tensor S_dmask, Tensor rng_state)"""

_VARLEN_FORWARD = """(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
    SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal,
    SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0,
    Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None,
    Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False, SymInt num_splits=0,
    *, Tensor? s_aux=None, Tensor? attn_bias=None
    ) -> (Tensor out, Tensor softmax_lse, Tensor S_dmask, Tensor rng_state)"""

_BACKWARD = """(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, float dropout_p, float softmax_scale,
    bool causal, SymInt window_size_left, SymInt window_size_right, float softcap,
    Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None, *, Tensor? dlse=None,
    Tensor? s_aux=None, Tensor(d!)? ds_aux=None, Tensor? attn_bias=None,
    Tensor(e!)? dattn_bias=None) -> Tensor"""

_VARLEN_BACKWARD = """(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
    SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal,
    SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes,
    bool deterministic, Tensor? rng_state=None, bool zero_tensors=False, *, Tensor? dlse=None,
    Tensor? s_aux=None, Tensor(d!)? ds_aux=None, Tensor? attn_bias=None,
    Tensor(e!)? dattn_bias=None) -> Tensor"""

_KVCACHE_TAIL = """Tensor? cache_seqlens, Tensor? rotary_cos, Tensor? rotary_sin,
    Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, Tensor? alibi_slopes,
    float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right,
    float softcap, bool rotary_interleaved, SymInt num_splits, *, Tensor? s_aux=None
    ) -> (Tensor out, Tensor softmax_lse)"""
_KVCACHE = "(Tensor q, Tensor k_cache, Tensor v_cache, " + _KVCACHE_TAIL
_KVCACHE_APPEND = (
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, " + _KVCACHE_TAIL
)


# ------------------------------------------------------------------------------------------------
# Fake kernels: shapes and dtypes alone, for torch.compile and torch.export.


def _fake_forward(q, k, v, *args, s_aux=None, attn_bias=None):
    return_softmax = args[7]
    s_dmask = buffers.dense_s_dmask(q, k) if return_softmax else q.new_empty(0)
    return buffers.dense_out(q, v), buffers.dense_lse(q), s_dmask, _fake_rng_state()


def _fake_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    *args,
    s_aux=None,
    attn_bias=None,
):
    s_dmask = q.new_empty(0)
    if return_softmax:
        s_dmask = buffers.varlen_s_dmask(q, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    return buffers.varlen_out(q, v), buffers.varlen_lse(q), s_dmask, _fake_rng_state()


def _fake_rng_state():
    return torch.empty(2, dtype=torch.int64, device="cpu")


def _fake_backward(dout, q, *args, **kwargs):
    return buffers.dense_softmax_d(q)


def _fake_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, *args, **kwargs
):
    return buffers.varlen_softmax_d(q, cu_seqlens_q)


def _fake_kvcache_forward(q, k_cache, v_cache, *args, **kwargs):
    return buffers.dense_out(q, v_cache), buffers.dense_lse(q)


# ------------------------------------------------------------------------------------------------
# Registration


def _into_given(backward):
    """Return ``backward`` as the operator's implementation: autograd sees what it writes."""

    def implementation(*args, ds_aux=None, dattn_bias=None, **kwargs):
        softmax_d = backward(*args, ds_aux=ds_aux, dattn_bias=dattn_bias, **kwargs)
        buffers.raise_versions(*args[6:9], ds_aux, dattn_bias)
        return softmax_d

    return implementation


_library = torch.library.Library("flash_attn", "FRAGMENT")


def _swap(old, new) -> None:
    """Put an operator in another's place wherever this package holds it."""

    def swapped(value):
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return value._replace(**{k: swapped(v) for k, v in value._asdict().items()})
        return new if value is old else value

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("flash_attn.")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if swapped(value) is not value:
                setattr(module, name, swapped(value))


class _Operator(torch.library.Library):
    """The library of one operator."""

    def __init__(self, name: str, *definition):
        super().__init__("flash_attn", "FRAGMENT")
        self.name, self.definition, self.autograd = name, definition, None
        schema, implementation, fake, tags = definition
        self.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        # Implementations read negative views; torch's own way gives up on those written to.
        self.impl(name, torch.library.fallthrough_kernel, "Negative")
        for device in ("CPU", "CUDA"):
            self.impl(name, implementation, device)
        # torch.library.register_fake would give it to an earlier custom_op of this name.
        self._register_fake(name, fake)

    def set_autograd(self, kernel) -> None:
        """Register the kernel that derives gradients."""
        self.autograd = kernel
        self.impl(self.name, kernel, "Autograd", with_keyset=True)

    def _destroy(self) -> None:
        """Give the name away and go on under another: ``torch.library.custom_op`` calls this."""
        old = getattr(torch.ops.flash_attn, self.name)
        # An operator with any kernel stays known: other packages may hold it, too.
        _library.impl(self.name, torch.library.fallthrough_kernel, "PrivateUse3")
        super()._destroy()
        heir = operators[self.name] = _Operator("_own" + self.name, *self.definition)
        if self.autograd is not None:
            heir.set_autograd(self.autograd)
        new = getattr(torch.ops.flash_attn, heir.name)
        _swap(old.default, new.default)
        _swap(old, new)


operators: dict[str, _Operator] = {}


def _define(name: str, schema: str, implementation, fake, tags=()) -> None:
    declared = getattr(torch._library.custom_ops, "OPDEF_TO_LIB", {})
    earlier = declared.pop(f"flash_attn::{name}", None)
    if earlier is not None:
        earlier._destroy()
    declared[f"flash_attn::{name}"] = operators[name] = _Operator(
        name, schema, implementation, fake, tags
    )


# Dropout draws from a generator: two equal calls must not be merged, nor one call be run twice.
_RANDOM = (torch.Tag.nondeterministic_seeded,)

_define("_flash_attn_forward", _FORWARD, kernels.forward, _fake_forward, _RANDOM)
_define(
    "_flash_attn_varlen_forward",
    _VARLEN_FORWARD,
    kernels.varlen_forward,
    _fake_varlen_forward,
    _RANDOM,
)
_define("_flash_attn_backward", _BACKWARD, _into_given(kernels.backward), _fake_backward)
_define(
    "_flash_attn_varlen_backward",
    _VARLEN_BACKWARD,
    _into_given(kernels.varlen_backward),
    _fake_varlen_backward,
)
_define("_flash_attn_kvcache_forward", _KVCACHE, kernels.kvcache_forward, _fake_kvcache_forward)
_define(
    "_flash_attn_kvcache_append_forward",
    _KVCACHE_APPEND,
    kernels.kvcache_append_forward,
    _fake_kvcache_forward,
)
for _name in ("_flash_attn_kvcache_forward", "_flash_attn_kvcache_append_forward"):
    operators[_name].set_autograd(torch.library.fallthrough_kernel)
