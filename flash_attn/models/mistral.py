"""Mistral (https://arxiv.org/abs/2310.06825): configuration and names of Hugging Face."""

from __future__ import annotations

from flash_attn.models._config import GPTOptions
from flash_attn.models._llama_like import decoder_config, decoder_layout
from flash_attn.models._state_dict import Layout

__all__ = ["mistral_config_to_gpt2_config", "mistral_layout"]


def mistral_config_to_gpt2_config(mistral_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.MistralConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    return decoder_config(
        mistral_config, "mistral_config", sliding_window=mistral_config.sliding_window
    )


def mistral_layout(options: GPTOptions) -> Layout:
    """The names of ``MistralForCausalLM``."""
    return decoder_layout(options, "Mistral")
