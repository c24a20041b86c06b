"""StarCoder2 (https://arxiv.org/abs/2402.19173): configuration and names of Hugging Face."""

from __future__ import annotations

from flash_attn.models._config import GPTOptions
from flash_attn.models._llama_like import decoder_config, decoder_layout
from flash_attn.models._state_dict import Layout

__all__ = ["starcoder2_config_to_gpt2_config", "starcoder2_layout"]

_BIASES = ("qkv_proj_bias", "out_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias")


def starcoder2_config_to_gpt2_config(starcoder2_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.Starcoder2Config``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs = starcoder2_config
    return decoder_config(
        theirs,
        "starcoder2_config",
        gated=False,
        rms_norm=False,
        layer_norm_epsilon=theirs.norm_epsilon,
        resid_pdrop=theirs.residual_dropout,
        embd_pdrop=theirs.embedding_dropout,
        sliding_window=theirs.sliding_window,
        **dict.fromkeys(_BIASES, theirs.use_bias),
    )


def starcoder2_layout(options: GPTOptions) -> Layout:
    """The names of ``Starcoder2ForCausalLM``."""
    return decoder_layout(options, "StarCoder2")
