"""The model of a run: made, wrapped for its loss, spread over processes."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flash_attn.losses.cross_entropy import CrossEntropyLoss, linear_cross_entropy_loss
from flash_attn.models.gpt import GPTLMHeadModel
from training.settings import ModelSettings, SettingError, as_dict
from training.tokenizer import TextTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NOT_OF_CONFIG = ("pretrained", "library", "lora", "activation_checkpointing")


class LanguageModel(nn.Module):
    """A causal language model and its loss in one forward, as DDP and FSDP want it.

    linear_loss: never make the logits of all tokens. Its gradients are made with the loss, before
        a scaler's factor: fp16 does without.
    """

    def __init__(self, model: nn.Module, linear_loss: bool = True):
        super().__init__()
        self.model = model
        self._linear_loss = linear_loss and _has_linear_head(base_model(model))
        self._loss = CrossEntropyLoss()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean cross entropy, fp32, of int64 (batch, seqlen + 1) tokens: of each but
        the first, given those before it."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        if self._linear_loss:
            base = base_model(self.model)
            hidden, head = base.transformer(inputs), base.lm_head
            return linear_cross_entropy_loss(hidden, head.weight, targets, head.bias)
        logits = self.model(inputs).logits
        return self._loss(logits.flatten(0, 1), targets.flatten())


def base_model(model: nn.Module) -> nn.Module:
    """Return the model beneath PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_linear_head(model: nn.Module) -> bool:
    """Whether this is a model of flash_attn whose logits are its head's product with the hidden
    state and nothing more."""
    if not isinstance(model, GPTLMHeadModel) or type(model.lm_head) is not nn.Linear:
        return False
    more = (model.project_out, model.norm_head, model.final_logit_softcap, model.output_scale != 1)
    return not any(more)


def make_model(settings: ModelSettings, tokenizer: TextTokenizer) -> nn.Module:
    """Return the model of the settings: with new weights, or those of a Hugging Face folder; with
    LoRA's adapters where asked for."""
    model = _pretrained(settings) if settings.pretrained else _new(settings, tokenizer)
    if settings.pretrained:
        _check_vocabulary(model, tokenizer.vocab_size, settings.pretrained)
    if settings.lora.rank:
        model = _with_lora(model, settings)
    if settings.activation_checkpointing:
        for layer in layers_of(base_model(model))[:: settings.activation_checkpointing]:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model.train()


def _new(settings: ModelSettings, tokenizer: TextTokenizer) -> nn.Module:
    from transformers import GPT2Config

    fields = {k: v for k, v in as_dict(settings).items() if k not in _NOT_OF_CONFIG}
    if fields["rotary_emb_fraction"]:
        fields["n_positions"] = 0
    if fields["n_head_kv"] is None:
        del fields["n_head_kv"]
    fields["bos_token_id"] = fields["eos_token_id"] = tokenizer.end_of_text
    config = GPT2Config(vocab_size=tokenizer.vocab_size, use_flash_attn=True, **fields)
    try:
        return GPTLMHeadModel(config)
    except (ValueError, TypeError, NotImplementedError) as error:  # its fields have our names
        raise SettingError(str(error).replace("config.", "model.")) from None


def _pretrained(settings: ModelSettings) -> nn.Module:
    if settings.library == "flash_attn":
        from flash_attn.models import from_hf

        try:
            model = from_hf(settings.pretrained, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise SettingError(
                f"model.pretrained must be a folder that flash_attn.models.from_hf reads, got "
                f"{settings.pretrained!r}: {error}; model.library=transformers takes transformers' "
                "own model"
            ) from None
        model.name_or_path = settings.pretrained  # which PEFT notes with an adapter
        return model
    from transformers import AutoModelForCausalLM

    from flash_attn import integrations

    integrations.register()
    return AutoModelForCausalLM.from_pretrained(
        settings.pretrained,
        attn_implementation="exact_attention",
        local_files_only=True,
        dtype=torch.float32,
    )


def _check_vocabulary(model: nn.Module, vocab_size: int, folder: str) -> None:
    if vocab_size > model.config.vocab_size:
        raise SettingError(
            f"model.pretrained has a vocabulary of {model.config.vocab_size} tokens, the "
            f"tokenizer {vocab_size}: got {folder!r}"
        )


def _with_lora(model: nn.Module, settings: ModelSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        base_model_name_or_path=settings.pretrained,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise SettingError(
            f"model.lora.target_modules must be names of the model's linear modules, got "
            f"{lora.target_modules}: {error}"
        ) from None


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def spread(model: LanguageModel, strategy: str, device: torch.device, precision: str) -> nn.Module:
    """Return the model over all processes: "ddp" (which one process does without) or "fsdp".

    fsdp shards parameters, gradients and optimizer state; bf16 goes over the network as such and
    is summed up in fp32.
    """
    if strategy == "fsdp":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in layers_of(base_model(model.model)):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    if dist.get_world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def unwrapped(model: nn.Module) -> LanguageModel:
    """Return the model beneath DDP's."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Let the next backward add up gradients over processes, or leave that to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = enabled


def reshard(model: nn.Module) -> None:
    """Let FSDP gather parameters anew: after a forward without a backward it keeps some, which
    then miss what changes the shards, such as averaged weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class whole_parameters:
    """All parameters on every process for a while, for calls past ``LanguageModel.forward``."""

    def __init__(self, model: nn.Module):
        self._sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]

    def __enter__(self) -> None:
        for module in self._sharded:
            module.unshard()

    def __exit__(self, *_) -> None:
        for module in self._sharded:
            module.reshard()
