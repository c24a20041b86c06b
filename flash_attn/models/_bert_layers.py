"""BERT's layers: encoder, pooler and heads."""

from __future__ import annotations

from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn._untouched import is_untouched
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.models._bert_names import is_cross_attention, padded_vocab_size
from flash_attn.modules.block import Block
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.fused_dense import FusedDense, FusedMLP
from flash_attn.ops.triton.layer_norm import layer_norm_fn

_ACTIVATIONS = {
    "gelu": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}


def option(config, name: str):
    return getattr(config, name, False)


def check_config(config) -> None:
    """Raise ValueError for a configuration that the model cannot have."""
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"config.hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {config.hidden_act!r}"
        )
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"config.position_embedding_type must be 'absolute', got {kind!r}")
    if option(config, "last_layer_subset") and not option(config, "dense_seq_output"):
        raise ValueError("config.last_layer_subset needs config.dense_seq_output")
    for name in ("is_decoder", "add_cross_attention"):
        if option(config, name):
            raise ValueError(f"config.{name} must be False: this is an encoder")


def _linear(config):
    return FusedDense if option(config, "fused_bias_fc") else nn.Linear


def create_mixer_cls(config, cross_attn: bool = False, return_residual: bool = False):
    """Return what makes a layer's attention from the size of a token."""
    return partial(
        MHA,
        num_heads=config.num_attention_heads,
        cross_attn=cross_attn,
        dropout=config.attention_probs_dropout_prob,
        causal=False,
        fused_bias_fc=option(config, "fused_bias_fc"),
        use_flash_attn=option(config, "use_flash_attn"),
        return_residual=return_residual,
    )


def create_mlp_cls(config, layer_idx: Optional[int] = None, return_residual: bool = False):
    """Return what makes a layer's MLP from the size of a token.

    Raises:
        ValueError: ``fused_mlp`` with an activation that it does not have.
    """
    approximate = _ACTIVATIONS[config.hidden_act]
    if not option(config, "fused_mlp"):
        return partial(
            Mlp,
            hidden_features=config.intermediate_size,
            activation=partial(F.gelu, approximate=approximate),
            return_residual=return_residual,
        )
    if approximate != "tanh":
        raise ValueError(
            f"config.fused_mlp needs config.hidden_act to be gelu_new, gelu_fast or "
            f"gelu_pytorch_tanh, got {config.hidden_act!r}"
        )
    level = getattr(config, "mlp_checkpoint_lvl", 0)
    if isinstance(level, (list, tuple)):
        level = level[layer_idx]
    return partial(
        FusedMLP,
        hidden_features=config.intermediate_size,
        checkpoint_lvl=level,
        return_residual=return_residual,
    )


def create_block(config, layer_idx: Optional[int] = None) -> Block:
    """Make a layer: attention, dropout, addition, norm, MLP, dropout, addition, norm."""
    cross_attn = is_cross_attention(config, layer_idx)
    # Attention from another sequence would return that one, not the queries' tokens.
    return_residual = not cross_attn
    return Block(
        config.hidden_size,
        create_mixer_cls(config, cross_attn, return_residual),
        create_mlp_cls(config, layer_idx, return_residual),
        norm_cls=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        prenorm=False,
        resid_dropout1=config.hidden_dropout_prob,
        resid_dropout2=config.hidden_dropout_prob,
        fused_dropout_add_ln=option(config, "fused_dropout_add_ln"),
        return_residual=return_residual,
    )


def _init_weights(module: nn.Module, initializer_range: float = 0.02) -> None:
    """Initialise a layer as BERT's authors did."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=initializer_range)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])


class BertEncoder(nn.Module):
    """All layers."""

    def __init__(self, config):
        """Make the layers."""
        super().__init__()
        self.use_flash_attn = option(config, "use_flash_attn")
        self.layers = nn.ModuleList(
            create_block(config, layer_idx=i) for i in range(config.num_hidden_layers)
        )

    def forward(
        self,
        hidden_states: Tensor,
        key_padding_mask: Optional[Tensor] = None,
        subset_mask: Optional[Tensor] = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            hidden_states: ``(batch, seqlen, hidden)``.
            key_padding_mask: bool ``(batch, seqlen)``, True: a token, False: padding.
            subset_mask: bool ``(batch, seqlen)``, the tokens to return, none of them padding; the
                last layer computes these alone if it has ``last_layer_subset``.

        Returns:
            ``(batch, seqlen, hidden)``, 0 in padding with ``use_flash_attn``; with ``subset_mask``
            ``(chosen, hidden)``.
        """
        if key_padding_mask is None and subset_mask is None:
            return self._run(self.layers, hidden_states, {})
        if not self.use_flash_attn:
            padding = {"key_padding_mask": key_padding_mask}
            out = self._run(self.layers, hidden_states, padding)
            return out if subset_mask is None else out[subset_mask]
        batch, seqlen = hidden_states.shape[:2]
        if key_padding_mask is None:
            key_padding_mask = torch.ones_like(subset_mask)
        packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(hidden_states, key_padding_mask)
        packing = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        if subset_mask is None:
            return pad_input(self._run(self.layers, packed, packing), indices, batch, seqlen)
        chosen = subset_mask.flatten()[indices].nonzero()[:, 0]
        last = self.layers[-1]
        if not last.mixer.cross_attn:
            return index_first_axis(self._run(self.layers, packed, packing), chosen)
        packed = self._run(self.layers[:-1], packed, packing)
        count = subset_mask.sum(-1, dtype=torch.int32)
        kwargs = {
            "x_kv": packed,
            "cu_seqlens": F.pad(count.cumsum(0, dtype=torch.int32), (1, 0)),
            "max_seqlen": max_seqlen,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_k": max_seqlen,
        }
        return last(index_first_axis(packed, chosen), mixer_kwargs=kwargs)

    def _run(self, layers, x: Tensor, mixer_kwargs: dict) -> Tensor:
        for layer in layers:
            kwargs = mixer_kwargs
            if layer.mixer.cross_attn and "cu_seqlens" in kwargs:  # its keys are the same tokens
                kwargs = {**kwargs, **{f"{name}_k": x for name, x in kwargs.items()}}
            x = layer(x, mixer_kwargs=kwargs)
        return x


class BertPooler(nn.Module):
    """A layer over each sequence's first token."""

    def __init__(self, config):
        """Make the layer."""
        super().__init__()
        self.dense = _linear(config)(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor, pool: bool = True) -> Tensor:
        """Return ``(batch, hidden)`` of ``(batch, seqlen, hidden)``, or, without ``pool``, of the
        first tokens ``(batch, hidden)``."""
        return self.activation(self.dense(hidden_states[:, 0] if pool else hidden_states))


class BertPredictionHeadTransform(nn.Module):
    """A layer, its activation and a norm before the logits."""

    def __init__(self, config):
        """Make the layers."""
        super().__init__()
        self.dense = _linear(config)(config.hidden_size, config.hidden_size)
        self.transform_act_fn = nn.GELU(approximate=_ACTIVATIONS[config.hidden_act])
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fused_dropout_add_ln = option(config, "fused_dropout_add_ln")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``(..., hidden)`` of ``(..., hidden)``."""
        return normed(self, self.layer_norm, self.transform_act_fn(self.dense(hidden_states)))


def normed(module: nn.Module, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply a norm, by the fused operator if the module has ``fused_dropout_add_ln``."""
    if not module.fused_dropout_add_ln or not is_untouched(norm, nn.LayerNorm):
        return norm(x)
    return layer_norm_fn(x, norm.weight, norm.bias, eps=norm.eps)


class BertLMPredictionHead(nn.Module):
    """Logits of tokens."""

    def __init__(self, config):
        """Make the layers; ``decoder`` has the padded vocabulary."""
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = _linear(config)(config.hidden_size, padded_vocab_size(config), bias=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``(..., vocab)`` of ``(..., hidden)``."""
        return self.decoder(self.transform(hidden_states))


class BertPreTrainingHeads(nn.Module):
    """Logits of tokens, and of whether the second sentence follows the first."""

    def __init__(self, config):
        """Make both heads."""
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, sequence_output: Tensor, pooled_output: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(..., vocab)`` and ``(batch, 2)``."""
        return self.predictions(sequence_output), self.seq_relationship(pooled_output)
