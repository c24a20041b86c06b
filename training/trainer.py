"""The training loop: steps, evaluation, samples, checkpoints and going on from them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor

from flash_attn.models.gpt import GPTLMHeadModel
from training.callbacks import Callback
from training.checkpoint import Checkpoints, newest_checkpoint, verify
from training.corpus import Corpus
from training.dataset import TokenDataset, training_loader
from training.export import export
from training.model import (
    DTYPES,
    LanguageModel,
    base_model,
    make_model,
    reshard,
    set_gradient_sync,
    spread,
    unwrapped,
    whole_parameters,
)
from training.optim import MovingAverage, make_optimizer
from training.processes import StopSignal, seed_everything
from training.schedules import make_scheduler
from training.settings import SettingError, Settings, as_dict
from training.state import check_same_course, facts_of, load_state, state_of
from training.throughput import Throughput, flops_per_token, measured_peak, peak_memory_mib


class Trainer:
    """A run: its model and everything that changes with its steps.

    step, tokens: done so far. metrics of the last step: ``last``.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        device: torch.device,
        callbacks: list[Callback],
    ):
        """Make everything; the state of ``settings.trainer.resume`` comes with ``run``.

        Raises SettingError for settings that do not fit the processes, the data or the callbacks.
        """
        self.settings, self.corpus, self.device, self.callbacks = (
            settings,
            corpus,
            device,
            callbacks,
        )
        self.out = Path(settings.out)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_first = self.rank == 0
        self.step, self.stop = 0, False
        options = settings.trainer
        self._share = _share(settings, self.world_size)
        self.micro_batch = min(options.micro_batch, self._share)
        self.strategy = _strategy(settings, device, self.world_size)
        self._make_model()
        self._make_data()
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        for callback in callbacks:
            if hasattr(callback, "check"):
                callback.check(self)

    def _make_model(self) -> None:
        settings, options = self.settings, self.settings.trainer
        seed_everything(settings.seed)
        model = make_model(settings.model, self.corpus.tokenizer).to(self.device)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._flops = flops_per_token(model, settings.data.seqlen)
        language_model = LanguageModel(model, linear_loss=options.precision != "fp16")
        self._warm_up(language_model)
        self.model = spread(language_model, self.strategy, self.device, options.precision)
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.scheduler = make_scheduler(self.optimizer, settings.scheduler, options.max_steps)
        self.ema = None
        if options.ema_decay is not None:
            self.ema = MovingAverage(unwrapped(self.model), options.ema_decay)
        seed_everything(settings.seed, self.rank, 0)
        self._forward = torch.compile(self.model) if options.compile else self.model

    def _warm_up(self, model: LanguageModel) -> None:
        """Run a short forward and backward, and see that all that is trained has a gradient."""
        tokens = torch.zeros(1, min(self.settings.data.seqlen, 8) + 1, dtype=torch.int64)
        with self._autocast():
            loss = model(tokens.to(self.device))
        if loss.requires_grad:
            loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                raise SettingError(
                    f"model.lora.target_modules must be modules that the model calls, got "
                    f"{self.settings.model.lora.target_modules}: {name} has no gradient"
                )
        model.zero_grad(set_to_none=True)

    def _make_data(self) -> None:
        settings, data = self.settings, self.settings.data
        self.dataset = TokenDataset(self.corpus.train, data.seqlen)
        self.loader = training_loader(
            self.dataset, settings.seed, settings.trainer.global_batch, self.rank,
            self.world_size, data.workers,
        )  # fmt: skip
        self._validation = None
        if self.corpus.validation is not None:
            self._validation = TokenDataset(self.corpus.validation, data.seqlen)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, of all processes."""
        return self.step * self.settings.trainer.global_batch * self.settings.data.seqlen

    def say(self, text: str) -> None:
        """Print a line on the first process."""
        if self.is_first:
            print(text, flush=True)

    def _tell(self, event: str, *arguments) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def _autocast(self):
        precision = self.settings.trainer.precision
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[precision])

    # ---------------------------------------------------------------- the loop

    def run(self) -> dict[str, float]:
        """Train from where the run stands to ``max_steps``; return the last metrics.

        Raises CheckpointError for a damaged checkpoint, before anything of it is taken, and for one
        that cannot be written; FloatingPointError, naming the step, for a loss or a gradient norm
        that is not finite: the checkpoint before it stays the newest.
        """
        signals, self.last = StopSignal(), {}
        try:
            self._open_checkpoints()
            self._settle_buckets()
            self._tell("on_start")
            try:
                self._loop(signals)
            except FloatingPointError as error:  # on all processes
                self._checkpoints.wait()
                newest = self._checkpoints.newest() or "none"
                raise FloatingPointError(f"{error}; the last checkpoint is {newest}") from None
            self._checkpoints.wait()
            if not self.stop:
                self.say(f"wrote {export(self)}")
            else:
                stored, resume = self._checkpoints.newest(), self.settings.trainer.resume
                by = "the same command" if resume == "auto" else "trainer.resume=auto"
                self.say(f"stopped at step {self.step}, stored in {stored}; {by} goes on")
        finally:
            signals.restore()
            self._tell("on_end")
        return self.last

    def _loop(self, signals: StopSignal) -> None:
        options = self.settings.trainer
        end = None if options.max_minutes is None else time.monotonic() + 60 * options.max_minutes
        peak = 1e12 * options.peak_tflops if options.peak_tflops else self._measured_peak()
        speed = Throughput(self._flops, peak * self.world_size)
        batches = iter(self.loader)
        while self.step < options.max_steps and not self.stop:
            wants_stop = signals.arrived or (end is not None and time.monotonic() > end)
            metrics = self._train_step(next(batches), wants_stop)
            self.step += 1
            speed.add(self.settings.trainer.global_batch * self.settings.data.seqlen)
            is_last = self.step == options.max_steps or self.stop
            if self.step % options.log_every == 0 or is_last:
                metrics |= speed.since_last() | {"memory_mib": peak_memory_mib(self.device)}
            self.last |= metrics
            self._tell("on_step", metrics)
            mark = speed.pause()
            self._after_step(is_last)
            speed.go_on(mark)

    def _measured_peak(self) -> float:
        return measured_peak(self.device, self.settings.trainer.precision)

    def _after_step(self, is_last: bool) -> None:
        options = self.settings.trainer
        every = options.checkpoint_every
        saves = self.stop or bool(every and (is_last or self.step % every == 0))
        if saves or is_last:
            self._check_weights()
        if self._validation is not None and (
            is_last or (options.evaluate_every and self.step % options.evaluate_every == 0)
        ):
            self.last |= (metrics := self.evaluate())
            self._tell("on_evaluation", metrics)
        if saves:
            self._checkpoints.save(self.step, state_of(self), facts_of(self))

    def _train_step(self, batch: Tensor, wants_stop: bool) -> dict[str, float]:
        """Return loss and learning rate; the gradient norm where gradients are clipped."""
        micro_batches = batch.to(self.device, non_blocking=True).split(self.micro_batch)
        total = torch.zeros((), device=self.device)
        for i, tokens in enumerate(micro_batches):
            set_gradient_sync(self.model, i == len(micro_batches) - 1)
            with self._autocast():
                loss = self._forward(tokens) * (len(tokens) / len(batch))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        metrics = {"loss": self._mean_loss(total, wants_stop)}
        metrics["lr"] = self.scheduler.get_last_lr()[0]
        if self.settings.trainer.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            metrics["grad_norm"] = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update()
        return metrics

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Raise FloatingPointError unless the weights give a finite loss: the step that spoils them
        may itself have one."""
        tokens = self.dataset[0][None].to(self.device)
        with self._fork_rng(), self._autocast():
            self.model.eval()
            try:
                loss = self.model(tokens).double()
            finally:
                self.model.train()
                reshard(self.model)
        dist.all_reduce(loss)
        if not math.isfinite(loss := loss.item() / self.world_size):
            raise FloatingPointError(f"the loss with the weights of step {self.step} is {loss}")

    def _clip(self) -> float:
        """Clip gradients and return their norm before. One that is not finite is refused, before
        the weights have it, unless a scaler leaves the step out."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.trainer.clip_grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise FloatingPointError(f"the gradient norm of step {self.step + 1} is {norm}")
        return norm

    def _mean_loss(self, loss: Tensor, wants_stop: bool) -> float:
        """Return the mean over processes; what one of them wants, all do."""
        values = torch.stack([loss.double(), torch.full_like(loss, wants_stop).double()])
        dist.all_reduce(values)
        mean, stops = (values / self.world_size).tolist()
        self.stop = stops > 0
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss of step {self.step + 1} is {mean}")
        return mean

    def _settle_buckets(self) -> None:
        """Let DDP choose its buckets, as it does after a first backward, before the first step: the
        order of its sums is then the same in a run that goes on from a checkpoint."""
        if self.strategy != "ddp" or self.world_size == 1:
            return
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        with self._fork_rng():
            for _ in range(2):
                self.model(tokens).backward()
        self.model.zero_grad(set_to_none=True)

    def _fork_rng(self):
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    # ---------------------------------------------------------------- evaluation

    def averaged(self):
        """Give the model the averaged weights, if there are any, for a while."""
        return self.ema.in_place() if self.ema else nullcontext()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode and the averaged weights; the generators stay as they are."""
        with self.averaged(), self._fork_rng():
            self.model.eval()
            try:
                yield
            finally:
                self.model.train()
                reshard(self.model)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return validation_loss, in nats a token, and perplexity, over the first
        ``evaluate_batches`` micro batches' worth of sequences of the validation text."""
        options = self.settings.trainer
        count = min(len(self._validation), options.evaluate_batches * options.micro_batch)
        rounds = math.ceil(count / (options.micro_batch * self.world_size))
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with self._evaluating():
            for i in range(rounds):  # FSDP: as many on each process
                first = (i * self.world_size + self.rank) * options.micro_batch
                rows = range(first, min(first + options.micro_batch, count))
                tokens = torch.stack([self._validation[row] for row in rows or [0]])
                with self._autocast():
                    loss = self._forward(tokens.to(self.device))
                sums += torch.tensor([len(rows) * loss.item(), len(rows)], device=self.device)
        dist.all_reduce(sums)
        loss = (sums[0] / sums[1]).item()
        return {"validation_loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    @property
    def positions(self) -> int:
        """Tokens that the model has positions for; 0: any number."""
        return max(
            getattr(base_model(unwrapped(self.model).model).config, "n_positions", 0) or 0, 0
        )

    def encoded(self, text: str) -> Tensor:
        """Return a text's tokens, int64 (seqlen,)."""
        return torch.from_numpy(self.corpus.tokenizer.encode_batch([text])[0].astype("int64"))

    @torch.no_grad()
    def sample(self, prompt: str, tokens: int, temperature: float, top_k: int) -> str:
        """Return the prompt and what the model writes after it, as far as its positions go. All
        processes must call this."""
        language_model = unwrapped(self.model)
        model, ids = base_model(language_model.model), self.encoded(prompt)[None]
        length = ids.shape[1] + tokens
        if self.positions:
            length = min(length, self.positions)
        options = {"top_k": top_k, "temperature": temperature}
        if not isinstance(model, GPTLMHeadModel):  # transformers'
            options["do_sample"] = True
        with self._evaluating(), whole_parameters(language_model):
            torch.manual_seed(self.settings.seed)
            out = model.generate(input_ids=ids.to(self.device), max_length=length, **options)
        return self.corpus.tokenizer.decode(out[0].tolist())

    # ---------------------------------------------------------------- checkpoints

    def _open_checkpoints(self) -> None:
        """Take the state to go on from, if there is one. What is wrong with it is refused before
        anything is written."""
        options, folder = self.settings.trainer, self.out / "checkpoints"
        checkpoint = None
        if options.resume == "auto":
            checkpoint = newest_checkpoint(folder)
        elif options.resume != "never":
            checkpoint = Path(options.resume)
        if checkpoint is not None:
            facts = verify(checkpoint)
            check_same_course(self, facts, checkpoint)
        self._write_settings()
        self._checkpoints = Checkpoints(folder, options.keep_checkpoints, options.async_checkpoints)
        if options.resume != "auto":
            self._checkpoints.set_aside_after(checkpoint)
        if checkpoint is not None:
            load_state(self, checkpoint, facts)
            self.say(f"going on from {checkpoint}")

    def _write_settings(self) -> None:
        if self.is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.yaml").write_text(OmegaConf.to_yaml(as_dict(self.settings)))
        dist.barrier()


def _share(settings: Settings, world_size: int) -> int:
    """Return how many sequences of a step are a process's."""
    options = settings.trainer
    if options.global_batch % world_size:
        raise SettingError(
            f"trainer.global_batch must be a multiple of the {world_size} processes, got "
            f"{options.global_batch}"
        )
    share = options.global_batch // world_size
    if share % min(options.micro_batch, share):
        raise SettingError(
            f"trainer.micro_batch must divide a process's share of trainer.global_batch, {share}, "
            f"got {options.micro_batch}"
        )
    return share


def _strategy(settings: Settings, device: torch.device, world_size: int) -> str:
    """Return "ddp" or "fsdp": automatically FSDP where a GPU has to share the model's state."""
    chosen = settings.trainer.strategy
    if chosen != "auto":
        return chosen
    return "fsdp" if world_size > 1 and device.type == "cuda" else "ddp"
