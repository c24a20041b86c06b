"""One new token of each sequence through a GPT's layers, operator after operator.

A step of decoding is small: on a CPU the calls of modules, and of functions that check their
arguments, take longer than the arithmetic. Here the layers of a model are looked through once, and
a step then calls the kernels alone, with arguments made beforehand. What it computes is what the
modules compute. Where anything is unusual (hooks, training, another kind of layer, autocast,
torch.compile, a GPU, a cache that does not fit) it is left to the modules.
"""

from __future__ import annotations

import weakref
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from flash_attn._buffers import raise_versions
from flash_attn._eager import is_plain
from flash_attn._functions import KVCACHE_APPEND
from flash_attn.flash_attn_interface import _score
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.layers.scaled_rotary import ScaledRotaryEmbedding
from flash_attn.modules._inner_attention import FlashCrossAttention, FlashSelfAttention
from flash_attn.modules._kv_cache import block_table_of, cached_lengths, packing_of
from flash_attn.modules.block import Block, StochasticDepth
from flash_attn.modules.embedding import GPT2Embeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp, _gated
from flash_attn.ops._layer_norm import _run_forward as _run_norm
from flash_attn.ops.activations import _SILU
from flash_attn.ops.activations import _run_forward as _run_activation
from flash_attn.ops.triton.layer_norm import RMSNorm

_ROTARY = (RotaryEmbedding, ScaledRotaryEmbedding)
# Classes whose work a step does itself, with what they did when this module was imported.
_CLASSES = (Block, MHA, Mlp, GatedMlp, FusedMLP, nn.Linear, nn.LayerNorm, RMSNorm, nn.Dropout)
_CLASSES += (StochasticDepth, FlashCrossAttention, FlashSelfAttention, *_ROTARY)
_METHODS = attrgetter("forward", "__call__")
_WORK = [_METHODS(kind) for kind in _CLASSES]
_PLACE = attrgetter("is_cpu", "dtype")


class _Norm(NamedTuple):
    """Arguments of the kernel from ``rowscale`` to ``zero_centered_weight``."""

    arguments: tuple

    @classmethod
    def of(cls, norm: nn.Module) -> _Norm:
        weight, bias, is_rms = norm.weight, norm.bias, isinstance(norm, RMSNorm)
        zeros = torch.zeros(2, dtype=torch.int64)  # no dropout
        columns = (weight, bias, None, None, float(norm.eps), 0.0, zeros, is_rms)
        zero_centered = bool(getattr(norm, "zero_centered_weight", False))
        return cls((None, 1.0, None, None, None, *columns, zero_centered))

    def run(self, x: Tensor, residual: Optional[Tensor], out: Tensor, total: Optional[Tensor]):
        """Write the norm of x + residual to ``out``, and the sum to ``total``, ``(batch, dim)``."""
        _run_norm(x, None, residual, *self.arguments, out, None, total, None, None, None, None)


class _Attention(NamedTuple):
    """A layer's mixer."""

    layer_idx: int
    rotary: Optional[nn.Module]
    q_features: int
    heads: tuple  # (nheads, headdim)
    kv_sizes: tuple  # (2, nheads_k, headdim)
    alibi_slopes: Optional[Tensor]
    score: tuple
    sinks: Optional[Tensor]
    normed: Optional[Callable]
    qkv: tuple  # weight and bias
    out: tuple

    @classmethod
    def of(cls, mixer: MHA) -> _Attention:
        inner, heads = mixer.inner_cross_attn, mixer._heads
        rotary = mixer.rotary_emb if mixer.rotary_emb_dim > 0 else None
        scale = heads.head_dim**-0.5 if inner.softmax_scale is None else inner.softmax_scale
        _, *score = _score(None, 0.0, scale, inner.causal, inner.window_size, inner.softcap)
        interleaved = True if rotary is None else bool(rotary.interleaved)
        return cls(
            layer_idx=mixer.layer_idx,
            rotary=rotary,
            q_features=heads.num_heads * heads.head_dim,
            heads=(heads.num_heads, heads.head_dim),
            kv_sizes=(2, heads.num_heads_kv, heads.head_dim),
            alibi_slopes=inner.alibi_slopes,
            score=(*score, interleaved, 0),
            sinks=mixer.sinks,
            normed=None if mixer.q_norm is None else mixer._normed,
            qkv=(mixer.Wqkv.weight, mixer.Wqkv.bias),
            out=(mixer.out_proj.weight, mixer.out_proj.bias),
        )

    def run(self, x: Tensor, cache: Tensor, lengths: Tensor, table, capacity: int) -> Tensor:
        """Return attention of x ``(batch, dim)``, which joins the cache, likewise."""
        batch, count = len(x), self.heads[0]
        qkv = F.linear(x, *self.qkv).view(batch, 1, -1, self.heads[1])
        if self.normed is not None:
            qkv = self.normed(qkv)
        groups = count // self.kv_sizes[1]
        q, k, v = qkv.split((count, count // groups, count // groups), 2)
        cos = sin = None
        if self.rotary is not None:
            cos, sin, *_ = self.rotary._update_cos_sin_cache(capacity, x.device, x.dtype)
        out = x.new_empty((batch, 1, *self.heads))
        k_cache, v_cache = cache.unbind(2)
        KVCACHE_APPEND.function(
            *(q, k_cache, v_cache, k, v, lengths, cos, sin, None, None, table),
            *(self.alibi_slopes, *self.score, self.sinks, out, None),
        )
        raise_versions(cache)
        return F.linear(out.view(batch, self.q_features), *self.out)


# FusedMLP's activations, of a few tokens.
_FUSED = {
    "gelu_approx": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sqrelu": lambda x: F.relu(x).square(),
}


class _Feedforward(NamedTuple):
    """A layer's MLP."""

    fc1: tuple  # weight and bias
    fc2: tuple
    activation: Callable
    is_gated: bool

    @classmethod
    def of(cls, mlp: nn.Module) -> _Feedforward:
        fc1, fc2 = ((fc.weight, fc.bias) for fc in (mlp.fc1, mlp.fc2))
        activation = mlp.activation
        if isinstance(mlp, FusedMLP):
            activation = _FUSED[activation]
        return cls(fc1, fc2, activation, isinstance(mlp, GatedMlp))

    def run(self, x: Tensor) -> Tensor:
        """Return the MLP of x ``(batch, dim)``."""
        hidden = F.linear(x, *self.fc1)
        if not self.is_gated:
            return F.linear(self.activation(hidden), *self.fc2)
        if self.activation is not F.silu:
            return F.linear(_gated(hidden, self.activation), *self.fc2)
        y, gate = hidden.chunk(2, dim=-1)
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        _run_activation(gate, None, y, _SILU, out)
        return F.linear(out, *self.fc2)


class _Layer(NamedTuple):
    norm1: _Norm
    mixer: _Attention
    norm2: _Norm
    mlp: _Feedforward


def _is_own(module: nn.Module) -> bool:
    """Whether no attribute of a module stands before its class's, as a replaced forward does."""
    kind = type(module)
    return not any(callable(getattr(kind, name, None)) for name in module.__dict__)


def _is_norm(norm: nn.Module) -> bool:
    if type(norm) is RMSNorm:
        return norm.drop is None
    return type(norm) is nn.LayerNorm and norm.weight is not None


def _is_mixer(mixer: nn.Module) -> bool:
    if type(mixer) is not MHA or not mixer.use_flash_attn or mixer.layer_idx is None:
        return False
    if mixer.cross_attn or mixer.dwconv or mixer.return_residual:
        return False
    if type(mixer.inner_cross_attn) is not FlashCrossAttention:
        return False
    if mixer.rotary_emb_dim > 0 and type(mixer.rotary_emb) not in _ROTARY:
        return False
    # A single query sees what the cache has, whether the mixer is causal or not.
    return mixer.rotary_emb_dim == 0 or mixer._kernel_rotates(1)


def _is_plain_layer(layer: nn.Module) -> bool:
    """Whether a layer is one that a step can run."""
    if type(layer) is not Block or not layer.prenorm or layer.residual_in_fp32:
        return False
    if not layer._has_mlp or layer.post_norm1 is not None or layer.return_residual:
        return False
    mixer, mlp = layer.mixer, layer.mlp
    if type(mlp) not in (Mlp, GatedMlp, FusedMLP) or mlp.return_residual or not _is_mixer(mixer):
        return False
    of_kind = dict.fromkeys((mixer.Wqkv, mixer.out_proj, mlp.fc1, mlp.fc2), nn.Linear)
    of_kind.update(dict.fromkeys((layer.dropout1, layer.dropout2), nn.Dropout))
    of_kind.update(dict.fromkeys((layer.drop_path1, layer.drop_path2), StochasticDepth))
    if not all(type(module) is kind for module, kind in of_kind.items()):
        return False
    return all(map(_is_norm, (layer.norm1, layer.norm2))) and all(map(_is_own, layer.modules()))


# Modules of which a step knows the parameters, their type and whether they train, no more.
_LEAVES = (nn.Linear, nn.Dropout, StochasticDepth)
_EVERY = {*nn.Module().__dict__} - {"training"}  # attributes of any module


class _Watch:
    """What was found in modules, to see whether it still is what they have.

    A check is a step's, of every token: it is made of a few calls that go over lists.
    """

    def __init__(self, model: nn.Module, inner: list[nn.Module]):
        """Keep what a model and the modules within its layers are made of."""
        self._inner, self._kinds, self._model_kind = inner, list(map(type, inner)), type(model)
        places = [(model.__dict__, name) for name in model.__dict__ if name not in _EVERY]
        parts = [model._modules, model.layers._modules]
        sizes = [model.__dict__, model.layers.__dict__, *parts]
        for module in inner:
            own, is_leaf = module.__dict__, type(module) in _LEAVES
            names = ("training",) if is_leaf else own.keys() - _EVERY
            # Tables of rotary embedding change; "forward" is there if someone replaced it.
            places += [(own, name) for name in (*names, "forward") if name != "_tables"]
            containers = (module._modules, module._parameters, module._buffers)
            parts += [container for container in containers if container]
            sizes += [module._parameters] if is_leaf else [own, *containers]
        self._dicts, self._names = map(list, zip(*places))
        self._parts, self._sizes = parts, sizes
        self._seen, self._seen_sizes = self._found(), list(map(len, sizes))

    def _found(self) -> list:
        attributes = map(dict.get, self._dicts, self._names)
        return [*attributes, *chain.from_iterable(map(dict.values, self._parts))]

    def is_same(self, model: nn.Module) -> bool:
        """Whether everything is as it was."""
        return (
            [*map(len, self._sizes)] == self._seen_sizes
            and [*map(type, self._inner)] == self._kinds
            and type(model) is self._model_kind
            and all(map(is_, self._found(), self._seen))
        )


class DecodeStep:
    """The layers of a ``GPTModel`` for one new token of each sequence."""

    def __init__(self, model: nn.Module):
        """Look a model through, of layers that ``_is_plain_layer`` holds for."""
        self._layers = [
            _Layer(
                _Norm.of(layer.norm1),
                _Attention.of(layer.mixer),
                _Norm.of(layer.norm2),
                _Feedforward.of(layer.mlp),
            )
            for layer in model.layers
        ]
        self._last_norm = _Norm.of(model.ln_f)
        parts = (*model.layers, model.ln_f, model.drop_f)
        inner = [m for part in parts for m in part.modules()]
        self._watch = _Watch(model, inner)
        self._hooks = [
            torch_modules._global_forward_hooks,
            torch_modules._global_forward_pre_hooks,
            *(m._forward_hooks for m in (*inner, model.layers)),
            *(m._forward_pre_hooks for m in (*inner, model.layers)),
        ]
        parameters = [p for m in inner for p in m._parameters.values() if p is not None]
        self._parameter = parameters[0]
        # Those that kernels read as they lie.
        of_linear = {id(p) for m in inner if type(m) is nn.Linear for p in m.parameters()}
        self._bare = [p for p in parameters if id(p) not in of_linear]
        are_readable = all(
            type(p) is nn.Parameter and p.is_cpu and p.is_contiguous() for p in parameters
        )
        is_even = len({p.dtype for p in parameters}) == 1
        self.is_usable = are_readable and is_even and not any(m.training for m in inner)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self._parameter.dtype

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model's layers and parameters are those that were looked through."""
        return self._watch.is_same(model)

    def can_read(self) -> bool:
        """Whether what kernels read is still as it was: ``.data`` may be set at any time."""
        are_contiguous = all(map(Tensor.is_contiguous, self._bare))
        return are_contiguous and {*map(_PLACE, self._bare)} == {(True, self.dtype)}

    def has_hooks(self) -> bool:
        """Whether someone wants to see what modules are called with."""
        return any(self._hooks)

    def _caches(self, x: Tensor, inference_params) -> Optional[list[Tensor]]:
        """Return the layers' caches, where each is there and fits."""
        memory, first = inference_params.key_value_memory_dict, inference_params.batch_size_offset
        is_paged, caches = block_table_of(inference_params) is not None, []
        for layer in self._layers:
            cache = memory.get(layer.mixer.layer_idx)
            if cache is None or cache.shape[2:] != layer.mixer.kv_sizes or cache.dtype != x.dtype:
                return None
            if not is_paged and (first or len(cache) != len(x)):
                cache = cache[first : first + len(x)]
                if len(cache) != len(x):
                    return None
            caches.append(cache)
        return caches

    def run(self, x: Tensor, inference_params) -> Optional[Tensor]:
        """Run the layers and the last norm.

        Args:
            x: embedded tokens, ``(batch, 1, dim)``.

        Returns:
            ``(batch, 1, dim)``; None: the cache is not as a step needs it, nothing was done.
        """
        caches, table = self._caches(x, inference_params), block_table_of(inference_params)
        if caches is None or (table is not None and (table.dim() != 2 or len(table) != len(x))):
            return None
        capacity = caches[0].shape[1] * (1 if table is None else table.shape[1])
        lengths = cached_lengths(len(x), inference_params)
        if not isinstance(lengths, Tensor):
            if not 0 <= lengths < capacity:
                return None  # the modules say what is wrong
            lengths = torch.full((len(x),), lengths, dtype=torch.int32)
        lengths = lengths.contiguous()
        shape, x = x.shape, x.view(len(x), -1)
        out, *totals = (torch.empty_like(x) for _ in range(3))
        residual = None
        for (norm1, mixer, norm2, mlp), cache in zip(self._layers, caches):
            total = x if residual is None else totals[0]
            norm1.run(x, residual, out, None if residual is None else total)
            x = mixer.run(out, cache, lengths, table, capacity)
            norm2.run(x, total, out, totals[1])
            x, residual = mlp.run(out), totals[1]
        self._last_norm.run(x, residual, out, None)
        return out.view(shape)


def _is_plain_model(model: nn.Module) -> bool:
    from flash_attn.models.gpt import GPTModel  # which imports this module

    # Methods that a step does the work of.
    for name in ("_run_layers", "_final_norm", "_mixer_kwargs"):
        if getattr(type(model), name) is not getattr(GPTModel, name) or name in model.__dict__:
            return False
    if model.process_group is not None or not model.prenorm or model.parallel_block:
        return False
    if type(model.embeddings) is not GPT2Embeddings or type(model.layers) is not nn.ModuleList:
        return False
    last = (model.ln_f, model.drop_f)
    if not _is_norm(model.ln_f) or type(model.drop_f) is not nn.Dropout:
        return False
    return all(map(_is_own, (model.layers, *last))) and all(map(_is_plain_layer, model.layers))


def _new_step(model: nn.Module) -> Optional[DecodeStep]:
    return DecodeStep(model) if _is_plain_model(model) else None


_STEPS: weakref.WeakKeyDictionary[nn.Module, Optional[DecodeStep]] = weakref.WeakKeyDictionary()


def decode_step(model: nn.Module, x: Tensor, inference_params) -> Optional[Tensor]:
    """Run a ``GPTModel``'s layers and last norm, if that can be done without its modules.

    Args:
        x: embedded tokens, ``(batch, seqlen, dim)``.

    Returns:
        ``(batch, seqlen, dim)``, or None, where nothing was done.
    """
    is_step = x.dim() == 3 and x.shape[1] == 1 and x.is_cpu and x.is_contiguous() and len(x)
    if not is_step or model.training or torch.is_grad_enabled() or not is_plain():
        return None
    if type(x) is not Tensor or packing_of(inference_params) is not None:
        return None
    if [*map(_METHODS, _CLASSES)] != _WORK:
        return None
    step = _STEPS.get(model, _STEPS)  # itself: not looked through yet
    if step is _STEPS or (step is not None and not step.is_current(model)):
        step = _STEPS[model] = _new_step(model)
    if step is None or not step.is_usable or step.has_hooks() or x.dtype != step.dtype:
        return None
    return step.run(x, inference_params) if step.can_read() else None
