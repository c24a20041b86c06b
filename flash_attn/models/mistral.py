"""Mistral (https://arxiv.org/abs/2310.06825), Ministral: configuration, names of Hugging Face."""

from __future__ import annotations

from flash_attn.models._config import FULL, SLIDING, GPTOptions
from flash_attn.models._llama_like import decoder_config, decoder_layout, windows
from flash_attn.models._state_dict import Layout

__all__ = ["ministral_config_to_gpt2_config", "mistral_config_to_gpt2_config", "mistral_layout"]


def mistral_config_to_gpt2_config(mistral_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.MistralConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    return decoder_config(
        mistral_config, "mistral_config", sliding_window=mistral_config.sliding_window
    )


def ministral_config_to_gpt2_config(ministral_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.MinistralConfig``: Mistral with
    windows by layer.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs, name = ministral_config, "ministral_config"
    types = [FULL if theirs.sliding_window is None else SLIDING] * theirs.num_hidden_layers
    return decoder_config(theirs, name, **windows(theirs, types, name))


def mistral_layout(options: GPTOptions) -> Layout:
    """The names of ``MistralForCausalLM`` and ``MinistralForCausalLM``."""
    return decoder_layout(options, "Mistral")
