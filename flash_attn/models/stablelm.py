"""StableLM (https://arxiv.org/abs/2402.17834): configuration and names of Hugging Face."""

from __future__ import annotations

from flash_attn.models._config import GPTOptions
from flash_attn.models._hf_config import wrong
from flash_attn.models._llama_like import decoder_config, decoder_layout
from flash_attn.models._state_dict import Layout

__all__ = ["stablelm_config_to_gpt2_config", "stablelm_layout"]


def stablelm_config_to_gpt2_config(stablelm_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.StableLmConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs, name = stablelm_config, "stablelm_config"
    if theirs.qk_layernorm:  # whose norms have a weight of each head
        raise wrong(name, "qk_layernorm", True, "False")
    return decoder_config(
        theirs,
        name,
        rms_norm=False,
        layer_norm_epsilon=theirs.layer_norm_eps,
        resid_pdrop=theirs.hidden_dropout,
        qkv_proj_bias=theirs.use_qkv_bias,
        parallel_block=theirs.use_parallel_residual,
        parallel_block_tied_norm=theirs.use_parallel_residual,
    )


def stablelm_layout(options: GPTOptions) -> Layout:
    """The names of ``StableLmForCausalLM``."""
    return decoder_layout(options, "StableLM")
