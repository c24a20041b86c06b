"""The ``config.json`` of a model that was made here rather than read from a folder."""

from __future__ import annotations

from typing import Any, Optional

from flash_attn.models._config import GELU_APPROX, STOCK, GPTOptions, options_of
from flash_attn.models._hf import converted_config
from flash_attn.models._hf_folder import TOKENS
from flash_attn.models._hf_own import own_fields
from flash_attn.models._hf_save import difference

_OF_TRANSFORMERS = ("gelu", "relu", "silu", *(x for x in GELU_APPROX if x != "gelu_approx"))


def _gpt2(options: GPTOptions) -> Optional[dict[str, Any]]:
    if options.activation_function not in _OF_TRANSFORMERS or options.n_positions < 1:
        return None
    fields = {name: getattr(options, name) for name in STOCK}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **fields}


def _llama_like(
    options: GPTOptions, model_type: str, architecture: str, max_positions: int
) -> Optional[dict[str, Any]]:
    if options.activation_function != "swiglu":
        return None
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": options.vocab_size,
        "hidden_size": options.n_embd,
        "intermediate_size": options.hidden_features,
        "num_hidden_layers": options.n_layer,
        "num_attention_heads": options.n_head,
        "num_key_value_heads": options.n_head_kv,
        "head_dim": options.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": options.initializer_range,
        "rms_norm_eps": options.layer_norm_epsilon,
        "tie_word_embeddings": options.tie_word_embeddings,
        "attention_dropout": options.attn_pdrop,
        "sliding_window": None,
        "rope_theta": options.rotary_emb_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": options.rotary_emb_base},
    }


def fields_of(config, max_positions: int) -> dict[str, Any]:
    """Return the fields of ``config.json`` with which ``to_hf`` writes a model: of GPT-2, Mistral
    or Qwen 3 where it is one of these, else those of this package, which ``from_hf`` alone reads.

    Args:
        config: the model's.
        max_positions: of a sequence, where its configuration does not limit it.
    """
    options = options_of(config)
    tokens = {name: getattr(config, name, None) for name in TOKENS}
    for fields in (
        _gpt2(options),
        _llama_like(options, "mistral", "MistralForCausalLM", max_positions),
        _llama_like(options, "qwen3", "Qwen3ForCausalLM", max_positions),
    ):
        if fields is None:
            continue
        fields |= tokens
        if difference(config, converted_config(fields, {})[0]) is None:
            return fields
    return own_fields(config)
