"""Which conversion a checkpoint of Hugging Face needs, by its configuration or its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Union

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flash_attn.models._config import options_of

# How names of such models start that are no folders.
_NAMES = {
    "gpt2": "gpt2",
    "openai-community/gpt2": "gpt2",
    "facebook/opt": "opt",
    "tiiuae/falcon-": "falcon",
    "meta-llama/": "llama",
    "EleutherAI/gpt-neox-": "gpt_neox",
    "EleutherAI/pythia-": "gpt_neox",
    "togethercomputer/RedPajama-INCITE-": "gpt_neox",
    "EleutherAI/gpt-j-": "gptj",
    "bigcode/": "gpt_bigcode",
    "baichuan-inc/": "baichuan",
    "cerebras/btlm": "btlm",
}

_OURS = "transformer.layers."


class WithoutRandomNumbers(TorchFunctionMode):
    """In whose context parameters stay as they were allocated."""

    _SKIPPED = (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_filling = func in self._SKIPPED or getattr(func, "__module__", "") == "torch.nn.init"
        target = args[0] if args else kwargs.get("tensor")
        if is_filling and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


def model_type_of(model_name: Union[str, Path]) -> Optional[str]:
    """Return Hugging Face's ``model_type`` of a folder, by its ``config.json``, or of a name that
    starts like those of a known family; None: neither says it."""
    file = Path(model_name) / "config.json"
    if file.is_file():
        try:
            return json.loads(file.read_text()).get("model_type")
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}") from None
    for start, model_type in _NAMES.items():
        if str(model_name).startswith(start):
            return model_type
    return None


def convert(model_name: Union[str, Path], state_dict: Mapping[str, Tensor], config):
    """Return a checkpoint's state dict by the names of ``GPTLMHeadModel``.

    Args:
        model_name: folder or name of the checkpoint.
        state_dict: its tensors, by Hugging Face's names or by ours.
        config: of the model here.

    Raises:
        ValueError: what it is is unknown.
        RuntimeError: it does not fit the configuration; the message names the parameter.
    """
    if any(name.startswith(_OURS) for name in state_dict):
        return dict(state_dict)
    from flash_attn.models._hf_families import MODEL_TYPES, family_of

    model_type = model_type_of(model_name)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model_name {str(model_name)!r} must be a folder whose config.json has a model_type "
            f"among {', '.join(MODEL_TYPES)}, got {model_type!r}"
        )
    return family_of(model_type).layout(options_of(config)).to_ours(state_dict)
