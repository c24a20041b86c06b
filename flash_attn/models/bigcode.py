"""GPTBigCode (StarCoder, SantaCoder): configuration and weights.

A multi-query model has its one key-value head here, too (``n_head_kv`` 1); the FlashAttention
package makes copies of it, one a query head.
"""

from __future__ import annotations

from torch import Tensor

from flash_attn.models._config import GPTOptions, options_of
from flash_attn.models._gpt2_names import gpt2_like
from flash_attn.models._hf_config import activation, gpt2_config
from flash_attn.models._state_dict import SAME, Layout, grouped_qkv

__all__ = [
    "bigcode_config_to_gpt2_config",
    "inv_remap_state_dict_hf_bigcode",
    "remap_state_dict_hf_bigcode",
]


def _layout(options: GPTOptions) -> Layout:
    return gpt2_like(
        options,
        source="GPTBigCode",
        dense=SAME,
        qkv=grouped_qkv(options),
        ignored=r"\.attn\.(bias|masked_bias)$|^transformer\.bias$",
    )


def remap_state_dict_hf_bigcode(state_dict, config) -> dict[str, Tensor]:
    """Convert the state dict of Hugging Face's ``GPTBigCodeForCausalLM`` or ``GPTBigCodeModel``.

    Args:
        state_dict: by their names; it stays as it is.
        config: the model's, of ``bigcode_config_to_gpt2_config``.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    return _layout(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_hf_bigcode(state_dict, config) -> dict[str, Tensor]:
    """Convert a state dict to that of Hugging Face's ``GPTBigCodeForCausalLM``."""
    return _layout(options_of(config)).to_theirs(state_dict)


def bigcode_config_to_gpt2_config(bigcode_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.GPTBigCodeConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs = bigcode_config
    return gpt2_config(
        theirs,
        vocab_size=theirs.vocab_size,
        n_positions=theirs.n_positions,
        n_embd=theirs.n_embd,
        n_layer=theirs.n_layer,
        n_head=theirs.n_head,
        n_head_kv=1 if theirs.multi_query else theirs.n_head,
        n_inner=theirs.n_inner,
        activation_function=activation(
            "bigcode_config", "activation_function", theirs.activation_function
        ),
        resid_pdrop=theirs.resid_pdrop,
        embd_pdrop=theirs.embd_pdrop,
        attn_pdrop=theirs.attn_pdrop,
        layer_norm_epsilon=theirs.layer_norm_epsilon,
        initializer_range=theirs.initializer_range,
        scale_attn_weights=theirs.scale_attn_weights,
        tie_word_embeddings=theirs.tie_word_embeddings,
    )
