"""What a GPT's configuration says: every attribute with its default, checked, and what follows.

A configuration is ``transformers.GPT2Config`` or any object with its attributes; those that
``GPT2Config`` does not have are read where they are, and have the defaults of ``FIELDS`` elsewhere.
docs/models.md says what each one means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional

from flash_attn.layers.scaled_rotary import check_scaling

FULL, SLIDING = "full_attention", "sliding_attention"

# Of these, activation(y) * gate in place of activation(y).
GATED = ("glu", "swiglu", "geglu", "geglu_approx", "reglu")
GELU_APPROX = ("gelu_new", "gelu_fast", "gelu_approx", "gelu_pytorch_tanh")
ACTIVATIONS = ("gelu", *GELU_APPROX, "relu", "sqrelu", "silu", *GATED)


class Kind(NamedTuple):
    """What an attribute may be."""

    holds: Callable[[Any], bool]
    expected: str

    def or_none(self) -> Kind:
        return Kind(lambda x: x is None or self.holds(x), f"{self.expected} or None")


def _is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _is_pair(x) -> bool:
    return isinstance(x, (list, tuple)) and len(x) == 2 and all(_is_int(n) and n >= -1 for n in x)


def _is_level(x) -> bool:
    return _is_int(x) and 0 <= x <= 2


FLAG = Kind(lambda x: isinstance(x, bool), "True or False")
COUNT = Kind(lambda x: _is_int(x) and x >= 1, "a positive int")
COUNT_OR_0 = Kind(lambda x: _is_int(x) and x >= 0, "an int of at least 0")
POSITIONS = Kind(_is_int, "an int")
POSITIVE = Kind(lambda x: _is_number(x) and x > 0, "a positive number")
NOT_NEGATIVE = Kind(lambda x: _is_number(x) and x >= 0, "a number of at least 0")
NUMBER = Kind(_is_number, "a number")
PROBABILITY = Kind(lambda x: _is_number(x) and 0 <= x < 1, "a probability below 1")
FRACTION = Kind(lambda x: _is_number(x) and 0 <= x <= 1, "a fraction from 0 to 1")
PAIR = Kind(_is_pair, "(left, right), ints of at least -1")
ACTIVATION = Kind(lambda x: x in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
LEVELS = Kind(
    lambda x: _is_level(x) or (isinstance(x, (list, tuple)) and all(map(_is_level, x))),
    "0, 1 or 2, or a list of these for the layers",
)
TYPES = Kind(
    lambda x: isinstance(x, (list, tuple)) and all(t in (FULL, SLIDING) for t in x),
    f"a list of {FULL!r} and {SLIDING!r}",
)
FLAGS = Kind(
    lambda x: isinstance(x, (list, tuple)) and all(isinstance(flag, bool) for flag in x),
    "a list of True and False",
)
ANYTHING = Kind(lambda x: True, "anything")

# Attributes of GPT2Config, with its own defaults.
STOCK = {
    "vocab_size": (50257, COUNT),
    "n_positions": (1024, POSITIONS),
    "n_embd": (768, COUNT),
    "n_layer": (12, COUNT),
    "n_head": (12, COUNT),
    "n_inner": (None, COUNT.or_none()),
    "activation_function": ("gelu_new", ACTIVATION),
    "resid_pdrop": (0.1, PROBABILITY),
    "embd_pdrop": (0.1, PROBABILITY),
    "attn_pdrop": (0.1, PROBABILITY),
    "layer_norm_epsilon": (1e-5, POSITIVE),
    "initializer_range": (0.02, NOT_NEGATIVE),
    "scale_attn_weights": (True, FLAG),
    "scale_attn_by_inverse_layer_idx": (False, FLAG),
    "tie_word_embeddings": (True, FLAG),
}

# Attributes of the FlashAttention package.
PACKAGE = {
    "n_head_kv": (None, COUNT.or_none()),
    "head_dim": (None, COUNT.or_none()),
    "qkv_proj_bias": (True, FLAG),
    "out_proj_bias": (True, FLAG),
    "mlp_fc1_bias": (True, FLAG),
    "mlp_fc2_bias": (True, FLAG),
    "mlp_multiple_of": (128, COUNT),
    "lm_head_bias": (False, FLAG),
    "norm_head": (False, FLAG),
    "word_embed_proj_dim": (None, COUNT.or_none()),
    "pad_vocab_size_multiple": (1, COUNT),
    "prenorm": (True, FLAG),
    "rms_norm": (False, FLAG),
    "parallel_block": (False, FLAG),
    "parallel_block_tied_norm": (False, FLAG),
    "rotary_emb_fraction": (0.0, FRACTION),
    "rotary_emb_base": (10000.0, POSITIVE),
    "rotary_emb_scale_base": (None, POSITIVE.or_none()),
    "rotary_emb_interleaved": (False, FLAG),
    "use_alibi": (False, FLAG),
    "window_size": ((-1, -1), PAIR),
    "attn_dwconv": (False, FLAG),
    "use_flash_attn": (True, FLAG),
    "fused_bias_fc": (False, FLAG),
    "fused_mlp": (False, FLAG),
    "fused_dense_sqrelu_dense": (False, FLAG),
    "fused_dropout_add_ln": (False, FLAG),
    "mlp_checkpoint_lvl": (0, LEVELS),
    "residual_in_fp32": (False, FLAG),
    "sequence_parallel": (True, FLAG),
    "process_group": (None, ANYTHING),
    "mup_width_scale": (1.0, POSITIVE),
    "mup_embeddings_multiplier": (1.0, NUMBER),
    "mup_output_multiplier": (1.0, NUMBER),
    "mup_attn_multiplier": (1.0, NUMBER),
    "mup_scale_qk_dot_by_d": (False, FLAG),
}

# Attributes of this package alone.
OWN = {
    "alibi_scale": (1.0, POSITIVE),
    "attn_checkpointing": (False, FLAG),
    "attn_sinks": (False, FLAG),
    "attn_softcap": (0.0, NOT_NEGATIVE),
    "checkpoint_blocks": (False, FLAG),
    "embedding_scale": (None, NUMBER.or_none()),
    "final_logit_softcap": (0.0, NOT_NEGATIVE),
    "layer_types": (None, TYPES.or_none()),
    "position_embeddings_offset": (0, COUNT_OR_0),
    "qk_norm": (False, FLAG),
    "query_pre_attn_scalar": (None, POSITIVE.or_none()),
    "rms_norm_zero_centered": (False, FLAG),
    "rotary_emb_layers": (None, FLAGS.or_none()),
    "rotary_emb_local_base": (None, POSITIVE.or_none()),
    "rotary_emb_scaling": (None, ANYTHING),
    "sandwich_norm": (False, FLAG),
    "sliding_window": (None, COUNT.or_none()),
}

FIELDS = {**STOCK, **PACKAGE, **OWN}


def field_value(config, name: str) -> Any:
    """Return an attribute of the configuration, or its default.

    Raises:
        ValueError: it is not what it may be; the message names it and its value.
    """
    default, kind = FIELDS[name]
    value = getattr(config, name, default)
    if value is None:  # as files of configurations have it
        value = default
    if not kind.holds(value):
        raise ValueError(f"config.{name} must be {kind.expected}, got {value!r:.80}")
    return value


class GPTOptions(SimpleNamespace):
    """The attributes of ``FIELDS``, resolved: ``n_head_kv``, ``head_dim`` and ``n_inner`` are
    numbers, ``mlp_checkpoint_lvl`` and ``layer_types`` lists of ``n_layer``."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: ``vocab_size``, rounded up to ``pad_vocab_size_multiple``."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    @property
    def is_gated(self) -> bool:
        return self.activation_function in GATED

    @property
    def hidden_features(self) -> int:
        """Hidden features of the MLP; of a gated one rounded up to ``mlp_multiple_of``."""
        if not self.is_gated:
            return self.n_inner
        return -(-self.n_inner // self.mlp_multiple_of) * self.mlp_multiple_of

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary embedding turns."""
        return int(self.rotary_emb_fraction * self.head_dim)

    def turns(self, layer_idx: Optional[int]) -> bool:
        """Whether queries and keys of the layer have a rotary embedding."""
        if self.rotary_emb_layers is None or layer_idx is None:
            return self.rotary_dim > 0
        return self.rotary_dim > 0 and self.rotary_emb_layers[layer_idx]

    @property
    def qkv_features(self) -> int:
        """Rows of ``Wqkv``."""
        return (self.n_head + 2 * self.n_head_kv) * self.head_dim

    def is_sliding(self, layer_idx: Optional[int]) -> bool:
        """Whether the layer sees ``sliding_window`` tokens alone."""
        if self.layer_types is None or layer_idx is None:
            return self.sliding_window is not None and self.layer_types is None
        return self.layer_types[layer_idx] == SLIDING

    def window(self, layer_idx: Optional[int]) -> tuple[int, int]:
        """The layer's ``window_size``."""
        if self.is_sliding(layer_idx):
            return (self.sliding_window - 1, 0)
        return tuple(self.window_size)

    def softmax_scale(self, layer_idx: Optional[int]) -> float:
        """What scores of the layer are multiplied by."""
        if self.query_pre_attn_scalar is not None:
            scale = self.query_pre_attn_scalar**-0.5
        elif not self.scale_attn_weights:
            scale = 1.0
        else:
            scale = self.head_dim ** (-1.0 if self.mup_scale_qk_dot_by_d else -0.5)
        scale *= self.mup_attn_multiplier
        return scale / (layer_idx + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def checkpoint_level(self, layer_idx: Optional[int]) -> int:
        levels = self.mlp_checkpoint_lvl
        return levels if isinstance(levels, int) else levels[layer_idx or 0]


def options_of(config, process_group=None) -> GPTOptions:
    """Return what a configuration says, for a model over ``process_group``.

    Raises:
        ValueError: an attribute is not what it may be, or contradicts another one; the message
            names it and its value.
    """
    options = GPTOptions(**{name: field_value(config, name) for name in FIELDS})
    if process_group is not None:
        options.process_group = process_group
    if getattr(config, "add_cross_attention", False):
        raise ValueError("config.add_cross_attention must be False, got True")
    _resolve_heads(options)
    if options.n_inner is None:
        factor = 8 / 3 if options.is_gated else 4
        options.n_inner = int(factor * options.n_embd)
    for check in (_check_layers, _check_rotary, _check_blocks, _check_mlp, _check_head):
        check(options)
    if options.process_group is not None:
        _check_parallel(options)
    return options


def _contradiction(options: GPTOptions, name: str, needed: str) -> ValueError:
    return ValueError(f"config.{name} ({getattr(options, name)!r:.80}) needs {needed}")


def _resolve_heads(options: GPTOptions) -> None:
    if options.head_dim is None:
        if options.n_embd % options.n_head:
            raise ValueError(
                f"config.n_embd ({options.n_embd}) must be a multiple of config.n_head "
                f"({options.n_head}) where config.head_dim is not given"
            )
        options.head_dim = options.n_embd // options.n_head
    options.n_head_kv = options.n_head_kv or options.n_head
    if options.n_head % options.n_head_kv:
        raise ValueError(
            f"config.n_head ({options.n_head}) must be a multiple of config.n_head_kv "
            f"({options.n_head_kv})"
        )


def _check_layers(options: GPTOptions) -> None:
    for name in ("layer_types", "rotary_emb_layers", "mlp_checkpoint_lvl"):
        value = getattr(options, name)
        if isinstance(value, (list, tuple)) and len(value) != options.n_layer:
            raise ValueError(
                f"config.{name} must have an entry for each of {options.n_layer} layers, got "
                f"{len(value)}: {value!r:.80}"
            )
    types = options.layer_types
    if types is not None and SLIDING in types and options.sliding_window is None:
        raise _contradiction(options, "layer_types", "config.sliding_window")
    if options.sliding_window is not None and tuple(options.window_size) != (-1, -1):
        raise _contradiction(options, "sliding_window", "config.window_size (-1, -1)")


def _check_rotary(options: GPTOptions) -> None:
    if options.alibi_scale != 1.0 and not options.use_alibi:
        raise _contradiction(options, "alibi_scale", "config.use_alibi=True")
    part = f"config.rotary_emb_fraction ({options.rotary_emb_fraction}) must turn"
    if options.rotary_dim % 2:
        raise ValueError(
            f"{part} an even part of head_dim {options.head_dim}, it is {options.rotary_dim}"
        )
    if options.rotary_emb_fraction > 0.0 and options.rotary_dim == 0:
        raise ValueError(f"{part} 2 or more elements of head_dim {options.head_dim}, or be 0")
    elsewhere = ("rotary_emb_layers", "rotary_emb_scaling", "rotary_emb_local_base")
    for name in (*elsewhere, "rotary_emb_scale_base"):
        if getattr(options, name) is not None and options.rotary_dim == 0:
            raise _contradiction(options, name, "config.rotary_emb_fraction above 0")
    scaling = options.rotary_emb_scaling
    if scaling is not None:
        check_scaling(scaling, options.rotary_dim, "config.rotary_emb_scaling")
        if options.rotary_emb_scale_base is not None:
            raise _contradiction(options, "rotary_emb_scaling", "no config.rotary_emb_scale_base")
    if options.position_embeddings_offset and options.n_positions <= 0:
        raise _contradiction(options, "position_embeddings_offset", "config.n_positions above 0")


def _check_blocks(options: GPTOptions) -> None:
    for name in ("parallel_block", "sandwich_norm", "residual_in_fp32"):
        if getattr(options, name) and not options.prenorm:
            raise _contradiction(options, name, "config.prenorm=True")
    if options.parallel_block_tied_norm and not options.parallel_block:
        raise _contradiction(options, "parallel_block_tied_norm", "config.parallel_block=True")
    if options.sandwich_norm and options.parallel_block:
        raise _contradiction(options, "sandwich_norm", "config.parallel_block=False")
    if options.rms_norm_zero_centered and not options.rms_norm:
        raise _contradiction(options, "rms_norm_zero_centered", "config.rms_norm=True")


def _check_mlp(options: GPTOptions) -> None:
    activation = options.activation_function
    fused = (*GELU_APPROX, "relu", "sqrelu")
    if options.fused_mlp and activation not in fused:
        needed = f"config.activation_function to be one of {', '.join(fused)}, got {activation!r}"
        raise _contradiction(options, "fused_mlp", needed)
    if options.fused_dense_sqrelu_dense and activation != "sqrelu":
        needed = f"config.activation_function 'sqrelu', got {activation!r}"
        raise _contradiction(options, "fused_dense_sqrelu_dense", needed)
    if options.fused_mlp and options.fused_dense_sqrelu_dense:
        raise _contradiction(options, "fused_mlp", "config.fused_dense_sqrelu_dense=False")
    levels = options.mlp_checkpoint_lvl
    is_fused = options.fused_mlp or options.fused_dense_sqrelu_dense
    if levels != 0 and not is_fused:
        raise _contradiction(options, "mlp_checkpoint_lvl", "config.fused_mlp=True")


def _check_head(options: GPTOptions) -> None:
    if options.norm_head and options.lm_head_bias:
        raise _contradiction(options, "norm_head", "config.lm_head_bias=False")


def _check_parallel(options: GPTOptions) -> None:
    for name in ("attn_dwconv", "word_embed_proj_dim", "norm_head", "fused_dense_sqrelu_dense"):
        if getattr(options, name):
            raise _contradiction(options, name, "no process_group")
