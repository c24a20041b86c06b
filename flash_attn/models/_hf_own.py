"""A ``config.json`` with the attributes of this package, and weights by its own names: of models
that are of no kind that Hugging Face has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from flash_attn.models._config import FIELDS, GPTOptions, options_of
from flash_attn.models._hf_config import gpt2_config
from flash_attn.models._hf_folder import OWN_TYPE, TOKENS
from flash_attn.models._pretrained import WithoutRandomNumbers
from flash_attn.models._state_dict import SAME, WORDS, Layout, entry, vocabulary

_HEAD = "lm_head.weight"

# How a model was trained and is computed on a machine, not what it is; rows that fill up the
# vocabulary are not written.
_NOT_WRITTEN = (
    "attn_checkpointing",
    "checkpoint_blocks",
    "mlp_checkpoint_lvl",
    "pad_vocab_size_multiple",
    "process_group",
    "sequence_parallel",
)


def own_fields(config) -> dict[str, Any]:
    """Return the fields of ``config.json`` that say what a configuration of this package does."""
    options = options_of(config)
    fields = {name: getattr(options, name) for name in FIELDS if name not in _NOT_WRITTEN}
    fields["window_size"] = list(fields["window_size"])
    tokens = {name: getattr(config, name, None) for name in TOKENS}
    return {"model_type": OWN_TYPE, **fields, **tokens}


def own_config(theirs):
    """Return the configuration that the fields say.

    Raises:
        ValueError: one is not what it may be; the message names it.
    """
    attributes = {name: getattr(theirs, name) for name in FIELDS if name not in _NOT_WRITTEN}
    if isinstance(attributes["window_size"], list):
        attributes["window_size"] = tuple(attributes["window_size"])
    return gpt2_config(theirs, **attributes)


def own_layout(options: GPTOptions) -> Layout:
    """The names of ``GPTLMHeadModel``; the vocabulary is without the rows that fill it up."""
    from flash_attn.models.gpt import GPTLMHeadModel

    alone = SimpleNamespace(**{**vars(options), "process_group": None})
    with WithoutRandomNumbers():  # memory that is not written is not taken
        names = GPTLMHeadModel(alone, dtype=torch.bfloat16).state_dict()
    rows = {WORDS, _HEAD, "lm_head.bias"}
    return Layout(
        "GPTLMHeadModel",
        [entry(n, n, step=vocabulary(options) if n in rows else SAME) for n in names],
        head=_HEAD if options.tie_word_embeddings else None,
        embedding=WORDS,
    )
