"""Tiny models of transformers with random weights, and what converts them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers

VOCAB, HIDDEN, LAYERS, HEADS = 96, 64, 2, 4
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_GPT_SIZES = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_SIZES,
    **_TOKENS,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "max_position_embeddings": 64,
}


def rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **parameters}}


_LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)


class Case(NamedTuple):
    """A model: its name in transformers, the module that converts it, its configuration."""

    family: str
    module: str
    options: dict[str, Any]
    attention: str = "eager"


CASES = {
    "gpt2": Case("GPT2", "gpt", {**_GPT_SIZES, **_NO_DROPOUT, "n_positions": 64}),
    "gpt2, scores by layer": Case(
        "GPT2",
        "gpt",
        {**_GPT_SIZES, **_NO_DROPOUT, "n_positions": 64, "n_inner": 96,
         "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    ),
    "llama": Case("Llama", "llama", _LLAMA),
    "llama, tied, biases, head dim": Case(
        "Llama",
        "llama",
        {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
         "head_dim": 24},
    ),
    "llama, linear": Case("Llama", "llama", {**_LLAMA, **rope("linear", factor=2.0)}),
    "llama, dynamic": Case(
        "Llama",
        "llama",
        {**_LLAMA, "max_position_embeddings": 16, **rope("dynamic", factor=2.0)},
    ),
    "llama, yarn": Case("Llama", "llama", {**_LLAMA, **_YARN}),
    "llama, llama3": Case("Llama", "llama", {**_LLAMA, **_LLAMA3}),
    "falcon, 7b": Case("Falcon", "falcon", {**_SIZES, **_TOKENS}),
    "falcon, 40b": Case(
        "Falcon",
        "falcon",
        {**_SIZES, **_TOKENS, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon, one norm of groups": Case(
        "Falcon",
        "falcon",
        {**_SIZES, **_TOKENS, "new_decoder_architecture": True, "num_kv_heads": 2,
         "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    ),
    "falcon, one after the other": Case(
        "Falcon",
        "falcon",
        {**_SIZES, **_TOKENS, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon, alibi": Case(
        "Falcon",
        "falcon",
        {**_SIZES, **_TOKENS, "alibi": True, "multi_query": False, "parallel_attn": False},
        "sdpa",  # transformers' eager attention adds the biases twice
    ),
    "opt": Case(
        "OPT",
        "opt",
        {**_SIZES, "ffn_dim": 128, "max_position_embeddings": 64, "dropout": 0.0,
         "word_embed_proj_dim": HIDDEN},
    ),
    "opt, 350m": Case(
        "OPT",
        "opt",
        {**_SIZES, "ffn_dim": 128, "max_position_embeddings": 64, "dropout": 0.0,
         "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "gpt_neox": Case(
        "GPTNeoX",
        "gpt_neox",
        {**_SIZES, **_TOKENS, "intermediate_size": 128, "hidden_dropout": 0.0},
    ),
    "gpt_neox, one after the other": Case(
        "GPTNeoX",
        "gpt_neox",
        {**_SIZES, **_TOKENS, "intermediate_size": 128, "use_parallel_residual": False,
         "attention_bias": False},
    ),
    "gptj": Case("GPTJ", "gptj", {**_GPT_SIZES, **_NO_DROPOUT, **_TOKENS, "rotary_dim": 8}),
    "bigcode": Case(
        "GPTBigCode",
        "bigcode",
        {**_GPT_SIZES, **_NO_DROPOUT, **_TOKENS, "n_positions": 64},
    ),
    "bigcode, all heads": Case(
        "GPTBigCode",
        "bigcode",
        {**_GPT_SIZES, **_NO_DROPOUT, **_TOKENS, "n_positions": 64, "multi_query": False},
    ),
}  # fmt: skip


def hf_model(case: Case, scale: float = 0.2):
    """Return the model of transformers in fp32, with weights that make logits of about 1."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.family}Config")(**case.options)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=case.attention
    )
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(1.0 if is_gain else 0.0, 0.1 if is_gain else scale)
    model.tie_weights()
    return model


def in_bf16(model):
    """Round a model's parameters, but not its buffers: frequencies stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model
