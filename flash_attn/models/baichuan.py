"""Baichuan of 7B (rotary embedding) and 13B (ALiBi), 1 and 2: configuration and weights.

Hugging Face has these models' code beside their weights, not in transformers; a configuration here
is any object with their attributes.
"""

from __future__ import annotations

from torch import Tensor

from flash_attn.models._config import GPTOptions, options_of
from flash_attn.models._hf_config import activation, gpt2_config
from flash_attn.models._state_dict import Layout, llama_like

__all__ = [
    "baichuan_config_to_gpt2_config",
    "inv_remap_state_dict_hf_baichuan",
    "remap_state_dict_hf_baichuan",
]

_WIDEST_WITH_ROTARY = 5000  # hidden_size: 4096 is that of 7B, 5120 that of 13B
_LARGEST_OF_FIRST = 70000  # vocab_size: 64000 is that of 1, 125696 that of 2


def _layout(options: GPTOptions) -> Layout:
    return llama_like(options, source="Baichuan", qkv=["W_pack"], rotary=False, packed=True)


def remap_state_dict_hf_baichuan(state_dict, config) -> dict[str, Tensor]:
    """Convert the state dict of ``BaichuanForCausalLM``.

    Args:
        state_dict: by their names; it stays as it is.
        config: the model's, of ``baichuan_config_to_gpt2_config``.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    return _layout(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_hf_baichuan(state_dict, config) -> dict[str, Tensor]:
    """Convert a state dict to that of ``BaichuanForCausalLM``."""
    return _layout(options_of(config)).to_theirs(state_dict)


def baichuan_config_to_gpt2_config(baichuan_config):
    """Return ``transformers.GPT2Config`` of Baichuan's configuration.

    A model narrower than 5000 has rotary embedding, a wider one ALiBi; one with more than 70000
    tokens has a head whose rows are normed, as Baichuan 2. ``use_rotary`` and ``norm_head`` of the
    configuration, where it has them, go before.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs = baichuan_config
    rotary = getattr(theirs, "use_rotary", theirs.hidden_size < _WIDEST_WITH_ROTARY)
    norm_head = getattr(theirs, "norm_head", theirs.vocab_size > _LARGEST_OF_FIRST)
    return gpt2_config(
        theirs,
        vocab_size=theirs.vocab_size,
        n_positions=0,
        n_embd=theirs.hidden_size,
        n_layer=theirs.num_hidden_layers,
        n_head=theirs.num_attention_heads,
        n_inner=theirs.intermediate_size,
        mlp_multiple_of=1,
        activation_function=activation(
            "baichuan_config", "hidden_act", theirs.hidden_act, gated=True
        ),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=theirs.rms_norm_eps,
        initializer_range=theirs.initializer_range,
        tie_word_embeddings=getattr(theirs, "tie_word_embeddings", False),
        rms_norm=True,
        rotary_emb_fraction=1.0 if rotary else 0.0,
        use_alibi=not rotary,
        norm_head=norm_head,
        qkv_proj_bias=False,
        out_proj_bias=False,
        mlp_fc1_bias=False,
        mlp_fc2_bias=False,
    )
