"""Configurations of tiny GPTs, without transformers, whose import takes seconds."""

from __future__ import annotations

from types import SimpleNamespace

import torch

SMALL = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA = {
    "n_positions": 0,
    "rotary_emb_fraction": 1.0,
    "rms_norm": True,
    "n_head_kv": 2,
    "activation_function": "swiglu",
    "mlp_multiple_of": 1,
    "n_inner": 44,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "tie_word_embeddings": False,
}
GEMMA = {
    **LLAMA,
    "activation_function": "geglu_approx",
    "tie_word_embeddings": True,
    "sandwich_norm": True,
    "rms_norm_zero_centered": True,
    "qk_norm": True,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "attn_softcap": 3.0,
    "final_logit_softcap": 4.0,
    "embedding_scale": 32**0.5,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "rotary_emb_local_base": 50.0,
    "rotary_emb_scaling": {"rope_type": "linear", "factor": 3.0},
}
CASES = {
    "gpt2": {},
    "gpt2, untied, biased head": {"tie_word_embeddings": False, "lm_head_bias": True},
    "gpt2, scores by layer": {"scale_attn_by_inverse_layer_idx": True},
    "gpt2, no scale": {"scale_attn_weights": False, "activation_function": "sqrelu"},
    "llama": LLAMA,
    "llama, one key-value head": {**LLAMA, "n_head_kv": 1},
    "llama, pairs, part": {
        **LLAMA, "rotary_emb_interleaved": True, "rotary_emb_fraction": 0.5,
        "rotary_emb_base": 100.0,
    },
    "mistral": {**LLAMA, "sliding_window": 3},
    "window": {**LLAMA, "window_size": (3, 0), "activation_function": "glu"},
    "gemma": GEMMA,
    "sinks": {
        **LLAMA, "attn_sinks": True, "sliding_window": 5, "qkv_proj_bias": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gptj": {
        "n_positions": 0, "parallel_block": True, "parallel_block_tied_norm": True,
        "rotary_emb_fraction": 0.5, "rotary_emb_interleaved": True, "qkv_proj_bias": False,
    },
    "parallel, two norms": {
        "n_positions": 0, "parallel_block": True, "rotary_emb_fraction": 0.5,
        "activation_function": "gelu",
    },
    "alibi": {"n_positions": 0, "use_alibi": True, "activation_function": "silu"},
    "alibi, not a power of two": {
        "n_positions": 0, "use_alibi": True, "n_head": 6, "n_embd": 48, "alibi_scale": 0.5,
        "activation_function": "reglu",
    },
    "opt": {
        "prenorm": False, "word_embed_proj_dim": 16, "position_embeddings_offset": 2,
        "activation_function": "relu",
    },
    "mup": {
        "mup_width_scale": 0.5, "mup_embeddings_multiplier": 3.0, "mup_output_multiplier": 0.7,
        "mup_attn_multiplier": 1.3, "mup_scale_qk_dot_by_d": True, "activation_function": "geglu",
    },
    "norm head": {**LLAMA, "norm_head": True},
    "dwconv": {"attn_dwconv": True},
}  # fmt: skip


def config(**options):
    return SimpleNamespace(**{**SMALL, **options})


def randomized(model):
    """Draw all parameters anew, so that none is 0 or 1 throughout; gains about 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + is_gain)
    return model


def token_ids(batch, seqlen, vocab_size=97, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, seqlen), generator=generator)
