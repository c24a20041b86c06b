"""OPT (https://arxiv.org/abs/2205.01068): its configuration and weights."""

from __future__ import annotations

from torch import Tensor

from flash_attn.models._config import GPTOptions, options_of
from flash_attn.models._hf_config import activation, gpt2_config, wrong
from flash_attn.models._state_dict import (
    POSITIONS,
    WORDS,
    Layout,
    entry,
    head_entries,
    linear,
    norms,
    qkv_joined,
    vocabulary,
)

__all__ = ["inv_remap_state_dict_hf_opt", "opt_config_to_gpt2_config", "remap_state_dict_hf_opt"]

# Hugging Face's embedding of position i is row i + 2: the first two are of padding.
_OFFSET = 2


def _layout(options: GPTOptions) -> Layout:
    entries = [
        entry(WORDS, "model.decoder.embed_tokens.weight", step=vocabulary(options)),
        entry(POSITIONS, "model.decoder.embed_positions.weight"),
    ]
    if options.word_embed_proj_dim is not None:
        project_in = "transformer.embeddings.project_in.weight"
        entries.append(entry(project_in, "model.decoder.project_in.weight"))
        entries.append(entry("project_out.weight", "model.decoder.project_out.weight"))
    for i in range(options.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"model.decoder.layers.{i}"
        attention = f"{theirs}.self_attn"
        qkv = [f"{attention}.{x}_proj" for x in "qkv"]
        bias = options.qkv_proj_bias
        entries += norms(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm", options)
        entries += norms(f"{ours}.norm2", f"{theirs}.final_layer_norm", options)
        entries += linear(f"{ours}.mixer.Wqkv", *qkv, bias=bias, step=qkv_joined(options))
        entries += linear(f"{ours}.mixer.out_proj", f"{attention}.out_proj", bias=bias)
        entries += linear(f"{ours}.mlp.fc1", f"{theirs}.fc1", bias=bias)
        entries += linear(f"{ours}.mlp.fc2", f"{theirs}.fc2", bias=bias)
    if options.prenorm:
        entries += norms("transformer.ln_f", "model.decoder.final_layer_norm", options)
    entries += head_entries("lm_head", options)
    return Layout(
        "OPT",
        entries,
        prefix="model.",
        head="lm_head.weight" if options.tie_word_embeddings else None,
        embedding="model.decoder.embed_tokens.weight",
    )


def remap_state_dict_hf_opt(state_dict, config) -> dict[str, Tensor]:
    """Convert the state dict of Hugging Face's ``OPTForCausalLM`` or ``OPTModel``.

    Args:
        state_dict: by their names; it stays as it is.
        config: the model's, of ``opt_config_to_gpt2_config``.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    return _layout(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_hf_opt(state_dict, config) -> dict[str, Tensor]:
    """Convert a state dict to that of Hugging Face's ``OPTForCausalLM``."""
    return _layout(options_of(config)).to_theirs(state_dict)


def opt_config_to_gpt2_config(opt_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.OPTConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    name = "opt_config"
    if not opt_config.layer_norm_elementwise_affine:
        raise wrong(name, "layer_norm_elementwise_affine", False, "True")
    prenorm = opt_config.do_layer_norm_before
    if prenorm and opt_config._remove_final_layer_norm:
        raise wrong(name, "_remove_final_layer_norm", True, "False with do_layer_norm_before")
    projected = opt_config.word_embed_proj_dim
    bias = opt_config.enable_bias
    return gpt2_config(
        opt_config,
        vocab_size=opt_config.vocab_size,
        n_positions=opt_config.max_position_embeddings,
        position_embeddings_offset=_OFFSET,
        n_embd=opt_config.hidden_size,
        n_layer=opt_config.num_hidden_layers,
        n_head=opt_config.num_attention_heads,
        n_inner=opt_config.ffn_dim,
        activation_function=activation(name, "activation_function", opt_config.activation_function),
        resid_pdrop=opt_config.dropout,
        embd_pdrop=opt_config.dropout,
        attn_pdrop=opt_config.attention_dropout,
        initializer_range=opt_config.init_std,
        tie_word_embeddings=opt_config.tie_word_embeddings,
        prenorm=prenorm,
        word_embed_proj_dim=None if projected == opt_config.hidden_size else projected,
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=bias,
        mlp_fc2_bias=bias,
    )
