"""``config.json`` of a folder of Hugging Face: read, with the defaults of its kind of model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch

from flash_attn._arguments import wrong_kind
from flash_attn.models._config import FIELDS
from flash_attn.models._hf_defaults import DEFAULTS

# architectures: model_type, of files that have no model_type.
_ARCHITECTURES = {
    "BTLMLMHeadModel": "btlm",
    "BaichuanForCausalLM": "baichuan",
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTBigCodeForCausalLM": "gpt_bigcode",
    "GPTJForCausalLM": "gptj",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GemmaForCausalLM": "gemma",
    "GptOssForCausalLM": "gpt_oss",
    "LlamaForCausalLM": "llama",
    "MinistralForCausalLM": "ministral",
    "MistralForCausalLM": "mistral",
    "OPTForCausalLM": "opt",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# model_type of a model that is of no kind that Hugging Face has: config.json has the attributes of
# this package, the files of weights its names.
OWN_TYPE = "flash_attn_gpt"


class MissingField(ValueError, AttributeError):
    """A field that a configuration lacks."""


class HFConfig(SimpleNamespace):
    """The fields of a ``config.json``, and the defaults of those that it does not have."""

    def __getattr__(self, name: str) -> Any:
        kind = self.__dict__.get("model_type", "model")
        raise MissingField(f"config.json of a {kind} model has no {name}")


def _json(path: Path) -> dict:
    """Return the object in a JSON file.

    Raises:
        ValueError: it has none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must have an object, got {content!r:.80}")
    return content


def model_type_of(fields: Mapping[str, Any]) -> str:
    """Return the kind of model that a ``config.json`` is of.

    Raises:
        ValueError: it is none that is known here; the message has those that are.
    """
    kind, architectures = fields.get("model_type"), fields.get("architectures") or []
    if kind is None:
        kind = next((_ARCHITECTURES[a] for a in architectures if a in _ARCHITECTURES), None)
    if kind in DEFAULTS or kind == OWN_TYPE:
        return kind
    raise ValueError(
        f"config.json's model_type must be one of {', '.join(DEFAULTS)}, got {kind!r} "
        f"(architectures {architectures!r:.80})"
    )


def _own_defaults() -> dict[str, Any]:
    defaults = {name: default for name, (default, _) in FIELDS.items()}
    return {**dict.fromkeys(TOKENS), **defaults}


def _check_rope(kind: str, fields: Mapping[str, Any]) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"config.json's {name} must be an object or null, got {rope!r:.80}")
        nested = {k: v for k, v in rope.items() if isinstance(v, dict)}
        for key, one in (nested or {"": rope}).items():
            rope_type = one.get("rope_type", one.get("type", "default"))
            known = (*_ROPE_TYPES, "su") if kind == "phi3" else _ROPE_TYPES
            if rope_type not in known:
                where = f"[{key!r}]" if key else ""
                raise ValueError(
                    f"config.json's {name}{where}['rope_type'] must be one of {', '.join(known)}, "
                    f"got {rope_type!r}"
                )


# Which may be null where their default is something else.
_NULLABLE = {
    *TOKENS,
    "attention_dropout",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "num_key_value_heads",
    "rope_local_base_freq",
    "sliding_window",
    "use_bidirectional_attention",
}


def _check_types(kind: str, fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field that is not of the type of its default."""
    for name, default in DEFAULTS[kind].items():
        value = fields.get(name, default)
        if default is None or name in TOKENS or (value is None and name in _NULLABLE):
            continue
        types = (int, float) if isinstance(default, float) else (type(default),)
        is_number = not isinstance(default, (bool, str))
        if not isinstance(value, types) or (is_number and isinstance(value, bool)):
            expected = " or ".join(one.__name__ for one in types)
            raise ValueError(f"config.json's {name} must be {expected}, got {value!r:.80}")


def config_of(fields: Mapping[str, Any]) -> HFConfig:
    """Return the configuration that the fields of a ``config.json`` say.

    Raises:
        ValueError: the kind of model, or of its rotary embedding's scaling, is unknown, or a field
            is of another type.
    """
    kind = model_type_of(fields)
    if kind == OWN_TYPE:  # whose attributes are checked where the model is made
        return HFConfig(**{**_own_defaults(), **fields})
    _check_types(kind, fields)
    _check_rope(kind, fields)
    given = {**fields, "model_type": kind}
    if kind == "gemma3":
        text = fields.get("text_config")
        if not isinstance(text, dict):
            raise ValueError(f"config.json's text_config must be an object, got {text!r:.80}")
        given["text_config"] = config_of({**text, "model_type": "gemma3_text"})
    if kind == "gpt_neox" and "rotary_emb_base" in given:
        given.setdefault("rope_theta", given["rotary_emb_base"])
    return HFConfig(**{**DEFAULTS[kind], **given})


def _how_to_get(folder: Path) -> str:
    """Return how to download what looks like the name of a model of the hub."""
    if folder.is_absolute() or len(folder.parts) != 2 or ".." in folder.parts or folder.exists():
        return ""
    name = folder.as_posix()
    return f"; if it is a model of the hub, first: hf download {name} --local-dir {folder.name}"


def read_fields(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a folder's ``config.json``, and the tokens that start, end and pad
    sequences: of ``generation_config.json`` where that has them.

    Raises:
        FileNotFoundError: there is no such folder, or no ``config.json`` in it.
        ValueError: a file is no JSON.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder{_how_to_get(folder)}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    fields, generation = _json(folder / "config.json"), folder / "generation_config.json"
    tokens = _json(generation) if generation.is_file() else {}
    return fields, {name: tokens[name] for name in TOKENS if tokens.get(name) is not None}


def as_dtype(dtype) -> Optional[torch.dtype]:
    """Return a dtype, also one given by name, or None.

    Raises:
        ValueError, TypeError: it is none that the models here have, or no dtype.
    """
    if dtype is None or dtype in _DTYPES.values():
        return dtype
    if not isinstance(dtype, (str, torch.dtype)):
        raise wrong_kind("dtype", dtype, "a torch.dtype or its name")
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!s:.80}")


def dtype_of(fields: Mapping[str, Any]) -> Optional[torch.dtype]:
    """Return the dtype that a ``config.json`` says, None: it says none.

    Raises:
        ValueError: it is none that the models here have.
    """
    for name in ("dtype", "torch_dtype"):
        value = fields.get(name)
        if value is None:
            continue
        if value not in _DTYPES:
            raise ValueError(
                f"config.json's {name} must be one of {', '.join(_DTYPES)}, got {value!r}; give "
                "dtype"
            )
        return _DTYPES[value]
    return None
