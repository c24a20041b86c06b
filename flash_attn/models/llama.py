"""Llama 1 to 3 (https://arxiv.org/abs/2302.13971): configuration, and weights of Hugging Face's and
of Meta's format, sharded ones, too.

Neighbours of a head turn with each other here as in Meta's format; in Hugging Face's halves do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Union

import torch
from torch import Tensor

from flash_attn.models._config import GPTOptions, options_of
from flash_attn.models._hf_config import activation, gpt2_config, rope
from flash_attn.models._state_dict import (
    WORDS,
    Layout,
    entry,
    gate_joined,
    head_entries,
    linear,
    llama_like,
    norms,
    qkv_joined,
    vocabulary,
)

__all__ = [
    "config_from_checkpoint",
    "config_from_hf_checkpoint",
    "config_from_meta_checkpoint",
    "inv_remap_state_dict_hf_llama",
    "inv_remap_state_dict_meta_llama",
    "llama_config_to_gpt2_config",
    "remap_state_dict_hf_llama",
    "remap_state_dict_meta_llama",
    "state_dicts_from_checkpoint",
]


def _hf_layout(options: GPTOptions) -> Layout:
    qkv = [f"{x}_proj" for x in "qkv"]
    interleaved = options.rotary_emb_interleaved
    return llama_like(options, source="Llama", qkv=qkv, rotary=interleaved)


def _meta_layout(options: GPTOptions) -> Layout:
    entries = [entry(WORDS, "tok_embeddings.weight", step=vocabulary(options))]
    for i in range(options.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"layers.{i}"
        qkv = [f"{theirs}.attention.w{x}" for x in "qkv"]
        fc1 = [f"{theirs}.feed_forward.w3", f"{theirs}.feed_forward.w1"]
        entries += norms(f"{ours}.norm1", f"{theirs}.attention_norm", options)
        entries += norms(f"{ours}.norm2", f"{theirs}.ffn_norm", options)
        entries += linear(f"{ours}.mixer.Wqkv", *qkv, bias=False, step=qkv_joined(options))
        entries += linear(f"{ours}.mixer.out_proj", f"{theirs}.attention.wo", bias=False)
        entries += linear(f"{ours}.mlp.fc1", *fc1, bias=False, step=gate_joined(options))
        entries += linear(f"{ours}.mlp.fc2", f"{theirs}.feed_forward.w2", bias=False)
    entries += norms("transformer.ln_f", "norm", options)
    entries += head_entries("output", options)
    return Layout(
        "Meta's Llama",
        entries,
        head="output.weight" if options.tie_word_embeddings else None,
        embedding="tok_embeddings.weight",
        ignored=r"^rope\.freqs$|inner_attention\.rope\.freqs$",
    )


def remap_state_dict_meta_llama(state_dict: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Convert a state dict of Meta's format, or that of one of its shards.

    Args:
        state_dict: by their names; it stays as it is.
        config: the model's, of ``llama_config_to_gpt2_config``.

    Returns:
        The model's state dict, or what ``combine_state_dicts_tp`` makes it of.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    return _meta_layout(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_meta_llama(state_dict: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Convert a state dict to Meta's format, of one shard."""
    return _meta_layout(options_of(config)).to_theirs(state_dict)


def remap_state_dict_hf_llama(state_dict: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Convert the state dict of Hugging Face's ``LlamaForCausalLM`` or ``LlamaModel``; the
    arguments and errors are those of ``remap_state_dict_meta_llama``."""
    return _hf_layout(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_hf_llama(state_dict: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Convert a state dict to that of Hugging Face's ``LlamaForCausalLM``."""
    return _hf_layout(options_of(config)).to_theirs(state_dict)


_META_FIELDS = ("dim", "n_layers", "n_heads", "norm_eps")
_SCALED = {  # use_scaled_rope, of Llama 3.1
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _meta_hidden(params: dict) -> int:
    """Hidden features of the MLP, by params.json."""
    hidden = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params.get("multiple_of", 256)
    return -(-hidden // multiple) * multiple


def _meta_shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("consolidated.*.pth"))
    if not shards:
        raise FileNotFoundError(f"{folder} has no consolidated.*.pth")
    return shards


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise RuntimeError(f"{path} cannot be read as a checkpoint: {error}") from None


def _meta_vocab_size(folder: Path) -> int:
    """The rows of the head, of all shards."""
    return sum(_load(path)["output.weight"].shape[0] for path in _meta_shards(folder))


def config_from_meta_checkpoint(checkpoint_path: Union[str, Path], model_name: str):
    """Return ``transformers.LlamaConfig`` of a checkpoint in Meta's format.

    Args:
        checkpoint_path: folder that has the models' folders.
        model_name: folder with ``params.json`` and ``consolidated.*.pth``, which say the size of
            the vocabulary where ``params.json`` does not.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: ``params.json`` lacks a field.
    """
    from transformers import LlamaConfig

    folder = Path(checkpoint_path) / model_name
    params = json.loads((folder / "params.json").read_text())
    for name in _META_FIELDS:
        if name not in params:
            raise ValueError(f"{folder / 'params.json'} has no {name}")
    vocab_size = params.get("vocab_size", -1)
    theta = float(params.get("rope_theta", 10000.0))
    scaled = _SCALED if params.get("use_scaled_rope", False) else {"rope_type": "default"}
    return LlamaConfig(
        hidden_size=params["dim"],
        intermediate_size=_meta_hidden(params),
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        num_hidden_layers=params["n_layers"],
        rms_norm_eps=params["norm_eps"],
        vocab_size=_meta_vocab_size(folder) if vocab_size < 0 else vocab_size,
        rope_parameters={**scaled, "rope_theta": theta},
        tie_word_embeddings=False,
    )


def config_from_hf_checkpoint(checkpoint_path: Union[str, Path], model_name: str):
    """Return ``transformers.LlamaConfig`` of a checkpoint of Hugging Face, in the folder
    ``{model_name}-hf`` of ``checkpoint_path``, or ``model_name`` where there is no such folder."""
    from transformers import LlamaConfig

    folder = Path(checkpoint_path) / f"{model_name}-hf"
    folder = folder if folder.is_dir() else Path(checkpoint_path) / model_name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    return LlamaConfig.from_pretrained(folder)


def config_from_checkpoint(
    checkpoint_path: Union[str, Path], model_name: str, checkpoint_format: str = "meta"
):
    """Return ``config_from_meta_checkpoint`` or, with ``checkpoint_format`` "hf",
    ``config_from_hf_checkpoint``."""
    if checkpoint_format == "meta":
        return config_from_meta_checkpoint(checkpoint_path, model_name)
    if checkpoint_format == "hf":
        return config_from_hf_checkpoint(checkpoint_path, model_name)
    raise ValueError(f"checkpoint_format must be 'meta' or 'hf', got {checkpoint_format!r}")


def state_dicts_from_checkpoint(
    checkpoint_path: Union[str, Path], model_name: str
) -> list[dict[str, Tensor]]:
    """Return the state dicts of a checkpoint in Meta's format, one a shard, in their order.

    ``combine_state_dicts_tp`` makes one of them, after ``remap_state_dict_meta_llama`` of each.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: a file is damaged; the message names it.
    """
    return [_load(path) for path in _meta_shards(Path(checkpoint_path) / model_name)]


def llama_config_to_gpt2_config(llama_config):
    """Return ``transformers.GPT2Config`` of a ``transformers.LlamaConfig``.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs = llama_config
    attention_bias = getattr(theirs, "attention_bias", False)
    mlp_bias = getattr(theirs, "mlp_bias", False)
    return gpt2_config(
        theirs,
        vocab_size=theirs.vocab_size,
        n_positions=0,
        n_embd=theirs.hidden_size,
        n_layer=theirs.num_hidden_layers,
        n_head=theirs.num_attention_heads,
        n_head_kv=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None),
        n_inner=theirs.intermediate_size,
        mlp_multiple_of=1,
        activation_function=activation("llama_config", "hidden_act", theirs.hidden_act, gated=True),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=getattr(theirs, "attention_dropout", 0.0),
        layer_norm_epsilon=theirs.rms_norm_eps,
        initializer_range=theirs.initializer_range,
        tie_word_embeddings=theirs.tie_word_embeddings,
        rms_norm=True,
        rotary_emb_interleaved=True,
        qkv_proj_bias=attention_bias,
        out_proj_bias=attention_bias,
        mlp_fc1_bias=mlp_bias,
        mlp_fc2_bias=mlp_bias,
        **rope(theirs),
    )
