"""BERT, whose padding is removed before the first layer.

The configuration is ``transformers.BertConfig`` or an object with its attributes, and these:
``use_flash_attn`` (attend through the kernels, without padding), ``pad_vocab_size_multiple``,
``fused_dropout_add_ln``, ``fused_mlp``, ``mlp_checkpoint_lvl``, ``fused_bias_fc``,
``dense_seq_output`` (logits of the masked tokens alone), ``last_layer_subset`` (with it: the last
layer computes those and the first token alone), ``use_xentropy`` (the fused cross entropy). All of
them may be missing.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from flash_attn._arguments import check_optional, check_tensors
from flash_attn.bert_padding import index_first_axis
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models._base import check_state_dict
from flash_attn.models._bert_layers import (
    BertEncoder,
    BertLMPredictionHead,
    BertPooler,
    BertPredictionHeadTransform,
    BertPreTrainingHeads,
    _init_weights,
    check_config,
    create_block,
    create_mixer_cls,
    create_mlp_cls,
    normed,
    option,
)
from flash_attn.models._bert_names import (
    PREFIX,
    inv_remap_state_dict,
    padded_vocab_size,
    remap_state_dict,
)
from flash_attn.modules.embedding import BertEmbeddings

__all__ = [
    "BertEncoder",
    "BertForPreTraining",
    "BertForPreTrainingOutput",
    "BertLMPredictionHead",
    "BertModel",
    "BertModelOutput",
    "BertPooler",
    "BertPreTrainedModel",
    "BertPreTrainingHeads",
    "BertPredictionHeadTransform",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "inv_remap_state_dict",
    "remap_state_dict",
]

logger = logging.getLogger(__name__)


class BertModelOutput(NamedTuple):
    """What ``BertModel`` returns.

    last_hidden_state: ``(batch, seqlen, hidden)``; with ``masked_tokens_mask`` ``(masked,
        hidden)``.
    pooler_output: ``(batch, hidden)``; None without a pooling layer.
    """

    last_hidden_state: Tensor
    pooler_output: Optional[Tensor]


class BertForPreTrainingOutput(NamedTuple):
    """What ``BertForPreTraining`` returns.

    loss: fp32, the sum of the losses that there are labels for; None without labels.
    prediction_logits: ``(batch, seqlen, vocab)``; with ``dense_seq_output`` and labels ``(masked,
        vocab)``.
    seq_relationship_logits: ``(batch, 2)``.
    """

    loss: Optional[Tensor]
    prediction_logits: Tensor
    seq_relationship_logits: Tensor


class BertPreTrainedModel(nn.Module):
    """What both models have in common: a configuration, and weights from files."""

    def __init__(self, config, *inputs, **kwargs):
        """Keep the configuration.

        Raises:
            ValueError: an attribute is wrong; the message names it and its value.
        """
        super().__init__()
        check_config(config)
        self.config = config

    @classmethod
    def from_pretrained(cls, model_name, config, *inputs, **kwargs):
        """Make a model with the weights of a checkpoint.

        Args:
            model_name: folder, or name on Hugging Face's hub, of ``BertModel``,
                ``BertForPreTraining`` or another model that has them.
            config: of the model here.
            *inputs, **kwargs: further arguments of the class; ``strict``, False: parameters that
                the checkpoint lacks stay as they were initialised; ``device`` and ``dtype`` of the
                parameters.

        Raises:
            FileNotFoundError, ValueError, RuntimeError: there is no such checkpoint, it is damaged,
                or does not fit the configuration.
        """
        from flash_attn.utils.pretrained import state_dict_from_pretrained

        strict = kwargs.pop("strict", True)
        factory = {name: kwargs.pop(name, None) for name in ("device", "dtype")}
        state_dict = state_dict_from_pretrained(model_name, dtype=factory["dtype"])
        state_dict = _of_bert(state_dict)
        if not any(name.startswith("bert.encoder.layers.") for name in state_dict):
            state_dict = remap_state_dict(state_dict, config)
        model = cls(config, *inputs, **kwargs)
        if not isinstance(model, BertForPreTraining):
            start = len(PREFIX)
            state_dict = {n[start:]: x for n, x in state_dict.items() if n.startswith(PREFIX)}
            if model.pooler is None:
                state_dict = {n: x for n, x in state_dict.items() if not n.startswith("pooler.")}
        check_state_dict(model, state_dict, strict)
        missing = model.load_state_dict(state_dict, strict=strict).missing_keys
        if missing:
            logger.warning("%s lacks %s: newly initialised", model_name, ", ".join(missing))
        return model.to(**factory)


def _of_bert(state_dict: dict) -> dict:
    """Return names with "bert.", without those of other heads."""
    if not any(name.startswith(PREFIX) for name in state_dict):
        return {n if n.startswith("cls.") else PREFIX + n: x for n, x in state_dict.items()}
    return {n: x for n, x in state_dict.items() if n.startswith((PREFIX, "cls."))}


class BertModel(BertPreTrainedModel):
    """Embeddings, layers and pooler."""

    def __init__(self, config, add_pooling_layer: bool = True):
        """Make the model.

        Args:
            config: described at the head of this module.
            add_pooling_layer: whether it has a pooler.

        Raises:
            ValueError: an attribute of the configuration is wrong.
        """
        super().__init__(config)
        self.fused_dropout_add_ln = option(config, "fused_dropout_add_ln")
        self.embeddings = BertEmbeddings(
            config.hidden_size,
            padded_vocab_size(config),
            config.max_position_embeddings,
            config.type_vocab_size,
            padding_idx=config.pad_token_id,
        )
        self.emb_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.emb_drop = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        with torch.no_grad():
            self.apply(partial(_init_weights, initializer_range=config.initializer_range))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        token_type_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        masked_tokens_mask: Optional[Tensor] = None,
    ) -> BertModelOutput:
        """Run the model.

        Args:
            input_ids: ``(batch, seqlen)`` int64 or int32.
            position_ids: ``(batch, seqlen)`` or ``(seqlen,)``; None: 0 to seqlen - 1.
            token_type_ids: likewise; None: all 0.
            attention_mask: ``(batch, seqlen)``, not 0: a token, 0: padding; None: no padding.
            masked_tokens_mask: bool ``(batch, seqlen)``: return the hidden states of these tokens
                alone, packed. Padding among them does not count.

        Raises:
            ValueError: a shape is wrong; with a pooler, sequences without tokens, or, with
                ``masked_tokens_mask`` or ``use_flash_attn``, one that begins with padding.
        """
        check_tensors(input_ids=input_ids)
        masks = {"attention_mask": attention_mask, "masked_tokens_mask": masked_tokens_mask}
        check_optional(**masks)
        for name, mask in masks.items():
            if mask is not None and mask.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must be {tuple(input_ids.shape)} as input_ids, got {tuple(mask.shape)}"
                )
        if self.pooler is not None and input_ids.dim() == 2 and input_ids.shape[1] == 0:
            raise ValueError(
                "input_ids must have a token in every sequence, whose first one is pooled, got "
                f"{tuple(input_ids.shape)}"
            )
        x = self.embeddings(input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
        x = self.emb_drop(normed(self, self.emb_ln, x))
        mask = None if attention_mask is None else attention_mask.bool()
        if masked_tokens_mask is None:
            if self.encoder.use_flash_attn:  # which leaves padding out
                self._check_first(mask)
            out = self.encoder(x, key_padding_mask=mask)
            return BertModelOutput(out, None if self.pooler is None else self.pooler(out))
        return self._forward_subset(x, mask, masked_tokens_mask.bool())

    def _check_first(self, mask: Optional[Tensor]) -> None:
        """Raise ValueError if padding would be pooled, bool ``(batch, seqlen)`` True for tokens."""
        if self.pooler is not None and mask is not None and not bool(mask[:, 0].all()):
            raise ValueError(
                "attention_mask must have a token first in every sequence: it is pooled"
            )

    def _forward_subset(self, x: Tensor, mask: Optional[Tensor], masked: Tensor) -> BertModelOutput:
        """Return the hidden states of some tokens, and the pooled first ones."""
        if mask is not None:
            masked = masked & mask
        if self.pooler is None:
            return BertModelOutput(self.encoder(x, mask, masked), None)
        self._check_first(mask)
        subset = masked.clone()
        subset[:, 0] = True
        is_first = torch.zeros_like(masked)
        is_first[:, 0] = True
        out = self.encoder(x, mask, subset)
        pooled = self.pooler(out[is_first[subset]], pool=False)
        return BertModelOutput(out[masked[subset]], pooled)


_IGNORED = -100  # the label of tokens that do not count in Hugging Face's data collators


class BertForPreTraining(BertPreTrainedModel):
    """``BertModel`` with both heads of pretraining and their losses."""

    def __init__(self, config):
        """Make the model; the decoder's weight is that of the word embeddings.

        Raises:
            ValueError: an attribute of the configuration is wrong.
        """
        super().__init__(config)
        self.dense_seq_output = option(config, "dense_seq_output")
        self.last_layer_subset = option(config, "last_layer_subset")
        loss = CrossEntropyLoss if option(config, "use_xentropy") else nn.CrossEntropyLoss
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.mlm_loss = loss(ignore_index=0)
        self.nsp_loss = loss(ignore_index=-1)
        with torch.no_grad():
            self.cls.apply(partial(_init_weights, initializer_range=config.initializer_range))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the decoder's weight that of the word embeddings."""
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        token_type_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        next_sentence_label: Optional[Tensor] = None,
    ) -> BertForPreTrainingOutput:
        """Run the model.

        Args:
            labels: int64 ``(batch, seqlen)``, the masked tokens; 0 or -100: not masked, and those
                of padding do not count.
            next_sentence_label: int64 ``(batch,)``, 0: the second sentence follows the first, 1: it
                does not, -1: it does not count.

        The other arguments are those of ``BertModel``.

        Raises:
            ValueError: as for ``BertModel``.
        """
        check_optional(labels=labels, next_sentence_label=next_sentence_label)
        if labels is not None:
            labels = labels.masked_fill(labels == _IGNORED, 0)
        if labels is not None and attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, 0)
        is_dense = self.dense_seq_output and labels is not None
        masked = labels > 0 if is_dense and self.last_layer_subset else None
        sequence, pooled = self.bert(
            input_ids, position_ids, token_type_ids, attention_mask, masked_tokens_mask=masked
        )
        if is_dense:
            places = (labels.flatten() > 0).nonzero()[:, 0]
            labels = labels.flatten()[places]
            if masked is None:
                sequence = index_first_axis(sequence.flatten(0, 1), places)
        logits, relationship = self.cls(sequence, pooled)
        losses = []
        if labels is not None:
            losses.append(self.mlm_loss(logits.flatten(0, -2), labels.flatten()).float())
        if next_sentence_label is not None:
            losses.append(self.nsp_loss(relationship, next_sentence_label.flatten()).float())
        return BertForPreTrainingOutput(sum(losses) if losses else None, logits, relationship)
