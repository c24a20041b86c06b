"""A Vision Transformer's parameters by other packages' names and by ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# timm's names of what is called another way here.
_TIMM = ((r"\battn\.qkv\.", "mixer.Wqkv."), (r"\battn\.proj\.", "mixer.out_proj."))

# Hugging Face's, of versions 4 and 5.
_HF = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\blayernorm_before\.", "norm1."),
    (r"\blayernorm_after\.", "norm2."),
    (r"\battention\.(attention\.)?(query|q_proj)\.", "q."),
    (r"\battention\.(attention\.)?(key|k_proj)\.", "k."),
    (r"\battention\.(attention\.)?(value|v_proj)\.", "v."),
    (r"\battention\.(output\.dense|o_proj)\.", "mixer.out_proj."),
    (r"\bintermediate\.dense\.", "mlp.fc1."),
    (r"^(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def _renamed(state_dict: Mapping[str, Tensor], patterns) -> dict[str, Tensor]:
    def name_of(name: str) -> str:
        for pattern, name_here in patterns:
            name = re.sub(pattern, name_here, name)
        return name

    return {name_of(name): x for name, x in state_dict.items()}


def _flattened(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the weight of a convolution over patches one of a linear layer."""
    name = "patch_embed.proj.weight"
    if name in state_dict and state_dict[name].dim() == 4:
        state_dict[name] = state_dict[name].flatten(1)
    return state_dict


def from_timm(
    state_dict: Mapping[str, Tensor], embed_dim: int, cross_attention: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return a state dict by the names of ``VisionTransformer``.

    Args:
        state_dict: by timm's names, or by ours; it is not changed.
        embed_dim: size of a token.
        cross_attention: the blocks whose queries are projected apart from keys and values.
    """
    named = _flattened(_renamed(state_dict, _TIMM))
    for i in cross_attention:
        for kind in ("weight", "bias"):
            whole = named.pop(f"blocks.{i}.mixer.Wqkv.{kind}", None)
            if whole is not None:
                named[f"blocks.{i}.mixer.Wq.{kind}"] = whole[:embed_dim]
                named[f"blocks.{i}.mixer.Wkv.{kind}"] = whole[embed_dim:]
    return named


def remap_state_dict_hf_vit(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of Hugging Face's ``ViTModel`` or ``ViTForImageClassification`` to one
    that ``VisionTransformer`` loads.

    Its norms have ``eps=1e-12``: ``norm_layer=partial(nn.LayerNorm, eps=1e-12)``.

    Args:
        state_dict: by the names of transformers 4 or 5; it is not changed. Its pooler, which
            ``VisionTransformer`` does not have, is left out.

    Raises:
        RuntimeError: a layer has not all three of queries, keys and values.
    """
    named = _flattened(_renamed(state_dict, _HF))
    named = {name: x for name, x in named.items() if not name.startswith("pooler.")}
    parts: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in named if re.search(r"^blocks\.\d+\.[qkv]\.", name)]:
        block, part, kind = name.rsplit(".", 2)
        parts.setdefault(f"{block}.mixer.Wqkv.{kind}", {})[part] = named.pop(name)
    for name, part in parts.items():
        missing = [p for p in "qkv" if p not in part]
        if missing:
            raise RuntimeError(f"the state dict lacks {', '.join(missing)} of {name}")
        named[name] = torch.cat([part[p] for p in "qkv"])
    return named
