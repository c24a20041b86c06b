"""BERT's parameters by Hugging Face's names and by ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from flash_attn.models._state_dict import (
    SAME,
    Entry,
    Layout,
    Step,
    each,
    entry,
    joined,
    linear,
    padded_to,
)

PREFIX = "bert."
_WORDS = "bert.embeddings.word_embeddings.weight"
_BIAS, _DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
_PADDING_LOGIT = -100.0  # of tokens that only fill up the vocabulary


def padded_vocab_size(config) -> int:
    """Return the rows of the embedding: ``vocab_size`` up to ``pad_vocab_size_multiple``."""
    multiple = getattr(config, "pad_vocab_size_multiple", 1)
    return -(-config.vocab_size // multiple) * multiple


def is_cross_attention(config, layer_idx) -> bool:
    """Whether a layer has queries of a subset of the tokens (``last_layer_subset``)."""
    return bool(getattr(config, "last_layer_subset", False)) and (
        layer_idx == config.num_hidden_layers - 1
    )


def _attention(ours: str, theirs: str, config, layer_idx: int) -> list[Entry]:
    size = config.hidden_size
    q, k, v = (f"{theirs}.attention.self.{name}" for name in ("query", "key", "value"))
    if is_cross_attention(config, layer_idx):
        return [
            *linear(f"{ours}.mixer.Wq", q, bias=True),
            *linear(f"{ours}.mixer.Wkv", k, v, bias=True, step=joined([size] * 2)),
        ]
    return linear(f"{ours}.mixer.Wqkv", q, k, v, bias=True, step=joined([size] * 3))


def _layer(config, layer_idx: int) -> list[Entry]:
    ours, theirs = f"bert.encoder.layers.{layer_idx}", f"bert.encoder.layer.{layer_idx}"
    names = {
        "mixer.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    entries = _attention(ours, theirs, config, layer_idx)
    for name, other in names.items():
        entries += linear(f"{ours}.{name}", f"{theirs}.{other}", bias=True)
    return entries


def _predictions(config) -> list[Entry]:
    rows, count = padded_vocab_size(config), config.vocab_size
    bias = each(
        lambda x: F.pad(x, (0, rows - x.shape[0]), value=_PADDING_LOGIT),
        lambda x: x[:count].contiguous(),
    )
    # Theirs have one bias by two names.
    both = Step(lambda ts: bias.to_ours(ts[:1]), lambda ts: bias.to_theirs(ts) * 2)
    head, decoder = "cls.predictions.transform", "cls.predictions.decoder.weight"
    return [
        *linear(f"{head}.dense", f"{head}.dense", bias=True),
        *linear(f"{head}.layer_norm", f"{head}.LayerNorm", bias=True),
        entry(decoder, decoder, step=padded_to(rows, count)),
        entry(_DECODER_BIAS, _BIAS, _DECODER_BIAS, step=both),
    ]


def _layout(config, names: set[str]) -> Layout:
    """Return the layout of a model that has the parts which ``names`` have."""

    def has(part: str) -> bool:
        return any(name.startswith(part) for name in names)

    embeddings = {
        "word_embeddings": padded_to(padded_vocab_size(config), config.vocab_size),
        "position_embeddings": SAME,
        "token_type_embeddings": SAME,
    }
    entries = [
        entry(f"bert.embeddings.{name}.weight", f"bert.embeddings.{name}.weight", step=step)
        for name, step in embeddings.items()
        if name != "token_type_embeddings" or config.type_vocab_size > 0
    ]
    entries += linear("bert.emb_ln", "bert.embeddings.LayerNorm", bias=True)
    for i in range(config.num_hidden_layers):
        entries += _layer(config, i)
    for part in ("bert.pooler.dense", "cls.seq_relationship"):
        entries += linear(part, part, bias=True) if has(part) else []
    entries += _predictions(config) if has("cls.predictions.") else []
    return Layout(
        "BERT",
        entries,
        prefix=PREFIX,
        head="cls.predictions.decoder.weight" if has("cls.predictions.") else None,
        embedding=_WORDS,
        ignored=r"embeddings\.position_ids$",
    )


def _with_prefix(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Put "bert." before the names of ``BertModel`` alone; return whether it was missing, too."""
    lacks = not any(name.startswith(PREFIX) for name in state_dict)
    named = {
        name if not lacks or name.startswith("cls.") else PREFIX + name: x
        for name, x in state_dict.items()
    }
    return named, lacks


def _without_prefix(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(PREFIX) :]: x for name, x in state_dict.items() if name.startswith(PREFIX)}


def remap_state_dict(state_dict: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Convert a state dict of Hugging Face's ``BertModel`` or ``BertForPreTraining``, of today's or
    of the first TensorFlow checkpoints' names.

    Args:
        state_dict: names of ``BertModel`` may lack "bert."; the result's do, then. It is not
            changed.
        config: ``BertConfig`` or the like; honours ``pad_vocab_size_multiple`` and
            ``last_layer_subset``.

    Returns:
        The state dict of the model here, whose tensors may be theirs.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape does not fit; the message has it.
    """
    named, lacks = _with_prefix(state_dict)
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        named = {re.sub(rf"LayerNorm\.{old}$", f"LayerNorm.{new}", n): x for n, x in named.items()}
    for name, other in ((_BIAS, _DECODER_BIAS), (_DECODER_BIAS, _BIAS)):
        if name in named:
            named.setdefault(other, named[name])
    ours = _layout(config, set(named)).to_ours(named)
    return _without_prefix(ours) if lacks else ours


def inv_remap_state_dict(state_dict: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Convert a state dict back to Hugging Face's names: the inverse of ``remap_state_dict``.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape does not fit; the message has it.
    """
    named, lacks = _with_prefix(state_dict)
    theirs = _layout(config, set(named)).to_theirs(named)
    return _without_prefix(theirs) if lacks else theirs
