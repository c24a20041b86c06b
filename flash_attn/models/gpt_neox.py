"""GPT-NeoX (https://arxiv.org/abs/2204.06745) and Pythia: configuration and weights."""

from __future__ import annotations

from torch import Tensor

from flash_attn.models._config import GPTOptions, options_of
from flash_attn.models._hf_config import activation, gpt2_config, rope
from flash_attn.models._state_dict import (
    WORDS,
    Layout,
    entry,
    grouped_qkv,
    head_entries,
    linear,
    norms,
    vocabulary,
)

__all__ = [
    "gpt_neox_config_to_gpt2_config",
    "inv_remap_state_dict_hf_gpt_neox",
    "remap_state_dict_hf_gpt_neox",
]


def _layout(options: GPTOptions) -> Layout:
    entries = [entry(WORDS, "gpt_neox.embed_in.weight", step=vocabulary(options))]
    for i in range(options.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"gpt_neox.layers.{i}"
        attention, mlp = f"{theirs}.attention", f"{theirs}.mlp"
        bias = options.qkv_proj_bias
        entries += norms(f"{ours}.norm1", f"{theirs}.input_layernorm", options)
        entries += norms(f"{ours}.norm2", f"{theirs}.post_attention_layernorm", options)
        qkv = (f"{ours}.mixer.Wqkv", f"{attention}.query_key_value")
        entries += linear(*qkv, bias=bias, step=grouped_qkv(options))
        entries += linear(f"{ours}.mixer.out_proj", f"{attention}.dense", bias=bias)
        entries += linear(f"{ours}.mlp.fc1", f"{mlp}.dense_h_to_4h", bias=True)
        entries += linear(f"{ours}.mlp.fc2", f"{mlp}.dense_4h_to_h", bias=True)
    entries += norms("transformer.ln_f", "gpt_neox.final_layer_norm", options)
    entries += head_entries("embed_out", options)  # as files have it
    return Layout(
        "GPT-NeoX",
        entries,
        prefix="gpt_neox.",
        head="embed_out.weight" if options.tie_word_embeddings else None,
        embedding="gpt_neox.embed_in.weight",
        ignored=r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|rotary_emb\.inv_freq$",
        aliases={"lm_head.weight": "embed_out.weight"},
    )


def remap_state_dict_hf_gpt_neox(state_dict, config) -> dict[str, Tensor]:
    """Convert the state dict of Hugging Face's ``GPTNeoXForCausalLM``.

    Args:
        state_dict: by their names; it stays as it is.
        config: the model's, of ``gpt_neox_config_to_gpt2_config``.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    return _layout(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_hf_gpt_neox(state_dict, config) -> dict[str, Tensor]:
    """Convert a state dict to that of Hugging Face's ``GPTNeoXForCausalLM``."""
    return _layout(options_of(config)).to_theirs(state_dict)


def gpt_neox_config_to_gpt2_config(gpt_neox_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.GPTNeoXConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs = gpt_neox_config
    bias = getattr(theirs, "attention_bias", True)
    return gpt2_config(
        theirs,
        vocab_size=theirs.vocab_size,
        n_positions=0,
        n_embd=theirs.hidden_size,
        n_layer=theirs.num_hidden_layers,
        n_head=theirs.num_attention_heads,
        n_inner=theirs.intermediate_size,
        activation_function=activation("gpt_neox_config", "hidden_act", theirs.hidden_act),
        resid_pdrop=theirs.hidden_dropout,
        embd_pdrop=theirs.hidden_dropout,
        attn_pdrop=theirs.attention_dropout,
        layer_norm_epsilon=theirs.layer_norm_eps,
        initializer_range=theirs.initializer_range,
        tie_word_embeddings=theirs.tie_word_embeddings,
        parallel_block=theirs.use_parallel_residual,
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        **rope(theirs, getattr(theirs, "rotary_pct", None)),
    )
