"""GPT: decoder-only language models, of GPT-2 and of what came after it.

docs/models.md has every attribute of the configuration. Parameters, of layer i:
``transformer.embeddings.{word,position}_embeddings``, ``transformer.layers.{i}.mixer.{Wqkv,
out_proj}``, ``transformer.layers.{i}.mlp.{fc1,fc2}``, ``transformer.layers.{i}.{norm1,norm2}``,
``transformer.ln_f``, ``lm_head``.
"""

from __future__ import annotations

import logging
import re
from collections import namedtuple
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn._arguments import as_int, check_optional, check_tensors
from flash_attn.models import _gpt2_names
from flash_attn.models._base import GPTPreTrainedModel
from flash_attn.models._config import GPTOptions, options_of
from flash_attn.models._decode_step import decode_step
from flash_attn.models._layers import (
    create_block,
    create_mixer_cls,
    create_mlp_cls,
    norm_cls,
)
from flash_attn.models._layers import init_weights as _init_weights
from flash_attn.models._tensor_parallel import combine_state_dicts_tp, shard_state_dict_tp
from flash_attn.modules._few import are_few
from flash_attn.modules._kv_cache import cached_lengths
from flash_attn.modules.block import _can_fuse, _fused_norm, _normed
from flash_attn.modules.embedding import GPT2Embeddings, ParallelGPT2Embeddings
from flash_attn.ops.fused_dense import ColumnParallelLinear
from flash_attn.utils.distributed import (
    all_gather_raw,
    group_size,
    sync_shared_params,
)
from flash_attn.utils.generation import GenerationMixin

__all__ = [
    "CausalLMOutput",
    "GPTLMHeadModel",
    "GPTModel",
    "GPTPreTrainedModel",
    "combine_state_dicts_tp",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "inv_remap_state_dict_hf_gpt2",
    "inv_remap_state_dict_megatron",
    "remap_state_dict_hf_gpt2",
    "remap_state_dict_megatron",
    "shard_state_dict_tp",
]

logger = logging.getLogger(__name__)

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


def remap_state_dict_hf_gpt2(state_dict, config) -> dict[str, Tensor]:
    """Convert the state dict of Hugging Face's ``GPT2LMHeadModel`` or ``GPT2Model``.

    Args:
        state_dict: by their names; it stays as it is.
        config: of the model.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    return _gpt2_names.gpt2(options_of(config)).to_ours(state_dict)


def inv_remap_state_dict_hf_gpt2(state_dict, config) -> dict[str, Tensor]:
    """Convert a state dict to that of Hugging Face's ``GPT2LMHeadModel``."""
    return _gpt2_names.gpt2(options_of(config)).to_theirs(state_dict)


_MEGATRON = "language_model."


def remap_state_dict_megatron(state_dict, config) -> dict[str, Tensor]:
    """Convert the state dict of Megatron-LM's GPT, whose names may start with ``language_model.``.

    Raises:
        RuntimeError: a name is missing or unknown, or a shape is wrong; the message has it.
    """
    named = {}
    for name, x in state_dict.items():
        name = name[len(_MEGATRON) :] if name.startswith(_MEGATRON) else name
        named[re.sub(r"^transformer\.", "encoder.", name)] = x
    return _gpt2_names.megatron(options_of(config)).to_ours(named)


def inv_remap_state_dict_megatron(state_dict, config) -> dict[str, Tensor]:
    """Convert a state dict to that of Megatron-LM's GPT, with names from ``language_model.`` on."""
    theirs = _gpt2_names.megatron(options_of(config)).to_theirs(state_dict)
    return {_MEGATRON + name: x for name, x in theirs.items()}


def _packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return int64 ``(1, total)``, each packed token's place in its sequence."""
    first = cu_seqlens[:-1].long()
    count = cu_seqlens.diff().long()
    first = first.repeat_interleave(count, output_size=total)
    return (torch.arange(total, device=cu_seqlens.device) - first)[None]


class GPTModel(GPTPreTrainedModel):
    """The model without its head."""

    base_prefix = "transformer."

    def __init__(self, config, process_group=None, device=None, dtype=None):
        """Make the model with random weights.

        Args:
            config: ``transformers.GPT2Config``, or an object with its attributes.
            process_group: over which heads, hidden features and vocabulary are divided; None: that
                of the configuration, if there is one.
            device, dtype: of the parameters.

        Raises:
            ValueError: an attribute is wrong; the message names it and its value.
        """
        super().__init__(config, process_group=process_group)
        options = options_of(config, process_group)
        self.process_group = process_group = options.process_group
        self.sequence_parallel = process_group is not None and options.sequence_parallel
        self.parallel_block, self.prenorm = options.parallel_block, options.prenorm
        self.fused_dropout_add_ln = options.fused_dropout_add_ln
        self.checkpoint_blocks = options.checkpoint_blocks
        self.embeddings_multiplier = options.mup_embeddings_multiplier
        self.embedding_scale = options.embedding_scale
        self.max_positions = max(options.n_positions, 0)
        self.position_offset = options.position_embeddings_offset
        factory = {"device": device, "dtype": dtype}
        self.embeddings = self._make_embeddings(options, factory)
        layer = {"process_group": process_group, **factory}
        self.layers = nn.ModuleList(
            create_block(config, layer_idx=i, **layer) for i in range(options.n_layer)
        )
        if self.prenorm:
            self.drop_f = nn.Dropout(options.resid_pdrop)
            self.ln_f = norm_cls(options, device, dtype)(options.n_embd)
            for parameter in self.ln_f.parameters() if process_group is not None else ():
                parameter._shared_params = True
                parameter._sequence_parallel = self.sequence_parallel
        else:
            self.drop_0 = nn.Dropout(options.embd_pdrop)
        self.apply(
            partial(
                _init_weights,
                n_layer=options.n_layer,
                initializer_range=options.initializer_range,
                mup_width_scale=options.mup_width_scale,
            )
        )
        self.tie_weights()

    def _make_embeddings(self, options: GPTOptions, factory: dict) -> nn.Module:
        positions = self.max_positions + self.position_offset
        sizes = (options.n_embd, options.padded_vocab_size, positions)
        if self.process_group is None:
            projected = options.word_embed_proj_dim
            return GPT2Embeddings(*sizes, word_embed_proj_dim=projected, **factory)
        size = group_size(self.process_group)
        if options.padded_vocab_size % size:
            raise ValueError(
                f"config.pad_vocab_size_multiple ({options.pad_vocab_size_multiple}) must make "
                f"config.vocab_size ({options.vocab_size}) a multiple of process_group's {size} "
                "processes"
            )
        parallel = {"process_group": self.process_group}
        parallel["sequence_parallel"] = self.sequence_parallel
        return ParallelGPT2Embeddings(*sizes, **parallel, **factory)

    def tie_weights(self) -> None:
        """Give every process the first one's values of parameters that all have."""
        if self.process_group is not None:
            sync_shared_params(self, process_group=self.process_group)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Optional[torch.dtype] = None, **kwargs
    ) -> dict[int, Tensor]:
        """Return a cache for ``inference_params.key_value_memory_dict``: for each layer ``(
        batch_size, max_seqlen, 2, nheads_k, headdim)``, not initialised."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def _position_ids(self, input_ids, position_ids, inference_params, cu_seqlens):
        """Return the places of tokens among the learned positions, None: 0 to seqlen - 1."""
        if self.max_positions == 0:
            return None
        seqlen = input_ids.shape[1]
        packing = getattr(inference_params, "packing", None)
        if position_ids is None and cu_seqlens is not None:
            position_ids = _packed_positions(cu_seqlens, seqlen)
        elif position_ids is None and packing is not None:
            position_ids = packing.positions[None]
        elif position_ids is None:
            length = 0
            if inference_params is not None:
                length = cached_lengths(len(input_ids), inference_params)
            if not isinstance(length, Tensor):
                if length + seqlen > self.max_positions:
                    raise ValueError(
                        f"input_ids have {seqlen} tokens after {length} in the cache, the model "
                        f"has {self.max_positions} positions (config.n_positions)"
                    )
                length = torch.full((1,), length, device=input_ids.device)
            position_ids = length[:, None].long() + torch.arange(seqlen, device=input_ids.device)
        return position_ids + self.position_offset if self.position_offset else position_ids

    def _embedded(self, input_ids: Tensor, position_ids: Optional[Tensor]) -> Tensor:
        options = {"combine_batch_seqlen_dim": True} if self.sequence_parallel else {}
        x = self.embeddings(input_ids, position_ids=position_ids, **options)
        if self.embedding_scale is not None:
            # Rounded as the models were trained with it.
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype).item()
        if self.embeddings_multiplier != 1.0:
            x = x * self.embeddings_multiplier
        return x if self.prenorm else self.drop_0(x)

    def _mixer_kwargs(self, input_ids, inference_params, cu_seqlens, max_seqlen) -> dict:
        kwargs: dict = {}
        if cu_seqlens is not None:
            kwargs.update(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        elif self.sequence_parallel:
            kwargs["seqlen"] = input_ids.shape[1]
        if inference_params is not None:
            kwargs["inference_params"] = inference_params
        return kwargs

    def _check_call(self, input_ids, position_ids, inference_params, cu_seqlens, max_seqlen):
        check_tensors(input_ids=input_ids)
        check_optional(position_ids=position_ids, cu_seqlens=cu_seqlens)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be (batch, seqlen), got {tuple(input_ids.shape)}")
        if inference_params is not None and self.sequence_parallel:
            raise ValueError(
                "inference_params needs config.sequence_parallel=False where there is a "
                "process_group, got True"
            )
        if cu_seqlens is None:
            return
        if inference_params is not None:
            raise ValueError("cu_seqlens does not go together with inference_params")
        if max_seqlen is None:
            raise ValueError("cu_seqlens needs max_seqlen")
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"input_ids must be (1, total) with cu_seqlens, got {tuple(input_ids.shape)}"
            )

    def _run_layers(self, x: Tensor, mixer_kwargs: dict):
        """Return what the layers leave to add and norm: ``(branches, residual)``."""
        again = self.checkpoint_blocks and self.training and torch.is_grad_enabled()
        branches, residual = (x,), None
        if self.parallel_block:
            branches = (x, None)
        for layer in self.layers:
            run = partial(checkpoint, layer, use_reentrant=False) if again else layer
            if self.prenorm:
                *branches, residual = run(*branches, residual, mixer_kwargs=mixer_kwargs)
            else:
                branches = (run(*branches, mixer_kwargs=mixer_kwargs),)
        return branches, residual

    def _final_norm(self, branches, residual: Optional[Tensor]) -> Tensor:
        can_fuse = self.fused_dropout_add_ln and not are_few(branches[0])
        if can_fuse and _can_fuse((self.ln_f,), (self.drop_f,)):
            x1 = branches[1] if len(branches) > 1 else None
            return _fused_norm(self.ln_f, self.drop_f, branches[0], x1=x1, residual=residual)
        x = self.drop_f(branches[0])
        for branch in branches[1:]:
            x = x if branch is None else x + self.drop_f(branch)
        return _normed(self.ln_f, x if residual is None else x + residual)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        inference_params=None,
        *,
        cu_seqlens: Optional[Tensor] = None,
        max_seqlen: Optional[int] = None,
    ) -> Tensor:
        """Run the model.

        Args:
            input_ids: int32 or int64 ``(batch, seqlen)``; packed sequences ``(1, total)``.
            position_ids: ``(batch, seqlen)`` or ``(seqlen,)``, places among the learned positions,
                without which they have no effect: rotary embedding and ALiBi count a sequence's
                tokens. None: after those in the cache, from 0 in each sequence.
            inference_params: what a generating model knows of its cache, an object with the
                attributes of ``flash_attn.utils.generation.InferenceParams``; the tokens come after
                those that the cache has.
            cu_seqlens: int32 ``(batch + 1,)``, where packed sequences start and end.
            max_seqlen: the longest of them or more; needed with ``cu_seqlens``.

        Returns:
            ``(batch, seqlen, n_embd)``; over a sequence-parallel group this process's share of
            ``(batch * seqlen, n_embd)``.

        Raises:
            ValueError: arguments do not go together, a shape is wrong, or there are more tokens
                than positions or room in the cache.
        """
        self._check_call(input_ids, position_ids, inference_params, cu_seqlens, max_seqlen)
        places = self._position_ids(input_ids, position_ids, inference_params, cu_seqlens)
        x = self._embedded(input_ids, places)
        if inference_params is not None:
            done = decode_step(self, x, inference_params)
            if done is not None:
                return done
        is_row = cu_seqlens is not None and not self.sequence_parallel
        x = x.squeeze(0) if is_row else x
        kwargs = self._mixer_kwargs(input_ids, inference_params, cu_seqlens, max_seqlen)
        branches, residual = self._run_layers(x, kwargs)
        x = self._final_norm(branches, residual) if self.prenorm else branches[0]
        return x.unsqueeze(0) if is_row else x


class _NormHead(nn.Linear):
    """A head without bias whose rows have length 1, as Baichuan 2's."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(..., out_features)`` of ``(..., in_features)``."""
        return F.linear(x, F.normalize(self.weight))


class GPTLMHeadModel(GPTPreTrainedModel, GenerationMixin):
    """The language model."""

    takes_packed_tokens = True  # of inference_params.packing

    def __init__(self, config, process_group=None, device=None, dtype=None):
        """Make the model with random weights; the arguments and errors are those of ``GPTModel``.

        With ``config.tie_word_embeddings`` the head's weight is that of the embedding.
        """
        super().__init__(config, process_group=process_group)
        options = options_of(config, process_group)
        self.process_group = process_group = options.process_group
        factory = {"device": device, "dtype": dtype}
        self.transformer = GPTModel(config, process_group=process_group, **factory)
        self.tie_word_embeddings = options.tie_word_embeddings
        self.norm_head = options.norm_head
        self.output_scale = options.mup_output_multiplier * options.mup_width_scale
        self.final_logit_softcap = options.final_logit_softcap
        self.project_out = None
        dim = options.n_embd
        if options.word_embed_proj_dim is not None:
            dim = options.word_embed_proj_dim
            self.project_out = nn.Linear(options.n_embd, dim, bias=False, **factory)
        if process_group is None:
            head = _NormHead if options.norm_head else nn.Linear
        else:
            parallel = {"sequence_parallel": options.sequence_parallel}
            head = partial(ColumnParallelLinear, process_group=process_group, **parallel)
        sizes = {"in_features": dim, "out_features": options.padded_vocab_size}
        self.lm_head = head(**sizes, bias=options.lm_head_bias, **factory)
        for module in (self.project_out, self.lm_head):
            if module is not None:
                scale = options.mup_width_scale
                _init_weights(module, options.n_layer, options.initializer_range, scale, False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight that of the embedding, if it is to be, and give every process of
        the group the first one's values of parameters that all have."""
        if self.tie_word_embeddings:
            self.lm_head.weight = self.transformer.embeddings.word_embeddings.weight
        if self.process_group is not None:
            sync_shared_params(self, process_group=self.process_group)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Optional[torch.dtype] = None, **kwargs
    ) -> dict[int, Tensor]:
        """Return ``GPTModel.allocate_inference_cache`` of the same arguments."""
        return self.transformer.allocate_inference_cache(
            batch_size, max_seqlen, dtype=dtype, **kwargs
        )

    def _last(self, x: Tensor, num_last_tokens: int, inference_params) -> Tensor:
        """Return the last tokens of each sequence, of tokens ``(batch, seqlen, n_embd)``."""
        if num_last_tokens == 0:
            return x
        if num_last_tokens < 0:
            raise ValueError(f"num_last_tokens must be at least 0, got {num_last_tokens}")
        if x.dim() != 3:
            raise ValueError(
                f"num_last_tokens ({num_last_tokens}) needs config.sequence_parallel=False where "
                "there is a process_group"
            )
        packing = getattr(inference_params, "packing", None)
        if packing is not None:
            return x[0, packing.last(num_last_tokens)]
        return x[:, -num_last_tokens:]

    def _logits(self, x: Tensor) -> Tensor:
        if self.project_out is not None:
            x = self.project_out(x)
        return self.lm_head(x)

    def _gathered(self, logits: Tensor) -> Tensor:
        """Return the logits of all processes' tokens of the vocabulary."""
        shards, _ = all_gather_raw(logits, self.process_group)
        return torch.cat(shards.chunk(group_size(self.process_group)), -1)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        inference_params=None,
        num_last_tokens: int = 0,
        *,
        cu_seqlens: Optional[Tensor] = None,
        max_seqlen: Optional[int] = None,
    ) -> CausalLMOutput:
        """Run the model.

        Args:
            input_ids, position_ids, inference_params, cu_seqlens, max_seqlen: as for ``GPTModel``.
            num_last_tokens: how many of each sequence's last tokens to return logits of; 0: all.

        Returns:
            ``logits`` ``(batch, seqlen, vocab_size)``, padded to ``pad_vocab_size_multiple``. Over
            a group, without ``inference_params``, this process's tokens of the vocabulary alone,
            for ``CrossEntropyLoss(process_group=…)``; where it is sequence-parallel ``(batch *
            seqlen, vocab_size / processes)``.

        Raises:
            ValueError: those of ``GPTModel``, or of ``num_last_tokens``.
        """
        packed = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        x = self.transformer(input_ids, position_ids, inference_params, **packed)
        x = self._last(x, as_int("num_last_tokens", num_last_tokens), inference_params)
        logits = self._logits(x)
        if self.output_scale != 1.0:
            logits = logits * self.output_scale
        if self.final_logit_softcap > 0.0:
            logits = self.final_logit_softcap * torch.tanh(logits / self.final_logit_softcap)
        if inference_params is not None and group_size(self.process_group) > 1:
            logits = self._gathered(logits)
        return CausalLMOutput(logits=logits)
