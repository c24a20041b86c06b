"""BTLM (https://arxiv.org/abs/2309.11568): configuration and weights.

Hugging Face has this model's code beside its weights, not in transformers; a configuration here is
any object with its attributes.
"""

from __future__ import annotations

from torch import Tensor

from flash_attn.models._config import GPTOptions, options_of
from flash_attn.models._gpt2_names import gpt2_like
from flash_attn.models._hf_config import activation, gpt2_config, wrong
from flash_attn.models._state_dict import TRANSPOSED, Layout

__all__ = ["btlm_config_to_gpt2_config", "inv_remap_state_dict_hf_btlm", "remap_state_dict_hf_btlm"]


def _layout(options: GPTOptions) -> Layout:
    return gpt2_like(
        options,
        source="BTLM",
        dense=TRANSPOSED,
        qkv=TRANSPOSED,
        gated=("c_fc", "c_fc2") if options.is_gated else (),
        ignored=r"\.attn\.(bias|masked_bias)$|relative_pe\.slopes$",
    )


def remap_state_dict_hf_btlm(state_dict, config) -> dict[str, Tensor]:
    """Convert the state dict of ``BTLMLMHeadModel``.

    Args:
        state_dict: by their names; it stays as it is.
        config: the model's, of ``btlm_config_to_gpt2_config``.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    return _layout(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_hf_btlm(state_dict, config) -> dict[str, Tensor]:
    """Convert a state dict to that of ``BTLMLMHeadModel``."""
    return _layout(options_of(config)).to_theirs(state_dict)


def btlm_config_to_gpt2_config(btlm_config):
    """Return ``transformers.GPT2Config`` of BTLM's configuration.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs, name = btlm_config, "btlm_config"
    function = theirs.activation_function
    if function != "swiglu":
        function = activation(name, "activation_function", function)
    position = getattr(theirs, "position_embedding_type", "learned")
    if position not in ("learned", "alibi"):
        raise wrong(name, "position_embedding_type", position, "'learned' or 'alibi'")
    return gpt2_config(
        theirs,
        vocab_size=theirs.vocab_size,
        n_positions=0 if position == "alibi" else theirs.n_positions,
        n_embd=theirs.n_embd,
        n_layer=theirs.n_layer,
        n_head=theirs.n_head,
        n_inner=theirs.n_inner,
        mlp_multiple_of=1,
        activation_function=function,
        resid_pdrop=theirs.resid_pdrop,
        embd_pdrop=theirs.embd_pdrop,
        attn_pdrop=theirs.attn_pdrop,
        layer_norm_epsilon=theirs.layer_norm_epsilon,
        initializer_range=theirs.initializer_range,
        scale_attn_weights=theirs.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=theirs.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=getattr(theirs, "tie_word_embeddings", True),
        use_alibi=position == "alibi",
        mup_width_scale=getattr(theirs, "mup_width_scale", 1.0),
        mup_embeddings_multiplier=getattr(theirs, "mup_embeddings_scale", 1.0),
        mup_output_multiplier=getattr(theirs, "mup_output_alpha", 1.0),
        mup_scale_qk_dot_by_d=getattr(theirs, "mup_scale_qk_dot_by_d", False),
    )
