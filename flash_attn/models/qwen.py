"""Qwen2 (https://arxiv.org/abs/2407.10671) and Qwen3 (https://arxiv.org/abs/2505.09388):
configuration and names of Hugging Face."""

from __future__ import annotations

from typing import Optional

from flash_attn.models._config import FULL, SLIDING, GPTOptions
from flash_attn.models._llama_like import attention_bias, decoder_config, decoder_layout, windows
from flash_attn.models._state_dict import Layout

__all__ = [
    "qwen2_config_to_gpt2_config",
    "qwen2_layout",
    "qwen3_config_to_gpt2_config",
    "qwen3_layout",
]


def _layer_types(theirs) -> Optional[list[str]]:
    """The last layers have a window, where any has."""
    if theirs.sliding_window is None:
        return None
    first = theirs.max_window_layers
    return [SLIDING if i >= first else FULL for i in range(theirs.num_hidden_layers)]


def _windows(theirs, kind: str) -> dict:
    if not theirs.use_sliding_window:  # which files have beside a window that is not used
        return {}
    return windows(theirs, _layer_types(theirs), kind)


def qwen2_config_to_gpt2_config(qwen2_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.Qwen2Config``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    name = "qwen2_config"
    return decoder_config(qwen2_config, name, qkv_proj_bias=True, **_windows(qwen2_config, name))


def qwen2_layout(options: GPTOptions) -> Layout:
    """The names of ``Qwen2ForCausalLM``."""
    return decoder_layout(options, "Qwen2")


def qwen3_config_to_gpt2_config(qwen3_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.Qwen3Config``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    name = "qwen3_config"
    bias = attention_bias(qwen3_config)
    return decoder_config(qwen3_config, name, qk_norm=True, **bias, **_windows(qwen3_config, name))


def qwen3_layout(options: GPTOptions) -> Layout:
    """The names of ``Qwen3ForCausalLM``."""
    return decoder_layout(options, "Qwen3")
