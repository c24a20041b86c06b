"""What models that follow Llama have in common: configuration and names of parameters."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from flash_attn.models._config import FULL, SLIDING, GPTOptions
from flash_attn.models._hf_config import activation, gpt2_config, rope, wrong
from flash_attn.models._state_dict import (
    SAME,
    WORDS,
    Entry,
    Layout,
    Step,
    each,
    entry,
    gate_joined,
    head_entries,
    linear,
    norms,
    qkv_joined,
    vocabulary,
)


def decoder_config(theirs, kind: str, gated: bool = True, **attributes):
    """Return ``transformers.GPT2Config`` of a model like Llama.

    Args:
        theirs: the configuration of Hugging Face.
        kind: what messages call it.
        gated: whether the MLP is.
        **attributes: those in which it differs.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    head_dim = getattr(theirs, "head_dim", None)
    hidden_act = getattr(theirs, "hidden_activation", None) or getattr(theirs, "hidden_act", None)
    name = (
        "hidden_act" if getattr(theirs, "hidden_activation", None) is None else "hidden_activation"
    )
    common: dict[str, Any] = {
        "vocab_size": theirs.vocab_size,
        "n_positions": 0,
        "n_embd": theirs.hidden_size,
        "n_layer": theirs.num_hidden_layers,
        "n_head": theirs.num_attention_heads,
        "n_head_kv": theirs.num_key_value_heads,
        "head_dim": head_dim,
        "n_inner": theirs.intermediate_size,
        "mlp_multiple_of": 1,
        "activation_function": activation(kind, name, hidden_act, gated=gated),
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": getattr(theirs, "attention_dropout", None) or 0.0,
        "layer_norm_epsilon": getattr(theirs, "rms_norm_eps", None),
        "initializer_range": theirs.initializer_range,
        "tie_word_embeddings": theirs.tie_word_embeddings,
        "rms_norm": True,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
    }
    common.update(rope(theirs) if "rotary_emb_fraction" not in attributes else {})
    return gpt2_config(theirs, **{**common, **attributes})


def attention_bias(theirs) -> dict[str, bool]:
    """Biases of all four layers, as ``attention_bias`` says."""
    bias = bool(getattr(theirs, "attention_bias", False))
    return {"qkv_proj_bias": bias, "out_proj_bias": bias}


def windows(theirs, layer_types: Optional[list[str]], kind: str) -> dict[str, Any]:
    """The layers' windows.

    Args:
        layer_types: of the layers where the configuration does not say it.

    Raises:
        ValueError: a kind of layer is unknown.
    """
    types = getattr(theirs, "layer_types", None) or layer_types
    for one in types or ():
        if one not in (FULL, SLIDING):
            expected = f"a list of {FULL!r} and {SLIDING!r}"
            raise wrong(kind, "layer_types", types, expected)
    if types is None or SLIDING not in types:
        return {}
    if theirs.sliding_window is None:
        raise wrong(kind, "sliding_window", None, f"a number where layer_types has {SLIDING!r}")
    return {"layer_types": list(types), "sliding_window": theirs.sliding_window}


def _swapped(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


_GATE_FIRST = each(_swapped, _swapped)


def _norms(ours: str, theirs: str, options: GPTOptions) -> list[Entry]:
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    if options.parallel_block_tied_norm:
        del names["norm2"]
    if options.sandwich_norm:
        names["post_norm1"] = names["norm2"]
        names["norm2"] = "pre_feedforward_layernorm"
        names["post_norm2"] = "post_feedforward_layernorm"
    entries = []
    for mine, other in names.items():
        entries += norms(f"{ours}.{mine}", f"{theirs}.{other}", options)
    return entries


def _attention(ours: str, theirs: str, options: GPTOptions, packed: bool) -> list[Entry]:
    names, step = [f"{theirs}.qkv_proj"], SAME
    if not packed:
        names, step = [f"{theirs}.{x}_proj" for x in "qkv"], qkv_joined(options)
    entries = linear(f"{ours}.Wqkv", *names, bias=options.qkv_proj_bias, step=step)
    entries += linear(f"{ours}.out_proj", f"{theirs}.o_proj", bias=options.out_proj_bias)
    if options.qk_norm:
        for x in "qk":
            entries += norms(f"{ours}.{x}_norm", f"{theirs}.{x}_norm", options)
    if options.attn_sinks:
        entries.append(entry(f"{ours}.sinks", f"{theirs}.sinks"))
    return entries


def _mlp(ours: str, theirs: str, options: GPTOptions, packed: bool) -> list[Entry]:
    step: Step = gate_joined(options)
    names, last = [f"{theirs}.up_proj", f"{theirs}.gate_proj"], f"{theirs}.down_proj"
    if packed:
        names, step = [f"{theirs}.gate_up_proj"], _GATE_FIRST
    elif not options.is_gated:
        names, last, step = [f"{theirs}.c_fc"], f"{theirs}.c_proj", SAME
    entries = linear(f"{ours}.fc1", *names, bias=options.mlp_fc1_bias, step=step)
    return entries + linear(f"{ours}.fc2", last, bias=options.mlp_fc2_bias)


def decoder_layout(
    options: GPTOptions, source: str, *, packed: bool = False, has_mlp: bool = True
) -> Layout:
    """The names of a model like Llama.

    Args:
        options: of the model here.
        source: what messages call theirs.
        packed: whether queries, keys and values are one layer, and the halves of the MLP's first.
        has_mlp: whether the MLP has a counterpart.
    """
    entries = [entry(WORDS, "model.embed_tokens.weight", step=vocabulary(options))]
    for i in range(options.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"model.layers.{i}"
        entries += _norms(ours, theirs, options)
        entries += _attention(f"{ours}.mixer", f"{theirs}.self_attn", options, packed)
        entries += _mlp(f"{ours}.mlp", f"{theirs}.mlp", options, packed) if has_mlp else []
    entries += norms("transformer.ln_f", "model.norm", options)
    entries += head_entries("lm_head", options)
    return Layout(
        source,
        entries,
        prefix="model.",
        head="lm_head.weight" if options.tie_word_embeddings else None,
        embedding="model.embed_tokens.weight",
        ignored=r"rotary_emb\.inv_freq$",
    )
