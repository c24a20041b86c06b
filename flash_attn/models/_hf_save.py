"""``to_hf``: a model as a folder that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from flash_attn._arguments import as_int
from flash_attn.models._config import FIELDS, GPTOptions, options_of
from flash_attn.models._hf import converted_config
from flash_attn.models._hf_families import Family
from flash_attn.models._hf_folder import TOKENS, model_type_of
from flash_attn.models._tensor_parallel import combine_state_dicts_tp
from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.utils.distributed import group_rank, group_size

__all__ = ["to_hf"]

# Attributes that say how a model computes, or is trained, rather than what; n_inner's width of the
# MLP is compared with mlp_multiple_of in it.
_FREE = {
    "attn_checkpointing",
    "attn_pdrop",
    "checkpoint_blocks",
    "embd_pdrop",
    "fused_bias_fc",
    "fused_dense_sqrelu_dense",
    "fused_dropout_add_ln",
    "fused_mlp",
    "initializer_range",
    "mlp_checkpoint_lvl",
    "mlp_multiple_of",
    "pad_vocab_size_multiple",
    "process_group",
    "resid_pdrop",
    "residual_in_fp32",
    "sequence_parallel",
    "use_flash_attn",
}

_ONE_FILE = "model.safetensors"

# Files of weights that a folder may have, by this or another library.
_WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "*.safetensors.index.json",
    "*.bin.index.json",
)


def _fields_of(model: GPTLMHeadModel, config) -> dict[str, Any]:
    """Return the fields to write.

    Raises:
        ValueError: none are given, and the model has none of the folder that it comes from.
        TypeError: ``config`` is of another kind.
    """
    if config is None:
        config = getattr(model.config, "hf_config", None)
        if config is None:
            raise ValueError(
                "config must be given for a model that is not of from_hf: transformers' "
                "configuration, or the fields of config.json"
            )
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        raise TypeError(
            f"config must be transformers' configuration or a dict, got {type(config).__name__}"
        )
    return dict(fields)


def _values(options: GPTOptions) -> dict[str, Any]:
    """What a model is, by attribute; the width of its MLP by what it comes to."""
    values = {name: getattr(options, name) for name in FIELDS if name not in _FREE}
    return {**values, "n_inner": options.hidden_features, "window_size": (*options.window_size,)}


def difference(config, other) -> Optional[tuple[str, Any, Any]]:
    """Return the first attribute by which two configurations are of different models, with both
    values; None: they are of one."""
    own, theirs = _values(options_of(config)), _values(options_of(other))
    pairs = ((name, value, theirs[name]) for name, value in own.items())
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def _check_same(model: GPTLMHeadModel, converted) -> None:
    """Raise ValueError for a configuration that is not the model's."""
    if (found := difference(model.config, converted)) is not None:
        name, mine, theirs = found
        raise ValueError(
            f"the model's config.{name} is {mine!r:.80}, but {theirs!r:.80} by the "
            "configuration of Hugging Face to write"
        )


def _whole_state_dict(model: GPTLMHeadModel) -> Optional[dict[str, Tensor]]:
    """Return the state dict, put together of those of all processes; None: the first one has it."""
    state_dict = model.state_dict()
    group = model.process_group
    if group_size(group) == 1:
        return state_dict
    state_dict = {name: x.cpu() for name, x in state_dict.items()}
    is_first = group_rank(group) == 0
    parts = [None] * group_size(group) if is_first else None
    dist.gather_object(state_dict, parts, dst=dist.get_global_rank(group, 0), group=group)
    return combine_state_dicts_tp(parts, model.config) if is_first else None


def _theirs(model: GPTLMHeadModel, family: Family, state_dict: Mapping[str, Tensor]):
    """Return the state dict by their names, without the head where it is the embedding.

    Raises:
        ValueError: the head should be the embedding, and is not.
    """
    options = options_of(model.config)
    layout = family.layout(options)
    theirs = layout.to_theirs(state_dict)
    if layout.head is not None:
        head, embedding = theirs.pop(layout.head, None), theirs.get(layout.embedding)
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise ValueError(
                "lm_head.weight must be the word embeddings where config.tie_word_embeddings is "
                "True, and they differ: a folder would have the embeddings alone"
            )
    return theirs


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(state_dict: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Return the names that go into each file, in their order; a tensor is never divided."""
    shards, free = [], 0
    for name, x in state_dict.items():
        size = x.numel() * x.element_size()
        if size > free:
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(name)
        free -= size
    return shards


def _write_weights(folder: Path, state_dict: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards, weight_map = _shards(state_dict, max_shard_bytes), {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else _ONE_FILE
        save_file({n: state_dict[n] for n in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(x.numel() * x.element_size() for x in state_dict.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{_ONE_FILE}.index.json", index)


def _write(folder: Path, fields, tokens, state_dict, max_shard_bytes: int) -> None:
    _write_json(folder / "config.json", fields)
    _write_json(folder / "generation_config.json", tokens)
    _write_weights(folder, state_dict, max_shard_bytes)


def _move(written: Path, folder: Path) -> None:
    """Put files in the place of a folder's, and remove weights that are no longer of it."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(written, folder)
        return
    names = sorted(path.name for path in written.iterdir())
    for name in names:
        os.replace(written / name, folder / name)
    for pattern in _WEIGHTS:
        for path in folder.glob(pattern):
            if path.name not in names:
                path.unlink()


def _save(folder: Path, *content) -> None:
    """Write beside the folder, then move: what fails in between leaves it as it was."""
    folder = folder.resolve()  # a folder can take the place of an empty one, not of a link to it
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be new or a folder, {folder} is a file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        written.chmod(0o755)
        _write(written, *content)
        _move(written, folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _by_first(group, function) -> None:
    """Call a function in the group's first process; what it raises, all do."""
    error: Optional[BaseException] = None
    if group_rank(group) == 0:
        try:
            function()
        except Exception as raised:
            error = raised
    if group_size(group) > 1:
        outcome = [None if error is None else f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
        if error is None and outcome[0] is not None:
            error = RuntimeError(f"the first process of the group failed: {outcome[0]}")
    if error is not None:
        raise error


def to_hf(
    model: GPTLMHeadModel,
    folder: Union[str, Path],
    *,
    config=None,
    state_dict: Optional[Mapping[str, Tensor]] = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model as a folder that transformers loads: ``config.json``,
    ``generation_config.json`` and weights in safetensors files.

    Weights are the model's bit by bit, in its dtype. No tokenizer is written: it is in the folder
    that the model comes from. Files of ``folder`` that have other names stay.

    Args:
        model: of ``from_hf``, or any whose configuration is that of a kind of model there is in
            Hugging Face. Over a process group every process calls this, and the first one writes.
        folder: to write, which may exist.
        config: ``transformers`` configuration or the fields of its ``config.json``, with
            ``model_type``; None: those of the folder that the model comes from.
        state_dict: of the whole model, in place of its own, such as an average of weights.
        max_shard_bytes: of a file, of which there are as many as it takes, with an index.

    Raises:
        ValueError: ``config`` is missing, of an unknown kind, or not that of the model; the message
            names the attribute. The head and the word embeddings are to be one, and differ.
        RuntimeError: ``state_dict`` is not one of the model.
        OSError: ``folder`` is a file, or cannot be written.
    """
    if not isinstance(model, GPTLMHeadModel):
        raise TypeError(f"model must be a GPTLMHeadModel, got {type(model).__name__}")
    if as_int("max_shard_bytes", max_shard_bytes) < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    fields = _fields_of(model, config)
    converted, family = converted_config(fields, {})
    _check_same(model, converted)
    if family.lacks is not None:
        raise ValueError(
            f"a model of config.json's model_type {fields['model_type']!r} is not written: "
            f"{family.lacks.part} ({family.lacks.field}) is not in the model here"
        )
    whole = _whole_state_dict(model) if state_dict is None else dict(state_dict)

    def save() -> None:
        theirs = _theirs(model, family, whole)
        name = "torch_dtype" if "torch_dtype" in fields else "dtype"
        dtype = next(iter(theirs.values())).dtype
        written = {**fields, "model_type": model_type_of(fields), name: str(dtype)[6:]}
        tokens = {n: getattr(model.config, n, None) for n in TOKENS}
        tokens = {n: value for n, value in tokens.items() if value is not None}
        _save(Path(folder), written, tokens, theirs, max_shard_bytes)

    _by_first(model.process_group, save)
