"""Configurations of tiny GPTs."""

from __future__ import annotations

from types import SimpleNamespace

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


def config(**options):
    """A configuration without transformers, whose import takes seconds."""
    return SimpleNamespace(**{**SMALL, **options})
