"""Models with the weights of a folder of Hugging Face."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from flash_attn.models._config import FIELDS, options_of
from flash_attn.models._hf_families import Family, family_of
from flash_attn.models._hf_folder import TOKENS, as_dtype, config_of, dtype_of, read_fields
from flash_attn.models._pretrained import WithoutRandomNumbers
from flash_attn.models._state_dict import Layout
from flash_attn.models._tensor_parallel import shard_state_dict_tp
from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.utils.distributed import group_rank, group_size
from flash_attn.utils.pretrained import state_dict_from_pretrained

__all__ = ["from_hf"]


def converted_config(fields: Mapping[str, Any], tokens: Mapping[str, Any]) -> tuple[Any, Family]:
    """Return the model's configuration, and how its parameters are converted.

    Args:
        fields: of ``config.json``.
        tokens: in place of those that ``fields`` says.

    Raises:
        ValueError: a field has a value that the model here does not have.
    """
    theirs = config_of(fields)
    family = family_of(theirs.model_type)
    config = family.to_config(theirs)
    for name in TOKENS:
        own = getattr(theirs, name, getattr(config, name))
        setattr(config, name, tokens.get(name, own))
    config.hf_config = dict(fields)
    return config, family


def _override(config, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if name not in FIELDS or name == "process_group":
            raise ValueError(
                f"{name} ({value!r:.80}) is no attribute of the configuration; docs/models.md "
                "has them"
            )
        setattr(config, name, value)


def _check_convertible(fields: Mapping[str, Any], family: Family, strict: bool) -> None:
    """Raise ValueError for weights that are not converted."""
    lacks = family.lacks
    is_partial = lacks is not None and not strict
    if lacks is not None and strict:
        raise ValueError(
            f"config.json's {lacks.field} ({fields.get(lacks.field, 'its default')!s:.80}): "
            f"{lacks.part} is not converted; with strict=False all other weights are"
        )
    quantization = fields.get("quantization_config")
    if quantization is not None and not is_partial:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(
            f"config.json has a quantization_config (quant_method {method!r}); quantized weights "
            "are not converted"
        )


def _problems(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], strict: bool):
    """Return sentences that say what does not fit, by their names."""
    problems = [
        f"{name} has shape {tuple(x.shape)}, by config.json it is {tuple(expected[name].shape)}"
        for name, x in weights.items()
        if name in expected and x.shape != expected[name].shape
    ]
    if strict:
        problems += [f"{name} is missing" for name in expected if name not in weights]
        problems += [f"{name} is unknown" for name in weights if name not in expected]
    return problems


def _check_tied(layout: Layout, weights: Mapping[str, Tensor]) -> None:
    head, words = weights.get(layout.head), weights.get(layout.embedding)
    if layout.head is None or head is None or words is None or head.data_ptr() == words.data_ptr():
        return
    if not torch.equal(head, words):
        raise RuntimeError(
            f"{layout.head} and {layout.embedding} differ in the files, but config.json's "
            "tie_word_embeddings says that they are one"
        )


class _Weights(NamedTuple):
    """A checkpoint that fits.

    layout: names of the parameters.
    tensors: by their names.
    is_whole: whether no parameter of the model here is without one.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    is_whole: bool


def _checked(folder: Path, config, family: Family, strict: bool) -> _Weights:
    """Map a checkpoint into memory.

    Raises:
        FileNotFoundError, ValueError: those of ``state_dict_from_pretrained``.
        RuntimeError: it does not fit the configuration.
    """
    config = copy.copy(config)
    config.process_group = None
    layout = family.layout(options_of(config))
    tensors = layout.prepared(state_dict_from_pretrained(folder))
    # Memory that is not written is not taken. Made on "meta", torch would import a compiler.
    with WithoutRandomNumbers():
        whole = GPTLMHeadModel(config, dtype=torch.bfloat16).state_dict()
    whole = {name: torch.empty_like(x, device="meta") for name, x in whole.items()}
    converted = {entry.ours for entry in layout.entries}
    expected = layout.to_theirs({name: x for name, x in whole.items() if name in converted})
    problems = _problems(expected, tensors, strict)
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise RuntimeError(
            f"the checkpoint in {folder} does not fit its config.json: "
            f"{'; '.join(problems[:8])}{more}"
        )
    _check_tied(layout, tensors)
    is_whole = set(whole) == converted and all(name in tensors for name in expected)
    return _Weights(layout, tensors, is_whole)


@torch.no_grad()
def _copy(model: nn.Module, weights: _Weights, process_group) -> None:
    """Fill the parameters, one after the other, so that there are no two copies of all."""
    own = model.state_dict(keep_vars=True)
    size, rank = group_size(process_group), group_rank(process_group)
    for entry in weights.layout.entries:
        tensors = [weights.tensors.get(name) for name in entry.theirs]
        if any(x is None for x in tensors):
            continue
        (x,) = entry.step.to_ours(tensors)
        if size > 1:
            x = shard_state_dict_tp({entry.ours: x}, model.config, size, rank).get(entry.ours)
        if x is not None:
            own[entry.ours].copy_(x)


def from_hf(
    folder: Union[str, Path],
    *,
    dtype: Optional[Union[torch.dtype, str]] = None,
    device: Optional[Union[str, torch.device]] = None,
    strict: bool = True,
    process_group=None,
    **overrides,
) -> GPTLMHeadModel:
    """Make a model with the configuration and weights of a folder of Hugging Face.

    ``config.json``'s ``model_type`` says which kind of model it is; docs/models.md has those that
    are converted, and ``flash_attn_gpt`` is this package's own. Weights are safetensors or ``.bin``
    files, one or several with an index, and are mapped into memory. No code of transformers' models
    is run, and none of the folder's.

    Args:
        folder: with ``config.json`` and weights, on this machine: nothing is downloaded.
        dtype: of the parameters, or its name ("bfloat16"); None: what ``config.json`` says, else
            that of the files.
        device: of the parameters; None: the CPU.
        strict: whether weights that are missing, or unknown, are an error. Without, parameters
            whose weights are missing have random ones.
        process_group: over which heads, hidden features and vocabulary are divided; every process
            calls this function.
        **overrides: attributes of the configuration here, such as ``fused_dropout_add_ln=True``.
            Over a ``process_group``, ``sequence_parallel`` is False unless it is given, and
            ``pad_vocab_size_multiple`` the number of processes.

    Returns:
        The model, in evaluation mode. Its ``config`` has ``bos_token_id``, ``eos_token_id`` and
        ``pad_token_id`` of ``generation_config.json``, else of ``config.json``, and as
        ``hf_config`` the fields of ``config.json``.

    Raises:
        FileNotFoundError: the folder, ``config.json`` or a file of weights is missing.
        ValueError: a file is damaged, the kind of model is unknown, or a field or an override has a
            value that the model here does not have.
        RuntimeError: a weight is missing or unknown, or its shape is wrong; the message names it.
    """
    folder, dtype = Path(folder), as_dtype(dtype)
    fields, tokens = read_fields(folder)
    config, family = converted_config(fields, tokens)
    if process_group is not None:  # as generation needs it
        size = group_size(process_group)
        overrides = {"sequence_parallel": False, "pad_vocab_size_multiple": size, **overrides}
    _override(config, overrides)
    _check_convertible(fields, family, strict)
    dtype = dtype or dtype_of(fields)
    weights = _checked(folder, config, family, strict)
    words = weights.tensors.get(weights.layout.embedding)
    if dtype is None and words is not None:
        dtype = words.dtype
    with WithoutRandomNumbers() if weights.is_whole else nullcontext():
        model = GPTLMHeadModel(config, process_group=process_group, device=device, dtype=dtype)
    _copy(model, weights, process_group)
    return model.eval()
