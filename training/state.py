"""What a checkpoint holds: all that decides how a run goes on, to the last bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from training.dataset import restore_loader
from training.model import unwrapped
from training.processes import rng_state, seed_everything, set_rng_state
from training.settings import SettingError, as_dict

if TYPE_CHECKING:
    from training.trainer import Trainer


def _options(trainer: Trainer) -> StateDictOptions:
    """With LoRA only the adapters are stored: the rest is the folder's they were made for."""
    has_lora = trainer.settings.model.lora.rank > 0
    return StateDictOptions(ignore_frozen_params=has_lora, strict=not has_lora)


def _tensors(trainer: Trainer) -> dict[str, Any]:
    """Return model, optimizer and averages by name: DTensors where they are sharded, so that any
    number of processes can store and load them."""
    model, optimizer = get_state_dict(
        unwrapped(trainer.model), trainer.optimizer, options=_options(trainer)
    )
    state = {"model": model, "optimizer": optimizer}
    return state | ({"ema": trainer.ema.state_dict()} if trainer.ema else {})


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Return the state of a run. Generators are each process's own; all else is common."""
    common = {
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "loader": {"workers": trainer.loader.num_workers, "loader": trainer.loader.state_dict()},
    }
    state = _tensors(trainer)
    state["common"] = pickle.dumps(common)
    state["rng"] = {str(trainer.rank): pickle.dumps(rng_state())}
    return state


def facts_of(trainer: Trainer) -> dict[str, Any]:
    """Return what the manifest tells of a run."""
    return {
        "step": trainer.step,
        "processes": trainer.world_size,
        "settings": as_dict(trainer.settings),
        "course": _course(trainer),
    }


def _course(trainer: Trainer) -> dict[str, Any]:
    """Return the settings that a run cannot go on without, and the identity of its data."""
    settings = trainer.settings
    model = as_dict(settings.model)
    for name in ("activation_checkpointing", "pretrained", "library"):
        model.pop(name)
    header = trainer.dataset.header
    return {
        "model": model,
        "data": {
            "seqlen": settings.data.seqlen,
            "tokenizer": header.tokenizer,
            "tokens": header.num_tokens,
            "content_crc": header.content_crc,
        },
        # A checkpoint's optimizer brings its own values of these.
        "optimizer": as_dict(settings.optimizer),
        "trainer": {
            "global_batch": settings.trainer.global_batch,
            "ema_decay": settings.trainer.ema_decay,
            "precision": settings.trainer.precision,
        },
        "seed": settings.seed,
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        name = f"{prefix}{name}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def check_same_course(trainer: Trainer, facts: dict[str, Any], checkpoint: Path) -> None:
    """Raise SettingError, naming the field, unless the checkpoint is of these settings and data."""
    stored, present = _flat(facts["course"]), _flat(_course(trainer))
    for name in sorted(stored.keys() | present.keys()):
        if stored.get(name) != present.get(name):
            raise SettingError(
                f"{name} must be {stored.get(name)!r}, as in the checkpoint {checkpoint}, got "
                f"{present.get(name)!r}"
            )


def load_state(trainer: Trainer, checkpoint: Path, facts: dict[str, Any]) -> None:
    """Put a checkpoint's state into a run, which may have another number of processes.

    Then the generators cannot go on where they were: they are seeded from the seed, the process
    and the step.
    """
    has_generators = trainer.world_size == facts["processes"]
    state = _tensors(trainer)
    state["common"] = b""
    if has_generators:
        state["rng"] = {str(trainer.rank): b""}
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        unwrapped(trainer.model),
        trainer.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(trainer),
    )
    common = pickle.loads(state["common"])
    trainer.step = facts["step"]
    trainer.scheduler.load_state_dict(common["scheduler"])
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(common["scaler"])
    restore_loader(trainer.loader, common["loader"], trainer.step)
    if has_generators:
        set_rng_state(pickle.loads(state["rng"][str(trainer.rank)]))
    else:
        seed_everything(trainer.settings.seed, trainer.rank, trainer.step)
    dist.barrier()
