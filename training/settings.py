"""What a training run is given; values that make no sense are named before it starts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

SCHEDULES = ("constant", "linear", "cosine", "wsd")
PRECISIONS = ("fp32", "bf16", "fp16")
STRATEGIES = ("auto", "ddp", "fsdp")
TOKENIZERS = ("bytes", "bpe", "folder")


class SettingError(ValueError):
    """A setting's value is wrong; the sentence names the field and the value."""


@dataclass
class LoraSettings:
    """Low-rank adapters (PEFT), everything else being frozen; rank 0: none."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["Wqkv", "out_proj"])


@dataclass
class ModelSettings:
    """Fields of the GPT2Config that flash_attn.models.gpt.GPTLMHeadModel takes, by its names.

    pretrained: a Hugging Face folder; then the model is that folder's, and of the other fields
        only ``lora`` and ``activation_checkpointing`` count.
    library: what runs a pretrained model: "flash_attn" converts it; "transformers" keeps its own
        modules and gives them flash_attn's attention.
    activation_checkpointing: every how many-th layer keeps its input only; 0 is none.
    """

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    n_head_kv: Optional[int] = None
    n_inner: Optional[int] = None
    n_positions: int = 1024
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    rms_norm: bool = False
    rotary_emb_fraction: float = 0.0
    rotary_emb_base: float = 10000.0
    qk_norm: bool = False
    qkv_proj_bias: bool = True
    out_proj_bias: bool = True
    mlp_fc1_bias: bool = True
    mlp_fc2_bias: bool = True
    tie_word_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    initializer_range: float = 0.02
    residual_in_fp32: bool = True
    fused_mlp: bool = False
    fused_dropout_add_ln: bool = True
    pretrained: Optional[str] = None
    library: str = "flash_attn"
    lora: LoraSettings = field(default_factory=LoraSettings)
    activation_checkpointing: int = 0


@dataclass
class DataSettings:
    """Where text comes from and how it becomes tokens.

    train, validation: glob patterns of text files, or JSON lines (.jsonl; .gz of either).
    hold_out: without validation patterns, every so many-th document is for validation; 0: none.
    json_field: the text's field of a JSON line.
    separator: what parts the documents of a text file; null: a file is a document.
    tokenizer: "bytes"; "bpe", trained on the training text with ``vocab_size`` entries; "folder",
        the tokenizer.json of ``tokenizer_folder``.
    end_of_text: the token after each document, of a tokenizer folder.
    cache: the folder of token files and of the trained tokenizer.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    hold_out: int = 200
    json_field: str = "text"
    separator: Optional[str] = None
    tokenizer: str = "bpe"
    tokenizer_folder: Optional[str] = None
    end_of_text: str = "<|endoftext|>"
    vocab_size: int = 50257
    cache: str = "build/training/data"
    seqlen: int = 1024
    workers: int = 0


@dataclass
class OptimizerSettings:
    """AdamW. decay_embeddings: whether weight decay holds for them as for other matrices."""

    lr: float = 6e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True


@dataclass
class SchedulerSettings:
    """The learning rate's factor over the steps; see training.schedules."""

    name: str = "cosine"
    warmup_steps: int = 0
    decay_steps: Optional[int] = None
    final_factor: float = 0.1


@dataclass
class TrainerSettings:
    """The loop. Batches are sequences; the global one is of all processes and is one step.

    max_minutes: after so long the run stores a checkpoint and ends; the next one goes on.
    ema_decay: of the moving average of the weights that evaluation uses; null: none.
    peak_tflops: of a process's device, for MFU; null: what a matrix product reaches is measured.
    resume: "auto": the newest checkpoint of the run's folder, if any; "never"; or a checkpoint's
        folder.
    """

    max_steps: int = 1000
    max_minutes: Optional[float] = None
    global_batch: int = 8
    micro_batch: int = 8
    precision: str = "fp32"
    strategy: str = "auto"
    device: str = "auto"
    clip_grad_norm: Optional[float] = 1.0
    ema_decay: Optional[float] = None
    compile: bool = False
    peak_tflops: Optional[float] = None
    log_every: int = 10
    evaluate_every: int = 0
    evaluate_batches: int = 32
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    async_checkpoints: bool = True
    resume: str = "auto"


@dataclass
class Settings:
    """A whole run. out: its folder, with the logs, config.yaml and checkpoints."""

    name: str = "run"
    out: str = "build/training/${name}"
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    callbacks: dict[str, Any] = field(default_factory=dict)


def settings_from(config: DictConfig | dict) -> Settings:
    """Return the settings of a composed config. Raises SettingError naming field and value."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Settings), config)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        message = str(error.msg or error).split("\n")[0]
        raise SettingError(f"{error.full_key or 'the configuration'}: {message}") from None
    check(settings)
    return settings


def as_dict(settings: Any) -> dict:
    """Return settings, or a section of them, as plain dictionaries."""
    return dataclasses.asdict(settings)


class _Checks:
    """Refuses values of one section."""

    def __init__(self, section: Any, prefix: str):
        self._section, self._prefix = section, prefix

    def require(self, name: str, holds, must_be: str) -> None:
        value = getattr(self._section, name)
        if value is not None and not holds(value):
            raise SettingError(f"{self._prefix}.{name} must be {must_be}, got {value!r}")

    def at_least(self, least: float, *names: str) -> None:
        for name in names:
            self.require(name, lambda value: value >= least, f"at least {least}")

    def above_zero(self, *names: str) -> None:
        for name in names:
            self.require(name, lambda value: value > 0, "above 0")

    def finite(self, *names: str) -> None:
        for name in names:
            self.require(name, math.isfinite, "finite")

    def fraction(self, *names: str) -> None:
        for name in names:
            self.require(name, lambda value: 0 <= value < 1, "at least 0 and below 1")

    def one_of(self, name: str, choices: tuple[str, ...]) -> None:
        self.require(name, lambda value: value in choices, f"one of {', '.join(choices)}")

    def folder_with(self, name: str, file: str) -> None:
        self.require(name, lambda value: (Path(value) / file).is_file(), f"a folder with {file}")


def check(settings: Settings) -> None:
    """Raise SettingError for the first value that makes no sense."""
    if not 0 <= settings.seed < 1 << 64:
        raise SettingError(f"seed must be at least 0 and below 2**64, got {settings.seed}")
    _check_model(settings.model)
    _check_data(settings.data)
    _check_optimizer(settings.optimizer)
    scheduler = _Checks(settings.scheduler, "scheduler")
    scheduler.one_of("name", SCHEDULES)
    scheduler.at_least(0, "warmup_steps", "decay_steps")
    scheduler.require("final_factor", lambda value: 0 <= value <= 1, "between 0 and 1")
    _check_trainer(settings.trainer)
    limit, model = settings.trainer.max_steps, settings.model
    scheduler.require("warmup_steps", lambda v: v <= limit, f"at most trainer.max_steps ({limit})")
    if settings.scheduler.name == "wsd":
        left = limit - settings.scheduler.warmup_steps
        scheduler.require(
            "decay_steps",
            lambda value: value <= left,
            f"at most the {left} steps of trainer.max_steps ({limit}) that scheduler.warmup_steps "
            f"({limit - left}) leaves to wsd",
        )
    if model.pretrained is None and not _has_rotary(model):
        _Checks(settings.data, "data").require(
            "seqlen",
            lambda value: value <= model.n_positions,
            f"at most model.n_positions ({model.n_positions})",
        )


def _has_rotary(model: ModelSettings) -> bool:
    return model.rotary_emb_fraction > 0


def _check_model(model: ModelSettings) -> None:
    checks = _Checks(model, "model")
    checks.at_least(1, "n_layer", "n_embd", "n_head", "n_head_kv", "n_inner")
    checks.at_least(1, "pad_vocab_size_multiple")
    checks.at_least(0, "n_positions", "activation_checkpointing")
    checks.fraction("resid_pdrop", "embd_pdrop", "attn_pdrop")
    checks.above_zero("layer_norm_epsilon", "rotary_emb_base", "initializer_range")
    checks.finite("layer_norm_epsilon", "rotary_emb_base", "initializer_range")
    checks.require("rotary_emb_fraction", lambda value: 0 <= value <= 1, "between 0 and 1")
    heads = model.n_head
    checks.require("n_embd", lambda v: v % heads == 0, f"a multiple of model.n_head ({heads})")
    checks.require("n_head_kv", lambda v: heads % v == 0, f"a divisor of model.n_head ({heads})")
    checks.one_of("library", ("flash_attn", "transformers"))
    checks.folder_with("pretrained", "config.json")
    lora = _Checks(model.lora, "model.lora")
    lora.at_least(0, "rank")
    lora.above_zero("alpha")
    lora.finite("alpha")
    lora.fraction("dropout")
    lora.require("target_modules", bool, "names of modules")


def _check_data(data: DataSettings) -> None:
    checks = _Checks(data, "data")
    checks.require("train", bool, "patterns of text files")
    checks.at_least(0, "hold_out", "workers")
    checks.require("hold_out", lambda value: value != 1, "0 or at least 2")
    checks.at_least(1, "seqlen")
    checks.require("separator", bool, "null or some text")
    checks.one_of("tokenizer", TOKENIZERS)
    checks.require("vocab_size", lambda value: 257 <= value < 1 << 31, "between 257 and 2**31")
    if data.tokenizer == "folder":
        if data.tokenizer_folder is None:
            raise SettingError("data.tokenizer_folder must be a folder, got None")
        checks.folder_with("tokenizer_folder", "tokenizer.json")


def _check_optimizer(optimizer: OptimizerSettings) -> None:
    checks = _Checks(optimizer, "optimizer")
    checks.above_zero("lr", "eps")
    checks.at_least(0, "weight_decay")
    checks.finite("lr", "eps", "weight_decay")
    checks.require(
        "betas",
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "two numbers, each at least 0 and below 1",
    )


def _check_trainer(trainer: TrainerSettings) -> None:
    checks = _Checks(trainer, "trainer")
    checks.at_least(1, "max_steps", "global_batch", "micro_batch", "log_every")
    checks.at_least(1, "evaluate_batches", "keep_checkpoints")
    checks.at_least(0, "evaluate_every", "checkpoint_every")
    checks.above_zero("max_minutes", "clip_grad_norm", "peak_tflops")
    checks.fraction("ema_decay")
    checks.one_of("precision", PRECISIONS)
    checks.one_of("strategy", STRATEGIES)
    checks.require(
        "resume",
        lambda value: value in ("auto", "never") or Path(value).is_dir(),
        "auto, never, or a checkpoint's folder",
    )
