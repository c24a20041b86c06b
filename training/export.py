"""What a run leaves for use: the model's folder, or LoRA's adapter, in Hugging Face's format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from flash_attn.models import to_hf
from flash_attn.models._hf_fields import fields_of
from training.model import unwrapped

if TYPE_CHECKING:
    from training.trainer import Trainer


_WORDS = "transformer.embeddings.word_embeddings.weight"


def export(trainer: Trainer) -> Path:
    """Write the weights, the averaged ones where there are, and return their folder.

    ``model/``: config.json, model.safetensors and the tokenizer. A fine-tuned model is of its
    folder's kind, a new one GPT-2, Mistral or Qwen 3 where it has their shape, for transformers and
    for flash_attn.models.from_hf; any other is for from_hf alone. With LoRA ``adapter/``, for
    PEFT's ``PeftModel.from_pretrained``. All processes must call this; the first writes.

    Raises RuntimeError for a head that is no longer the embedding it is tied to.
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
        if trainer.is_first:
            _save(trainer, model, state, folder)
            trainer.corpus.tokenizer.save(folder)
    return folder


def _save(trainer: Trainer, model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    if trainer.settings.model.lora.rank:  # PEFT need not look whether the vocabulary has grown
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        return
    if hasattr(model, "save_pretrained"):  # transformers'
        model.save_pretrained(folder, state_dict=state)
        return
    fields = getattr(model.config, "hf_config", None)
    if fields is None:
        fields = fields_of(model.config, trainer.settings.data.seqlen)
    to_hf(model, folder, config=fields, state_dict=state)
