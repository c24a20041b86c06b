"""SmolLM3: configuration and names of Hugging Face."""

from __future__ import annotations

from flash_attn.models._config import FULL, SLIDING, GPTOptions
from flash_attn.models._hf_config import wrong
from flash_attn.models._llama_like import attention_bias, decoder_config, decoder_layout, windows
from flash_attn.models._state_dict import Layout

__all__ = ["smollm3_config_to_gpt2_config", "smollm3_layout"]


def _rotary_layers(theirs, kind: str) -> list[bool]:
    """Whether each layer's queries and keys turn: all but every fourth's, where it is not said."""
    period, layers = theirs.no_rope_layer_interval, theirs.num_hidden_layers
    if theirs.no_rope_layers is None:
        return [(i + 1) % period != 0 for i in range(layers)]
    if not isinstance(theirs.no_rope_layers, list) or len(theirs.no_rope_layers) != layers:
        expected = f"a list of {layers} flags"
        raise wrong(kind, "no_rope_layers", theirs.no_rope_layers, expected)
    return [bool(turns) for turns in theirs.no_rope_layers]


def smollm3_config_to_gpt2_config(smollm3_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.SmolLM3Config``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs, name = smollm3_config, "smollm3_config"
    turns = _rotary_layers(theirs, name)
    layers: dict = {}
    if theirs.use_sliding_window:
        is_sliding = theirs.sliding_window is not None
        types = [SLIDING if is_sliding and not turn else FULL for turn in turns]
        layers = windows(theirs, types, name)
    return decoder_config(
        theirs,
        name,
        mlp_fc1_bias=theirs.mlp_bias,
        mlp_fc2_bias=theirs.mlp_bias,
        rotary_emb_layers=turns,
        **attention_bias(theirs),
        **layers,
    )


def smollm3_layout(options: GPTOptions) -> Layout:
    """The names of ``SmolLM3ForCausalLM``."""
    return decoder_layout(options, "SmolLM3")
