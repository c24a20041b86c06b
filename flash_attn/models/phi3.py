"""Phi-3 (https://arxiv.org/abs/2404.14219) and Phi-4: configuration and names of Hugging Face."""

from __future__ import annotations

from flash_attn.models._config import GPTOptions
from flash_attn.models._hf_config import rope
from flash_attn.models._llama_like import decoder_config, decoder_layout
from flash_attn.models._state_dict import Layout

__all__ = ["phi3_config_to_gpt2_config", "phi3_layout"]


def _rope(theirs) -> dict:
    """Rotary attributes; "su" and "yarn" are other names of "longrope" in such files."""
    names = rope(theirs)
    scaling = names["rotary_emb_scaling"]
    if scaling is not None and scaling["rope_type"] in ("su", "yarn", "longrope"):
        original = theirs.original_max_position_embeddings
        scaling.update(rope_type="longrope", original_max_position_embeddings=original)
        scaling.setdefault("factor", theirs.max_position_embeddings / original)
    return names


def phi3_config_to_gpt2_config(phi3_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.Phi3Config``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    return decoder_config(
        phi3_config,
        "phi3_config",
        resid_pdrop=phi3_config.resid_pdrop,
        embd_pdrop=phi3_config.embd_pdrop,
        sliding_window=phi3_config.sliding_window,
        **_rope(phi3_config),
    )


def phi3_layout(options: GPTOptions) -> Layout:
    """The names of ``Phi3ForCausalLM``."""
    return decoder_layout(options, "Phi-3", packed=True)
