"""The layers of a GPT, made as its configuration says."""

from __future__ import annotations

from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.layers.scaled_rotary import ScaledRotaryEmbedding
from flash_attn.models._config import GELU_APPROX, GPTOptions, options_of
from flash_attn.modules.block import Block, ParallelBlock
from flash_attn.modules.mha import MHA, HeadOptions, ParallelMHA
from flash_attn.modules.mlp import (
    FusedMLP,
    GatedMlp,
    Mlp,
    ParallelFusedMLP,
    ParallelGatedMlp,
    ParallelMLP,
)
from flash_attn.ops.activations import sqrelu_fwd
from flash_attn.ops.triton.layer_norm import RMSNorm
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense

_GELU_APPROX = partial(F.gelu, approximate="tanh")
_FUNCTIONS = {
    "gelu": F.gelu,
    **dict.fromkeys(GELU_APPROX, _GELU_APPROX),
    "relu": F.relu,
    "sqrelu": sqrelu_fwd,
    "silu": F.silu,
    "glu": F.sigmoid,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_approx": _GELU_APPROX,
    "reglu": F.relu,
}


def norm_cls(options: GPTOptions, device=None, dtype=None):
    """Return what makes a norm from its size."""
    factory = {"eps": options.layer_norm_epsilon, "device": device, "dtype": dtype}
    if not options.rms_norm:
        return partial(nn.LayerNorm, **factory)
    return partial(RMSNorm, zero_centered_weight=options.rms_norm_zero_centered, **factory)


def _qk_norm(options: GPTOptions, device, dtype):
    """Return what makes the norms of queries and keys, or None."""
    if not options.qk_norm:
        return None
    make = norm_cls(options, device, dtype)
    if options.process_group is None:
        return make

    def marked(dim: int) -> nn.Module:
        norm = make(dim)
        for parameter in norm.parameters():  # each process sees its own heads alone
            parameter._shared_params = parameter._sequence_parallel = True
        return norm

    return marked


def _rotary(options: GPTOptions, layer_idx: Optional[int], device) -> Optional[RotaryEmbedding]:
    """Return the layer's rotary embedding where MHA's own arguments cannot say it, else None."""
    if not options.turns(layer_idx):
        return None
    dim, interleaved = options.rotary_dim, options.rotary_emb_interleaved
    if options.is_sliding(layer_idx) and options.rotary_emb_local_base is not None:
        return RotaryEmbedding(dim, options.rotary_emb_local_base, interleaved, device=device)
    if options.rotary_emb_scaling is None:
        return None
    return ScaledRotaryEmbedding(
        dim, options.rotary_emb_base, interleaved, device, scaling=options.rotary_emb_scaling
    )


def create_mixer_cls(config, layer_idx=None, process_group=None, device=None, dtype=None):
    """Return what makes a layer's attention from the size of a token.

    Args:
        config: of the model.
        layer_idx: the layer; None: as if all layers were alike, and without a cache.
        process_group: over which heads are divided, or None.
        device, dtype: of the parameters.

    Raises:
        ValueError: an attribute of the configuration is wrong; the message names it and its value.
    """
    options = options_of(config, process_group)
    process_group = options.process_group
    common = {
        "num_heads": options.n_head,
        "num_heads_kv": options.n_head_kv,
        "qkv_proj_bias": options.qkv_proj_bias,
        "out_proj_bias": options.out_proj_bias,
        "dropout": options.attn_pdrop,
        "softmax_scale": options.softmax_scale(layer_idx),
        "causal": True,
        "layer_idx": layer_idx,
        "rotary_emb_dim": options.rotary_dim if options.turns(layer_idx) else 0,
        "rotary_emb_base": options.rotary_emb_base,
        "rotary_emb_scale_base": options.rotary_emb_scale_base,
        "rotary_emb_interleaved": options.rotary_emb_interleaved,
        "use_alibi": options.use_alibi,
        "window_size": options.window(layer_idx),
        "use_flash_attn": options.use_flash_attn,
        "checkpointing": options.attn_checkpointing,
        "head_options": HeadOptions(
            head_dim=options.head_dim,
            softcap=options.attn_softcap,
            sinks=options.attn_sinks,
            qk_norm=_qk_norm(options, device, dtype),
            rotary_emb=_rotary(options, layer_idx, device),
            alibi_scale=options.alibi_scale,
        ),
        "device": device,
        "dtype": dtype,
    }
    if process_group is None:
        return partial(
            MHA, dwconv=options.attn_dwconv, fused_bias_fc=options.fused_bias_fc, **common
        )
    parallel = {"process_group": process_group, "sequence_parallel": options.sequence_parallel}
    return partial(ParallelMHA, **parallel, **common)


def create_mlp_cls(config, layer_idx=None, process_group=None, device=None, dtype=None):
    """Return what makes a layer's MLP from the size of a token; the arguments and errors are those
    of ``create_mixer_cls``."""
    options = options_of(config, process_group)
    common = {
        "hidden_features": options.hidden_features,
        "bias1": options.mlp_fc1_bias,
        "bias2": options.mlp_fc2_bias,
        "device": device,
        "dtype": dtype,
    }
    parallel = {}
    if options.process_group is not None:
        parallel["process_group"] = options.process_group
        parallel["sequence_parallel"] = options.sequence_parallel
    if options.fused_dense_sqrelu_dense:
        return partial(
            FusedDenseSqreluDense, checkpoint_lvl=options.checkpoint_level(layer_idx), **common
        )
    activation = options.activation_function
    if options.fused_mlp:
        common["checkpoint_lvl"] = options.checkpoint_level(layer_idx)
        common["activation"] = activation if activation in ("relu", "sqrelu") else "gelu_approx"
        return partial(ParallelFusedMLP if parallel else FusedMLP, **common, **parallel)
    common["activation"] = _FUNCTIONS[activation]
    if not options.is_gated:
        return partial(ParallelMLP if parallel else Mlp, **common, **parallel)
    common["multiple_of"] = options.mlp_multiple_of
    return partial(ParallelGatedMlp if parallel else GatedMlp, **common, **parallel)


def create_block(config, layer_idx=None, process_group=None, device=None, dtype=None):
    """Return a layer's block; the arguments and errors are those of ``create_mixer_cls``.

    The first block's first dropout is that of the embeddings.
    """
    options = options_of(config, process_group)
    layer = {"process_group": process_group, "device": device, "dtype": dtype}
    is_parallel = options.process_group is not None
    is_first = layer_idx is None or layer_idx == 0
    common = {
        "mixer_cls": create_mixer_cls(config, layer_idx, **layer),
        "mlp_cls": create_mlp_cls(config, layer_idx, **layer),
        "norm_cls": norm_cls(options, device, dtype),
        "resid_dropout1": options.embd_pdrop
        if is_first and options.prenorm
        else options.resid_pdrop,
        "resid_dropout2": options.resid_pdrop,
        "fused_dropout_add_ln": options.fused_dropout_add_ln,
        "residual_in_fp32": options.residual_in_fp32,
        "sequence_parallel": is_parallel and options.sequence_parallel,
        "mark_shared_params": is_parallel,
    }
    if options.parallel_block:
        block = _parallel_block(options, common)
    else:
        if options.sandwich_norm:
            common["post_norm_cls"] = common["norm_cls"]
        block = Block(options.n_embd, prenorm=options.prenorm, **common)
    block.layer_idx = layer_idx
    return block


def _parallel_block(options: GPTOptions, common: dict) -> ParallelBlock:
    if options.fused_dropout_add_ln and common["resid_dropout1"] != common["resid_dropout2"]:
        raise ValueError(
            f"config.fused_dropout_add_ln with config.parallel_block needs config.embd_pdrop "
            f"({options.embd_pdrop}) and config.resid_pdrop ({options.resid_pdrop}) to be the same"
        )
    return ParallelBlock(options.n_embd, tied_norm=options.parallel_block_tied_norm, **common)


@torch.no_grad()
def init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    mup_width_scale: float = 1.0,
    rescale_prenorm_residual: bool = True,
) -> None:
    """Draw a module's own parameters, for ``nn.Module.apply``.

    Linear layers' weights are normal with deviation ``initializer_range * mup_width_scale ** 0.5``,
    biases 0, embeddings normal with deviation ``initializer_range``. With
    ``rescale_prenorm_residual`` the projections that end a branch have theirs divided by ``(2 *
    n_layer) ** 0.5``, so that the residual stream does not grow with depth (GPT-2).
    """
    std = initializer_range * mup_width_scale**0.5
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.normal_(parameter, std=std / (2 * n_layer) ** 0.5)
