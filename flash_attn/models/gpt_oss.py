"""GPT-OSS (https://arxiv.org/abs/2508.10925): configuration and names of Hugging Face, of all but
the mixture of experts, in whose place is a dense MLP."""

from __future__ import annotations

import copy

from flash_attn.models._config import FULL, SLIDING, GPTOptions
from flash_attn.models._llama_like import attention_bias, decoder_config, decoder_layout, windows
from flash_attn.models._state_dict import Layout

__all__ = ["gpt_oss_config_to_gpt2_config", "gpt_oss_layout"]

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def gpt_oss_config_to_gpt2_config(gpt_oss_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.GptOssConfig``, with a SwiGLU MLP of
    ``intermediate_size`` for its experts.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs, name = gpt_oss_config, "gpt_oss_config"
    given = (getattr(theirs, "rope_parameters", None), getattr(theirs, "rope_scaling", None))
    if given == (None, None):
        theirs = copy.copy(theirs)
        theirs.rope_parameters = dict(_ROPE)
    types = [FULL if i % 2 else SLIDING for i in range(theirs.num_hidden_layers)]
    layers = windows(theirs, types, name)
    return decoder_config(theirs, name, attn_sinks=True, **attention_bias(theirs), **layers)


def gpt_oss_layout(options: GPTOptions) -> Layout:
    """The names of ``GptOssForCausalLM``, without its experts."""
    return decoder_layout(options, "GPT-OSS", has_mlp=False)
