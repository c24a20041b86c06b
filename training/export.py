"""What a run leaves for use: the model's folder, or LoRA's adapter, in Hugging Face's format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from training.model import base_model, unwrapped

if TYPE_CHECKING:
    from training.trainer import Trainer


_WORDS = "transformer.embeddings.word_embeddings.weight"


def export(trainer: Trainer) -> Path:
    """Write the weights, the averaged ones where there are, and return their folder.

    ``model/``: config.json and model.safetensors, for ``from_pretrained`` of GPTLMHeadModel or of
    transformers; with LoRA ``adapter/``, for PEFT's ``PeftModel.from_pretrained``. All processes
    must call this; the first writes.
    """
    language_model = unwrapped(trainer.model)
    model, has_lora = language_model.model, trainer.settings.model.lora.rank > 0
    folder = trainer.out / ("adapter" if has_lora else "model")
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_lora, strict=not has_lora
    )
    with trainer.averaged():  # until all is written: the state dict may be the model's own tensors
        state = get_model_state_dict(language_model, options=options)
        state = {name.removeprefix("model."): value for name, value in state.items()}
        if trainer.is_first and hasattr(model, "save_pretrained"):
            model.save_pretrained(folder, state_dict=state)
        elif trainer.is_first:
            _save(base_model(model).config, state, folder)
    return folder


def _save(config, state: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    if config.tie_word_embeddings:  # the head's weight is the embedding's
        head, words = state.pop("lm_head.weight", None), state.get(_WORDS)
        if head is not None and words is not None and not torch.equal(head, words):
            raise ValueError(
                f"lm_head.weight must be {_WORDS} where config.tie_word_embeddings is True, and "
                "they differ: the folder would have the embeddings alone"
            )
    config.save_pretrained(folder)
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
