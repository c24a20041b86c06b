"""GPT-J: configuration and weights."""

from __future__ import annotations

from torch import Tensor

from flash_attn.models._config import GPTOptions, options_of
from flash_attn.models._hf_config import activation, gpt2_config
from flash_attn.models._state_dict import (
    WORDS,
    Layout,
    entry,
    head_entries,
    linear,
    norms,
    qkv_joined,
    vocabulary,
)

__all__ = ["gptj_config_to_gpt2_config", "inv_remap_state_dict_hf_gptj", "remap_state_dict_hf_gptj"]


def _layout(options: GPTOptions) -> Layout:
    entries = [entry(WORDS, "transformer.wte.weight", step=vocabulary(options))]
    for i in range(options.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"transformer.h.{i}"
        qkv = [f"{theirs}.attn.{x}_proj" for x in "qkv"]
        entries += norms(f"{ours}.norm1", f"{theirs}.ln_1", options)
        entries += linear(f"{ours}.mixer.Wqkv", *qkv, bias=False, step=qkv_joined(options))
        entries += linear(f"{ours}.mixer.out_proj", f"{theirs}.attn.out_proj", bias=False)
        entries += linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc_in", bias=True)
        entries += linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc_out", bias=True)
    entries += norms("transformer.ln_f", "transformer.ln_f", options)
    entries += head_entries("lm_head", options)
    return Layout(
        "GPT-J",
        entries,
        prefix="transformer.",
        head="lm_head.weight" if options.tie_word_embeddings else None,
        embedding="transformer.wte.weight",
        ignored=r"\.attn\.(bias|masked_bias|embed_positions)$",
    )


def remap_state_dict_hf_gptj(state_dict, config) -> dict[str, Tensor]:
    """Convert the state dict of Hugging Face's ``GPTJForCausalLM``.

    Args:
        state_dict: by their names; it stays as it is.
        config: the model's, of ``gptj_config_to_gpt2_config``.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    return _layout(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_hf_gptj(state_dict, config) -> dict[str, Tensor]:
    """Convert a state dict to that of Hugging Face's ``GPTJForCausalLM``."""
    return _layout(options_of(config)).to_theirs(state_dict)


def gptj_config_to_gpt2_config(gptj_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.GPTJConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs = gptj_config
    head_dim = theirs.n_embd // theirs.n_head
    return gpt2_config(
        theirs,
        vocab_size=theirs.vocab_size,
        n_positions=0,
        n_embd=theirs.n_embd,
        n_layer=theirs.n_layer,
        n_head=theirs.n_head,
        n_inner=theirs.n_inner,
        activation_function=activation(
            "gptj_config", "activation_function", theirs.activation_function
        ),
        resid_pdrop=theirs.resid_pdrop,
        embd_pdrop=theirs.embd_pdrop,
        attn_pdrop=theirs.attn_pdrop,
        layer_norm_epsilon=theirs.layer_norm_epsilon,
        initializer_range=theirs.initializer_range,
        tie_word_embeddings=theirs.tie_word_embeddings,
        parallel_block=True,
        parallel_block_tied_norm=True,
        rotary_emb_fraction=(theirs.rotary_dim or head_dim) / head_dim,
        rotary_emb_interleaved=True,
        qkv_proj_bias=False,
        out_proj_bias=False,
        lm_head_bias=True,
    )
