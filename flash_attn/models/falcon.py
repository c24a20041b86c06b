"""Falcon, of 7B (one key-value head) and of 40B (groups of them): configuration and weights."""

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
    "falcon_config_to_gpt2_config",
    "inv_remap_state_dict_hf_falcon",
    "remap_state_dict_hf_falcon",
]


def _norms(options: GPTOptions, ours: str, theirs: str):
    if not options.parallel_block:
        first, second = "input_layernorm", "post_attention_layernorm"
    elif options.parallel_block_tied_norm:
        return norms(f"{ours}.norm1", f"{theirs}.input_layernorm", options)
    else:
        first, second = "ln_attn", "ln_mlp"
    entries = norms(f"{ours}.norm1", f"{theirs}.{first}", options)
    return entries + norms(f"{ours}.norm2", f"{theirs}.{second}", options)


def _layout(options: GPTOptions) -> Layout:
    entries = [entry(WORDS, "transformer.word_embeddings.weight", step=vocabulary(options))]
    for i in range(options.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"transformer.h.{i}"
        attention, mlp = f"{theirs}.self_attention", f"{theirs}.mlp"
        bias = options.qkv_proj_bias
        entries += _norms(options, ours, theirs)
        qkv = (f"{ours}.mixer.Wqkv", f"{attention}.query_key_value")
        entries += linear(*qkv, bias=bias, step=grouped_qkv(options))
        entries += linear(f"{ours}.mixer.out_proj", f"{attention}.dense", bias=bias)
        entries += linear(f"{ours}.mlp.fc1", f"{mlp}.dense_h_to_4h", bias=bias)
        entries += linear(f"{ours}.mlp.fc2", f"{mlp}.dense_4h_to_h", bias=bias)
    entries += norms("transformer.ln_f", "transformer.ln_f", options)
    entries += head_entries("lm_head", options)
    return Layout(
        "Falcon",
        entries,
        prefix="transformer.",
        head="lm_head.weight" if options.tie_word_embeddings else None,
        embedding="transformer.word_embeddings.weight",
        ignored=r"rotary_emb\.inv_freq$",
    )


def remap_state_dict_hf_falcon(state_dict, config) -> dict[str, Tensor]:
    """Convert the state dict of Hugging Face's ``FalconForCausalLM`` or ``FalconModel``.

    Args:
        state_dict: by their names; it stays as it is.
        config: the model's, of ``falcon_config_to_gpt2_config``.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    return _layout(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_hf_falcon(state_dict, config) -> dict[str, Tensor]:
    """Convert a state dict to that of Hugging Face's ``FalconForCausalLM``."""
    return _layout(options_of(config)).to_theirs(state_dict)


def _positions(falcon_config) -> dict:
    """Rotary embedding, or ALiBi, which Falcon adds before it divides scores."""
    if not falcon_config.alibi:
        return rope(falcon_config)
    head_dim = falcon_config.hidden_size // falcon_config.num_attention_heads
    return {"use_alibi": True, "alibi_scale": head_dim**-0.5}


def falcon_config_to_gpt2_config(falcon_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.FalconConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    name = "falcon_config"
    is_new = falcon_config.new_decoder_architecture
    if is_new:
        n_head_kv = falcon_config.num_kv_heads
    else:
        n_head_kv = 1 if falcon_config.multi_query else falcon_config.num_attention_heads
    is_parallel = is_new or falcon_config.parallel_attn
    two_norms = getattr(falcon_config, "num_ln_in_parallel_attn", None) or (2 if is_new else 1)
    bias = falcon_config.bias
    return gpt2_config(
        falcon_config,
        vocab_size=falcon_config.vocab_size,
        n_positions=0,
        n_embd=falcon_config.hidden_size,
        n_layer=falcon_config.num_hidden_layers,
        n_head=falcon_config.num_attention_heads,
        n_head_kv=n_head_kv,
        n_inner=getattr(falcon_config, "ffn_hidden_size", None),
        activation_function=activation(
            name, "activation", getattr(falcon_config, "activation", "gelu")
        ),
        resid_pdrop=falcon_config.hidden_dropout,
        embd_pdrop=0.0,
        attn_pdrop=falcon_config.attention_dropout,
        layer_norm_epsilon=falcon_config.layer_norm_epsilon,
        initializer_range=falcon_config.initializer_range,
        tie_word_embeddings=falcon_config.tie_word_embeddings,
        parallel_block=is_parallel,
        parallel_block_tied_norm=is_parallel and not (is_new and two_norms == 2),
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=bias,
        mlp_fc2_bias=bias,
        **_positions(falcon_config),
    )
