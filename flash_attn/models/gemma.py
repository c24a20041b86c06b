"""Gemma 1 to 3 (https://arxiv.org/abs/2403.08295, 2408.00118, 2503.19786; of the third the text
model): configuration and names of Hugging Face."""

from __future__ import annotations

import math
from dataclasses import replace

from flash_attn.models._config import FULL, SLIDING, GPTOptions
from flash_attn.models._hf_config import rope, wrong
from flash_attn.models._llama_like import attention_bias, decoder_config, decoder_layout, windows
from flash_attn.models._state_dict import Layout

__all__ = [
    "gemma2_config_to_gpt2_config",
    "gemma2_layout",
    "gemma3_config_to_gpt2_config",
    "gemma3_layout",
    "gemma3_text_config_to_gpt2_config",
    "gemma3_text_layout",
    "gemma_config_to_gpt2_config",
    "gemma_layout",
]


def _config(theirs, kind: str, **attributes):
    """What all three have in common: norms with weights around 0, scaled embeddings."""
    if getattr(theirs, "use_bidirectional_attention", None):
        raise wrong(kind, "use_bidirectional_attention", True, "False")
    return decoder_config(
        theirs,
        kind,
        rms_norm_zero_centered=True,
        embedding_scale=math.sqrt(theirs.hidden_size),
        **attention_bias(theirs),
        **attributes,
    )


def _alternating(theirs, period: int) -> list[str]:
    """Every ``period``-th layer sees all tokens, the others a window."""
    return [FULL if (i + 1) % period == 0 else SLIDING for i in range(theirs.num_hidden_layers)]


def gemma_config_to_gpt2_config(gemma_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.GemmaConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    config = _config(gemma_config, "gemma_config")
    # "gelu" of the first files stands for its approximation, with which the models were trained.
    if config.activation_function == "geglu":
        config.activation_function = "geglu_approx"
    return config


def gemma_layout(options: GPTOptions) -> Layout:
    """The names of ``GemmaForCausalLM``."""
    return decoder_layout(options, "Gemma")


def _capped(theirs) -> dict:
    return {
        "sandwich_norm": True,
        "query_pre_attn_scalar": theirs.query_pre_attn_scalar,
        "attn_softcap": theirs.attn_logit_softcapping or 0.0,
        "final_logit_softcap": theirs.final_logit_softcapping or 0.0,
    }


def gemma2_config_to_gpt2_config(gemma2_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.Gemma2Config``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    name = "gemma2_config"
    layers = windows(gemma2_config, _alternating(gemma2_config, 2), name)
    return _config(gemma2_config, name, **_capped(gemma2_config), **layers)


def gemma2_layout(options: GPTOptions) -> Layout:
    """The names of ``Gemma2ForCausalLM``."""
    return decoder_layout(options, "Gemma 2")


def _local_base(theirs, kind: str) -> float:
    """The base of the layers with a window, by transformers 5 or 4."""
    parameters = (getattr(theirs, "rope_parameters", None) or {}).get("sliding_attention") or {}
    rope_type = parameters.get("rope_type", "default")
    if rope_type != "default":
        name = "rope_parameters['sliding_attention']['rope_type']"
        raise wrong(kind, name, rope_type, "'default'")
    local = parameters.get("rope_theta", getattr(theirs, "rope_local_base_freq", None))
    return float(local or 10000.0)


def gemma3_text_config_to_gpt2_config(gemma3_text_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.Gemma3TextConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs, name = gemma3_text_config, "gemma3_text_config"
    period = getattr(theirs, "sliding_window_pattern", None) or 6
    return _config(
        theirs,
        name,
        qk_norm=True,
        rotary_emb_local_base=_local_base(theirs, name),
        **rope(theirs, layer_type=FULL),
        **_capped(theirs),
        **windows(theirs, _alternating(theirs, period), name),
    )


def gemma3_text_layout(options: GPTOptions) -> Layout:
    """The names of ``Gemma3ForCausalLM``."""
    return decoder_layout(options, "Gemma 3")


def gemma3_config_to_gpt2_config(gemma3_config):
    """Return ``transformers.GPT2Config`` of the text model of a ``transformers.Gemma3Config``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    return gemma3_text_config_to_gpt2_config(gemma3_config.text_config)


def gemma3_layout(options: GPTOptions) -> Layout:
    """The names of ``Gemma3ForConditionalGeneration``'s text model, by transformers 4 and 5."""
    layout = gemma3_text_layout(options)
    names = [name for one in layout.entries for name in one.theirs]
    aliases = {f"language_model.{name}": name for name in names}
    aliases.update({name.replace("model.", "model.language_model.", 1): name for name in names})
    return replace(layout, aliases=aliases)
