"""Tiny models of transformers with random weights, saved as folders, for from_hf and to_hf."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
import transformers
from model_cases import CASES as CLASSIC
from model_cases import rope

VOCAB, WINDOW = 96, 6
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {**_SIZES, "head_dim": 24}
_CAPPED = {**_HEADS, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
_LONGROPE = {
    "original_max_position_embeddings": 32,
    **rope(
        "longrope",
        partial_rotary_factor=0.75,
        short_factor=[1.0 + 0.1 * i for i in range(6)],
        long_factor=[2.0 + 0.3 * i for i in range(6)],
    ),
}
_LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False)
_MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


class Case(NamedTuple):
    """A model: its ``model_type`` and configuration, and which attention transformers uses."""

    model_type: str
    options: dict[str, Any]
    attention: str = "eager"


CASES = {
    "llama, llama3": Case("llama", {**_SIZES, **_LLAMA3, "tie_word_embeddings": True}),
    "mistral": Case("mistral", {**_HEADS, "sliding_window": WINDOW}),
    "mistral, no window, yarn": Case("mistral", {**_SIZES, **_YARN, "sliding_window": None}),
    "qwen2": Case("qwen2", {**_SIZES, "tie_word_embeddings": True}),
    "qwen2, window of the last": Case(
        "qwen2",
        {**_SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen2, window by layer": Case(
        "qwen2",
        {**_SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    ),
    "qwen3": Case("qwen3", _HEADS),
    "qwen3, biases, tied": Case(
        "qwen3", {**_HEADS, "attention_bias": True, "tie_word_embeddings": True}
    ),
    "gemma": Case("gemma", _HEADS),
    "gemma2": Case("gemma2", _CAPPED),
    "gemma2, no caps": Case(
        "gemma2",
        {**_CAPPED, "attn_logit_softcapping": None, "final_logit_softcapping": None,
         "attention_bias": True, "layer_types": _MIXED},
    ),
    "gemma3": Case("gemma3_text", {**_CAPPED, "num_hidden_layers": 7}),
    "gemma3, linear": Case(
        "gemma3_text",
        {**_CAPPED, "layer_types": _MIXED, "final_logit_softcapping": 20.0,
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}},
    ),
    "ministral": Case(
        "ministral", {**_HEADS, "sliding_window": WINDOW, "layer_types": _MIXED}
    ),
    "phi3": Case("phi3", {**_SIZES, "sliding_window": WINDOW}),
    "phi3, longrope": Case("phi3", {**_SIZES, **_LONGROPE}),
    "smollm3": Case("smollm3", {**_SIZES, "no_rope_layer_interval": 2, **_YARN}),
    "smollm3, windows, biases": Case(
        "smollm3",
        {**_SIZES, "no_rope_layers": [1, 1, 0, 1], "use_sliding_window": True,
         "sliding_window": WINDOW, "attention_bias": True, "mlp_bias": True,
         "tie_word_embeddings": False},
    ),
    "stablelm": Case("stablelm", {**_SIZES, "use_qkv_bias": True}),
    "stablelm, parallel": Case(
        "stablelm",
        {**_SIZES, "use_parallel_residual": True, "tie_word_embeddings": True,
         **rope("default", partial_rotary_factor=0.5)},
    ),
    "starcoder2": Case("starcoder2", {**_SIZES, "sliding_window": WINDOW}),
    "starcoder2, no biases": Case("starcoder2", {**_SIZES, "use_bias": False}),
}  # fmt: skip

# Of test_models_converters.py, which converts them without a folder.
_CLASSIC_TYPES = {"gpt": "gpt2", "bigcode": "gpt_bigcode"}
CLASSIC_CASES = {
    name: Case(_CLASSIC_TYPES.get(case.module, case.module), case.options, case.attention)
    for name, case in CLASSIC.items()
}


def hf_model(case: Case):
    """Return the model of transformers in fp32, with weights that make logits of about 1 to 10."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.model_type, **case.options)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=case.attention
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            mean = 1.0 if is_gain and not case.model_type.startswith("gemma") else 0.0
            parameter.normal_(mean, 0.1 if is_gain else 0.2)
    model.tie_weights()
    return model.eval()


def saved(case: Case, folder, **options):
    """Save the model in a folder and return it."""
    model = hf_model(case)
    model.save_pretrained(folder, **options)
    return model


def edit_config(folder, **fields):
    """Change fields of a folder's ``config.json``; None takes one out, ``...`` is null."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for name, value in fields.items():
        content.pop(name, None)
        if value is not None:
            content[name] = None if value is ... else value
    path.write_text(json.dumps(content))


def tokens(batch, seqlen, seed=1):
    return torch.randint(3, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(seed))
