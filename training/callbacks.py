"""What a run tells while it goes: a CSV file, TensorBoard, a progress bar, samples of text.

A callback is any class with these methods; the section ``callbacks`` of the settings names them by
``_target_``. All processes make them; only the first tells.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.settings import SettingError

if TYPE_CHECKING:
    from training.trainer import Trainer


class Callback:
    """Does nothing; subclasses say what they wait for."""

    def check(self, trainer: Trainer) -> None:
        """Called before anything is written; raises SettingError for a run that it is not for. It
        need not be there."""

    def on_start(self, trainer: Trainer) -> None:
        """Called before the first step, with the state restored."""

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called after each step: with ``loss`` and ``lr``, and every ``log_every``-th with
        gradient norm, tokens_per_second, mfu and memory_mib."""

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called with ``validation_loss`` and ``perplexity``."""

    def on_end(self, trainer: Trainer) -> None:
        """Called after the last step, also where an exception ends the run."""


def _formatted(value: Any) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)


class CsvLog(Callback):
    """``metrics.csv``: a row a step, floats to their last bit. Going on from a checkpoint drops the
    rows after it."""

    COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu",
               "memory_mib", "validation_loss", "perplexity")  # fmt: skip

    def __init__(self, file: str = "metrics.csv"):
        self._name, self._file = file, None

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.is_first:
            return
        path = trainer.out / self._name
        rows = []
        if trainer.step and path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if _is_until(row, trainer.step)]
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(path)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, self.COLUMNS, extrasaction="ignore")

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._write(trainer, metrics)

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._write(trainer, metrics)

    def _write(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self._file is not None:
            row = {"step": trainer.step, "tokens": trainer.tokens, **metrics}
            self._writer.writerow({name: _formatted(value) for name, value in row.items()})
            self._file.flush()

    def on_end(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()


def _is_until(row: dict[str, str | None], step: int) -> bool:
    """Whether a row, of which a kill may have left a part, is of this step or an earlier one."""
    value = row.get("step") or ""
    return value.isdigit() and int(value) <= step and row.get("perplexity") is not None


class TensorBoardLog(Callback):
    """Scalars and samples for ``tensorboard --logdir``; going on drops what is after the step."""

    def __init__(self, folder: str = "tensorboard"):
        self._name, self._writer = folder, None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.is_first:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(trainer.out / self._name, purge_step=trainer.step + 1)

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self._writer is not None and "tokens_per_second" in metrics:
            self._add("train", trainer.step, metrics)

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self._writer is not None:
            self._add("validation", trainer.step, metrics)

    def on_sample(self, trainer: Trainer, text: str) -> None:
        if self._writer is not None:
            self._writer.add_text("sample", f"```\n{text}\n```", trainer.step)

    def _add(self, group: str, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def on_end(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()


class Progress(Callback):
    """A bar of tqdm on a terminal; elsewhere, or without tqdm, a line every ``log_every`` steps.

    The loss is the mean of the steps since the line before, those of metrics.csv are each step's.

    lines: at most so many lines in a run; null: all.
    """

    def __init__(self, lines: int | None = None):
        self._lines, self._bar, self._losses = lines, None, []

    def on_start(self, trainer: Trainer) -> None:
        if trainer.is_first and sys.stdout.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            steps = trainer.settings.trainer.max_steps
            self._bar = tqdm(total=steps, initial=trainer.step, unit="step", dynamic_ncols=True)

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._losses.append(metrics["loss"])
        if self._bar is not None:
            self._bar.update()
        if "tokens_per_second" not in metrics or (self._bar is None and not self._is_due(trainer)):
            return
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        text = (
            f"loss {mean:.4f}  lr {metrics['lr']:.2e}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  MFU {metrics['mfu']:.1%}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        steps = trainer.settings.trainer.max_steps
        trainer.say(f"step {trainer.step:>{len(str(steps))}}/{steps}  {text}")

    def _is_due(self, trainer: Trainer) -> bool:
        step, steps = trainer.step, trainer.settings.trainer.max_steps
        every = 1 if self._lines is None else max(steps // self._lines, 1)
        log_every = trainer.settings.trainer.log_every
        return step // every > (step - log_every) // every

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        trainer.say(
            f"step {trainer.step}: validation loss {metrics['validation_loss']:.4f}, "
            f"perplexity {metrics['perplexity']:.2f}"
        )

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()


class Samples(Callback):
    """Text that the model writes after a prompt, at each evaluation, printed and appended to
    ``samples.txt``."""

    def __init__(
        self,
        prompt: str = "The ",
        tokens: int = 64,
        temperature: float = 0.8,
        top_k: int = 50,
        file: str = "samples.txt",
    ):
        """Raises ValueError for an argument out of range."""
        if not prompt:
            raise ValueError(f"prompt must have text, got {prompt!r}")
        for name, value, least in (("tokens", tokens, 1), ("top_k", top_k, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
        self._prompt, self._tokens, self._name = prompt, tokens, file
        self._options = {"temperature": temperature, "top_k": top_k}

    def check(self, trainer: Trainer) -> None:
        """Raise SettingError for a prompt that nothing can follow."""
        count, positions = len(trainer.encoded(self._prompt)), trainer.positions
        if count < 1 or (positions and count >= positions):
            most = f" and fewer than model.n_positions ({positions})" if positions else ""
            raise SettingError(
                f"the prompt of callback Samples must have at least one token{most}, got {count}: "
                f"{self._prompt!r:.80}"
            )

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        text = trainer.sample(self._prompt, self._tokens, **self._options)
        if trainer.is_first:
            with Path(trainer.out / self._name).open("a") as file:
                file.write(f"step {trainer.step}\n{text}\n\n")
            trainer.say(f"step {trainer.step}: sample\n{text}")
            for callback in trainer.callbacks:
                if hasattr(callback, "on_sample"):
                    callback.on_sample(trainer, text)
