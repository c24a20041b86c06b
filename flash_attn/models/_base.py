"""What models have in common: their configuration, and weights from state dicts and files."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from flash_attn.models._config import options_of
from flash_attn.models._pretrained import WithoutRandomNumbers, convert
from flash_attn.models._tensor_parallel import shard_state_dict_tp
from flash_attn.utils.distributed import group_rank, group_size

_HEAD, _EMBEDDING = "lm_head.weight", "transformer.embeddings.word_embeddings.weight"


def _tie(state_dict: dict) -> None:
    """Give the head's weight and the embedding, of a model where they are one, each other's."""
    for name, other in ((_HEAD, _EMBEDDING), (_EMBEDDING, _HEAD)):
        if name not in state_dict and other in state_dict:
            state_dict[name] = state_dict[other]
    head, embedding = state_dict.get(_HEAD), state_dict.get(_EMBEDDING)
    if head is None or head is embedding or head.shape != embedding.shape:
        return
    is_one = head.data_ptr() == embedding.data_ptr() and head.stride() == embedding.stride()
    if not is_one and not head.is_meta and not torch.equal(head, embedding.to(head)):
        raise RuntimeError(
            f"{_HEAD} and {_EMBEDDING} differ in the state dict, but the model has one weight for "
            "both (config.tie_word_embeddings)"
        )


def check_state_dict(model: nn.Module, state_dict: dict, strict: bool) -> None:
    """Raise RuntimeError for a state dict that does not fit a model, before anything is loaded."""
    expected = model.state_dict(keep_vars=True)
    problems = [
        f"{name} has shape {tuple(tensor.shape)}, the model's has {tuple(expected[name].shape)}"
        for name, tensor in state_dict.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if strict:
        problems += [f"{name} is missing" for name in expected if name not in state_dict]
        problems += [f"{name} is unknown" for name in state_dict if name not in expected]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "; ".join(problems[:8])
        raise RuntimeError(f"the state dict does not fit {type(model).__name__}: {listed}{more}")


class GPTPreTrainedModel(nn.Module):
    """What both models have in common: a configuration, and weights from files."""

    base_prefix = ""  # of this model's parameters in the state dict of ``GPTLMHeadModel``

    def __init__(self, config, *inputs, **kwargs):
        """Keep the configuration.

        Args:
            config: ``transformers.GPT2Config``, or an object with its attributes.

        Raises:
            ValueError: an attribute is wrong; the message names it and its value.
        """
        super().__init__()
        options_of(config, kwargs.get("process_group"))
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        model_name,
        config,
        *args,
        strict: bool = True,
        device=None,
        dtype=None,
        world_size: int = 1,
        rank: int = 0,
        **kwargs,
    ):
        """Make a model with the weights of a checkpoint.

        Args:
            model_name: folder of Hugging Face's files, safetensors or ``.bin``, sharded or not, of
                a model that is converted here; or with a state dict by our names.
            config: of the model here.
            *args, **kwargs: further arguments of the class, such as ``process_group``.
            strict: whether parameters that are missing, or unknown, are an error.
            device, dtype: of the parameters.
            world_size, rank: processes that share the model, and this one's place; by default those
                of ``process_group``.

        Raises:
            FileNotFoundError, ValueError, RuntimeError: there is no such checkpoint, it is damaged,
                of an unknown kind, or does not fit the configuration.
        """
        from flash_attn.utils.pretrained import state_dict_from_pretrained

        group = kwargs.get("process_group")
        if world_size == 1 and group_size(group) > 1:
            world_size, rank = group_size(group), group_rank(group)
        state_dict = state_dict_from_pretrained(model_name, device="cpu", dtype=dtype)
        state_dict = convert(model_name, state_dict, config)
        if world_size > 1:
            state_dict = shard_state_dict_tp(state_dict, config, world_size, rank)
        if cls.base_prefix:
            start = cls.base_prefix
            state_dict = {n[len(start) :]: x for n, x in state_dict.items() if n.startswith(start)}
        with WithoutRandomNumbers() if strict else nullcontext():
            model = cls(config, *args, device=device, dtype=dtype, **kwargs)
        model.load_state_dict(state_dict, strict=strict)
        return model

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load parameters; a state dict that does not fit leaves the model as it was.

        Args:
            state_dict: by the names at the head of this module. Where the head's weight is that of
                the embedding, one of them is enough.
            strict: whether names that are missing, or unknown, are an error.
            assign: whether the model is to have the tensors themselves.

        Returns:
            ``missing_keys`` and ``unexpected_keys``.

        Raises:
            RuntimeError: a name is missing or unknown, or a shape is another; the message has it.
        """
        state_dict = dict(state_dict)
        if getattr(self, "tie_word_embeddings", False):
            _tie(state_dict)
        check_state_dict(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
