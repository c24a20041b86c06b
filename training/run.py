"""Train a model: ``python -m training.run experiment=tiny trainer.max_steps=200``.

On several processes: ``torchrun --nproc-per-node 2 -m training.run experiment=tiny``. Going on
after a kill is the same command again.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from difflib import get_close_matches
from pathlib import Path

import hydra
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from training.callbacks import Callback
from training.checkpoint import CheckpointError
from training.corpus import Corpus, CorpusError, prepare
from training.processes import start_processes
from training.settings import SettingError, Settings, as_dict, settings_from
from training.token_file import TokenFileError
from training.trainer import Trainer

CONFIGS = Path(__file__).parent / "configs"

# ${python_stdlib:} in a config: the folder of Python's own modules.
OmegaConf.register_new_resolver(
    "python_stdlib", lambda: sysconfig.get_paths()["stdlib"], replace=True
)
ConfigStore.instance().store("schema", Settings)
_REFUSALS = (SettingError, CorpusError, TokenFileError, CheckpointError, FloatingPointError)


def _in_one_line(text: str) -> str:
    return "; ".join(filter(None, (line.strip() for line in text.splitlines()))).replace(":;", ":")


def make_callbacks(section: dict) -> list[Callback]:
    """Return the callbacks of the settings; null leaves one out. Raises SettingError."""
    callbacks = []
    for name, options in section.items():
        if options is None:
            continue
        try:
            callbacks.append(instantiate(options))
        except Exception as error:
            reason = _in_one_line(str(error.__cause__ or error))
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        _leave()
        raise SystemExit(130) from None
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


def _refusal(error: Exception) -> str:
    """Return one sentence of what Hydra does not compose."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    key = getattr(cause or error, "full_key", None)
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and key:
        section, _, _ = key.rpartition(".")
        known = _field_names(section)
        near = get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"{key} is no setting; {hint}"
    if cause is not None and key:
        return f"{key}: {str(cause.msg or cause).splitlines()[0]}"
    text = str(error).removeprefix("In 'config': ")
    name, found, options = text.partition("Available options in ")
    if found:
        known = ", ".join(options.partition("Config search path:")[0].partition(":")[2].split())
        return f"{_in_one_line(name)}; there are {known}"
    return _in_one_line(text)


def _field_names(section: str) -> list[str]:
    fields = as_dict(Settings())
    for part in filter(None, section.split(".")):
        fields = fields.get(part) or {}
    return [f"{section}.{name}" if section else name for name in fields]


def check_command_line(arguments: list[str]) -> None:
    """Raise SettingError for what Hydra would refuse in several lines."""
    if any(argument.startswith("-") for argument in arguments):  # Hydra's own
        return
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            hydra.compose("config", overrides=arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError(_refusal(error)) from None


if __name__ == "__main__":
    try:
        check_command_line(sys.argv[1:])
    except SettingError as error:
        raise SystemExit(f"error: {error}") from None
    main()
