"""Configurations of Hugging Face's models as ``transformers.GPT2Config``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Optional

from flash_attn.layers.scaled_rotary import LENGTH_DEPENDENT
from flash_attn.models._config import ACTIVATIONS, options_of

# Kinds of models that may turn a part of each head; the others ignore that they are told to.
_PARTIAL = ("gpt_neox", "phi3", "stablelm")

_ORIGINAL = "original_max_position_embeddings"


def wrong(kind: str, name: str, value: Any, expected: str) -> ValueError:
    """Return the error of a field that the models here do not have."""
    return ValueError(f"{kind}.{name} must be {expected}, got {value!r:.80}")


def activation(kind: str, name: str, value: str, gated: bool = False) -> str:
    """Return our name of an activation; of a gated MLP that of the gate's.

    Raises:
        ValueError: it is none that the models here have.
    """
    if not gated:
        if value not in ACTIVATIONS[: ACTIVATIONS.index("silu") + 1]:
            raise wrong(kind, name, value, f"one of {', '.join(ACTIVATIONS)}")
        return value
    gates = {
        "silu": "swiglu",
        "swish": "swiglu",
        "gelu": "geglu",
        "sigmoid": "glu",
        "relu": "reglu",
        "gelu_new": "geglu_approx",
        "gelu_fast": "geglu_approx",
        "gelu_pytorch_tanh": "geglu_approx",
    }
    if value not in gates:
        raise wrong(kind, name, value, f"one of {', '.join(gates)}")
    return gates[value]


def rope(config, fraction: Optional[float] = None, layer_type: Optional[str] = None) -> dict:
    """Return the rotary attributes of a Hugging Face configuration, of transformers 4 or 5.

    Args:
        config: with ``rope_parameters`` or ``rope_theta`` and ``rope_scaling``.
        fraction: of a head that turns, where ``config`` calls it by a name of its own.
        layer_type: whose attributes, where kinds of layers have their own.

    Where ``rope_scaling`` and ``rope_parameters`` are there, the first is taken, as transformers
    does.

    Returns:
        ``rotary_emb_fraction``, ``rotary_emb_base`` and ``rotary_emb_scaling``, None: not scaled.

    Raises:
        ValueError: ``partial_rotary_factor`` is not 1 in a kind of model that turns whole heads.
    """
    parameters = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None)
    parameters = dict(parameters or {})
    if layer_type is not None and layer_type in parameters:
        parameters = dict(parameters[layer_type])
    base = parameters.get("rope_theta", getattr(config, "rope_theta", None)) or 10000.0
    if fraction is None:
        fraction = parameters.get(
            "partial_rotary_factor", getattr(config, "partial_rotary_factor", None)
        )
        model_type = getattr(config, "model_type", None)
        if fraction not in (None, 1.0) and model_type not in (None, *_PARTIAL):
            raise ValueError(
                "partial_rotary_factor must be 1 or missing in the configuration of a "
                f"{model_type} model, whose heads turn as a whole, got {fraction!r:.80}"
            )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    names = {"rotary_emb_fraction": 1.0 if fraction is None else fraction}
    names["rotary_emb_base"] = float(base)
    names["rotary_emb_scaling"] = None if kind == "default" else _scaling(config, kind, parameters)
    return names


def _scaling(config, kind: str, parameters: dict) -> dict:
    """Return ``rotary_emb_scaling``: with the lengths that Hugging Face has elsewhere."""
    left_out = ("type", "rope_theta", "partial_rotary_factor")
    scaling = {k: v for k, v in parameters.items() if k not in left_out and v is not None}
    scaling["rope_type"] = kind
    longest = getattr(config, "max_position_embeddings", None)
    original = scaling.get(_ORIGINAL, getattr(config, _ORIGINAL, None))
    if kind == "dynamic":  # whose original length is the model's
        original = longest
    if kind in (*LENGTH_DEPENDENT, "yarn", "llama3"):
        scaling[_ORIGINAL] = original or longest
    if kind in ("yarn", "longrope") and "factor" not in scaling and original:
        scaling["factor"] = longest / original
    return scaling


class _Config(SimpleNamespace):
    """Stands for ``transformers.GPT2Config`` where transformers is not installed."""


def gpt2_config(config, **attributes):
    """Return ``transformers.GPT2Config``, or without transformers an object like it, with these
    attributes and the tokens of another configuration.

    Raises:
        ValueError: an attribute is wrong; the message names it and its value.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        attributes.setdefault(name, getattr(config, name, None))
    config = _Config(**attributes)
    options_of(config)  # before transformers raises something else
    try:
        from transformers import GPT2Config
    except ImportError:
        return config
    return GPT2Config(**attributes)
