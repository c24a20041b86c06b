"""Kinds of models of Hugging Face that are converted here, by ``model_type``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, Optional

from flash_attn.models._config import STOCK, GPTOptions
from flash_attn.models._gpt2_names import gpt2
from flash_attn.models._hf_config import gpt2_config
from flash_attn.models._hf_folder import OWN_TYPE, HFConfig
from flash_attn.models._hf_own import own_config, own_layout
from flash_attn.models._state_dict import Layout


class Lack(NamedTuple):
    """A part of a model: the field of ``config.json`` that says it is there, and what it is."""

    field: str
    part: str


class Family(NamedTuple):
    """How a kind of model is converted.

    to_config: from its configuration to ``transformers.GPT2Config``.
    layout: the names of its parameters, by what the configuration here says.
    lacks: what of the model is not converted, None: all of it is.
    """

    to_config: Callable[[HFConfig], object]
    layout: Callable[[GPTOptions], Layout]
    lacks: Optional[Lack] = None


# model_type: module, name of the function that makes the configuration, of that which makes names.
_FUNCTIONS = {
    "baichuan": ("baichuan", "baichuan_config_to_gpt2_config", "_layout"),
    "btlm": ("btlm", "btlm_config_to_gpt2_config", "_layout"),
    "falcon": ("falcon", "falcon_config_to_gpt2_config", "_layout"),
    "gemma": ("gemma", "gemma_config_to_gpt2_config", "gemma_layout"),
    "gemma2": ("gemma", "gemma2_config_to_gpt2_config", "gemma2_layout"),
    "gemma3": ("gemma", "gemma3_config_to_gpt2_config", "gemma3_layout"),
    "gemma3_text": ("gemma", "gemma3_text_config_to_gpt2_config", "gemma3_text_layout"),
    "gpt_bigcode": ("bigcode", "bigcode_config_to_gpt2_config", "_layout"),
    "gpt_neox": ("gpt_neox", "gpt_neox_config_to_gpt2_config", "_layout"),
    "gpt_oss": ("gpt_oss", "gpt_oss_config_to_gpt2_config", "gpt_oss_layout"),
    "gptj": ("gptj", "gptj_config_to_gpt2_config", "_layout"),
    "llama": ("llama", "llama_config_to_gpt2_config", "_hf_layout"),
    "ministral": ("mistral", "ministral_config_to_gpt2_config", "mistral_layout"),
    "mistral": ("mistral", "mistral_config_to_gpt2_config", "mistral_layout"),
    "opt": ("opt", "opt_config_to_gpt2_config", "_layout"),
    "phi3": ("phi3", "phi3_config_to_gpt2_config", "phi3_layout"),
    "qwen2": ("qwen", "qwen2_config_to_gpt2_config", "qwen2_layout"),
    "qwen3": ("qwen", "qwen3_config_to_gpt2_config", "qwen3_layout"),
    "smollm3": ("smollm3", "smollm3_config_to_gpt2_config", "smollm3_layout"),
    "stablelm": ("stablelm", "stablelm_config_to_gpt2_config", "stablelm_layout"),
    "starcoder2": ("starcoder2", "starcoder2_config_to_gpt2_config", "starcoder2_layout"),
}

MODEL_TYPES = ("gpt2", *_FUNCTIONS)


_LACKS = {
    "gemma3": Lack("vision_config", "the part that reads images"),
    "gpt_oss": Lack("num_local_experts", "a mixture of experts"),
}


def _gpt2_itself(theirs: HFConfig):
    """GPT-2's configuration, whose attributes are ours."""
    given = {name: getattr(theirs, name) for name in STOCK}
    if theirs.add_cross_attention:
        raise ValueError("config.json's add_cross_attention must be False, got True")
    return gpt2_config(theirs, **given)


def family_of(model_type: str) -> Family:
    """Return how models of a kind that ``_hf_folder.model_type_of`` returns are converted."""
    if model_type == OWN_TYPE:
        return Family(own_config, own_layout)
    if model_type == "gpt2":
        return Family(_gpt2_itself, gpt2)
    module, to_config, layout = _FUNCTIONS[model_type]
    functions = import_module(f"flash_attn.models.{module}")
    lacks = _LACKS.get(model_type)
    return Family(getattr(functions, to_config), getattr(functions, layout), lacks)
