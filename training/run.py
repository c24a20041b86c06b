"""Train a model: ``python -m training.run experiment=tiny trainer.max_steps=200``.

On several processes: ``torchrun --nproc-per-node 2 -m training.run experiment=tiny``. Going on
after a kill is the same command again.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from pathlib import Path

import hydra
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from training.callbacks import Callback
from training.checkpoint import CheckpointError
from training.corpus import Corpus, CorpusError, prepare
from training.processes import start_processes
from training.settings import SettingError, Settings, settings_from
from training.token_file import TokenFileError
from training.trainer import Trainer

CONFIGS = Path(__file__).parent / "configs"

# ${python_stdlib:} in a config: the folder of Python's own modules.
OmegaConf.register_new_resolver(
    "python_stdlib", lambda: sysconfig.get_paths()["stdlib"], replace=True
)
ConfigStore.instance().store("schema", Settings)
_REFUSALS = (SettingError, CorpusError, TokenFileError, CheckpointError, FloatingPointError)


def make_callbacks(section: dict) -> list[Callback]:
    """Return the callbacks of the settings; null leaves one out. Raises SettingError."""
    callbacks = []
    for name, options in section.items():
        if options is None:
            continue
        try:
            callbacks.append(instantiate(options))
        except Exception as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise SettingError(
                f"callbacks.{name} must be a callback, got {options}: {reason}"
            ) from None
    return callbacks


def prepare_everywhere(settings: Settings) -> Corpus:
    """Let the first process write the token files; return the corpus on all of them."""
    problem = [None]
    if dist.get_rank() == 0:
        try:
            prepare(settings.data, lambda text: print(text, flush=True))
        except _REFUSALS as error:
            problem = [error]
    dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]
    return prepare(settings.data)


def train(settings: Settings) -> Trainer:
    """Train as settings say, in this process or in torchrun's; return the trainer, run to its end.

    Starts a process group; the caller ends it.
    """
    callbacks = make_callbacks(settings.callbacks)
    device = start_processes(settings.trainer.device)
    corpus = prepare_everywhere(settings)
    trainer = Trainer(settings, corpus, device, callbacks)
    trainer.say(
        f"{trainer.num_parameters:,} parameters, {trainer.dataset.header.num_tokens:,} tokens of "
        f"text, {trainer.world_size} x {device.type}, {settings.trainer.precision}; {trainer.out}"
    )
    trainer.run()
    return trainer


def compose_settings(arguments: list[str]) -> Settings:
    """Return the settings that this program has of these arguments, for use from Python."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return settings_from(hydra.compose("config", overrides=arguments))


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(config: DictConfig) -> None:
    """Run a composed config; a refusal is one sentence on stderr and status 1."""
    try:
        train(settings_from(config))
    except _REFUSALS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _leave()
        raise SystemExit(1) from None
    except Exception:
        traceback.print_exc()
        _leave()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave() -> None:
    """End this process at once if there are others: a thread that writes a checkpoint may wait for
    them, and they for this one; torchrun ends them when it sees one gone."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
