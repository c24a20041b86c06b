"""The Vision Transformer (https://arxiv.org/abs/2010.11929), by timm's names and arguments.

Neither timm nor torchvision is needed. The residual stream is fp32, and goes from block to block
beside the branch that was not added yet, so that dropout, addition and norm can be one operator.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, Optional, Union

import torch
from torch import Tensor, nn

from flash_attn._arguments import check_tensors
from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.models._base import check_state_dict
from flash_attn.models._vit_names import from_timm, remap_state_dict_hf_vit
from flash_attn.modules.block import Block, StochasticDepth, _can_fuse
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.fused_dense import FusedMLP
from flash_attn.ops.triton.layer_norm import layer_norm_fn

__all__ = [
    "VisionTransformer",
    "create_block",
    "create_mixer_cls",
    "create_mlp_cls",
    "init_weights_vit_timm",
    "remap_state_dict_hf_vit",
    "vit_base_patch16_224",
]


def create_mixer_cls(
    num_heads: int,
    qkv_bias: bool,
    attn_drop: float,
    use_flash_attn: bool,
    fused_bias_fc: bool,
    cross_attn: bool = False,
):
    """Return what makes a block's attention from the size of a token."""
    return partial(
        MHA,
        num_heads=num_heads,
        cross_attn=cross_attn,
        qkv_proj_bias=qkv_bias,
        dropout=attn_drop,
        fused_bias_fc=fused_bias_fc,
        use_flash_attn=use_flash_attn,
    )


def create_mlp_cls(embed_dim: int, mlp_ratio: float, act_layer: Callable, fused_mlp: bool):
    """Return what makes a block's MLP from the size of a token.

    Args:
        act_layer: makes the activation. ``fused_mlp`` has GELU by its tanh approximation alone.
    """
    hidden_features = int(embed_dim * mlp_ratio)
    if fused_mlp:
        return partial(FusedMLP, hidden_features=hidden_features)
    return partial(Mlp, hidden_features=hidden_features, activation=act_layer())


def create_block(
    embed_dim: int,
    num_heads: int,
    mlp_ratio: float,
    qkv_bias: bool,
    drop_rate: float,
    attn_drop_rate: float,
    drop_path1: float,
    drop_path2: float,
    norm_layer: Callable,
    act_layer: Callable,
    use_flash_attn: bool,
    fused_bias_fc: bool,
    fused_mlp: bool,
    fused_dropout_add_ln: bool,
    layer_idx: Optional[int] = None,
    n_layer: Optional[int] = None,
    last_layer_subset: bool = False,
) -> Block:
    """Make a block; the last one of ``n_layer`` can have queries of a subset of the tokens."""
    cross_attn = last_layer_subset and layer_idx is not None and layer_idx + 1 == n_layer
    return Block(
        embed_dim,
        create_mixer_cls(
            num_heads, qkv_bias, attn_drop_rate, use_flash_attn, fused_bias_fc, cross_attn
        ),
        create_mlp_cls(embed_dim, mlp_ratio, act_layer, fused_mlp),
        norm_cls=norm_layer,
        prenorm=True,
        resid_dropout1=drop_rate,
        resid_dropout2=drop_rate,
        drop_path1=drop_path1,
        drop_path2=drop_path2,
        fused_dropout_add_ln=fused_dropout_add_ln,
        residual_in_fp32=True,
    )


def _check(global_pool: str, init_values, class_token: bool, weight_init: str) -> None:
    if global_pool not in ("", "token", "avg"):
        raise ValueError(f"global_pool must be '', 'token' or 'avg', got {global_pool!r}")
    if global_pool == "token" and not class_token:
        raise ValueError("global_pool='token' needs class_token=True")
    if init_values is not None:
        raise ValueError(f"init_values (LayerScale) must be None, got {init_values!r}")
    if weight_init not in ("", "skip"):
        raise ValueError(f"weight_init must be '' or 'skip', got {weight_init!r}")


class VisionTransformer(nn.Module):
    """Patches of an image as tokens, transformer blocks, and a classifier."""

    def __init__(
        self,
        img_size: Union[int, tuple[int, int]] = 224,
        patch_size: Union[int, tuple[int, int]] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: Optional[float] = None,
        class_token: bool = True,
        no_embed_class: bool = False,
        pre_norm: bool = False,
        fc_norm: Optional[bool] = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        embed_layer: Callable = PatchEmbed,
        norm_layer: Optional[Callable] = None,
        act_layer: Optional[Callable] = None,
        use_flash_attn: bool = False,
        fused_bias_fc: bool = False,
        fused_mlp: bool = False,
        fused_dropout_add_ln: bool = False,
    ):
        """Make the model.

        Args:
            img_size, patch_size: height and width, or one int for both.
            in_chans: channels of an image.
            num_classes: of the classifier; 0: none.
            global_pool: what the classifier reads: "token", the class token; "avg", the mean of the
                patches; "", every token.
            embed_dim, depth, num_heads, mlp_ratio: size of a token, blocks, heads, and the MLP's
                hidden features over ``embed_dim``.
            qkv_bias: whether the projections to queries, keys and values have a bias.
            init_values: LayerScale, which is not there: None.
            class_token: whether a token without a patch comes first.
            no_embed_class: whether it has no position.
            pre_norm: whether a norm comes before the blocks; patches then have no bias.
            fc_norm: whether a norm comes before the classifier; None: with "avg" alone.
            drop_rate, attn_drop_rate: dropout of branches and of attention weights.
            drop_path_rate: probability to drop the last block's branches of a sample; it grows from
                0 linearly.
            weight_init: "skip": parameters stay as torch initialises them.
            embed_layer: makes the patch embedding.
            norm_layer: makes a norm from ``embed_dim``; None: LayerNorm with eps 1e-6.
            act_layer: makes the activation; None: GELU.
            use_flash_attn: whether to attend through the kernels.
            fused_bias_fc: accepted, and passed to the patch embedding.
            fused_mlp: whether an MLP is one operator.
            fused_dropout_add_ln: whether dropout, addition and norm are one operator.

        Raises:
            ValueError: an argument is none of those, or does not fit another.
        """
        super().__init__()
        _check(global_pool, init_values, class_token, weight_init)
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token)
        self.no_embed_class, self.fused_dropout_add_ln = no_embed_class, fused_dropout_add_ln
        extra = {"fused_bias_fc": fused_bias_fc} if embed_layer is PatchEmbed else {}
        self.patch_embed = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,
            **extra,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        places = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.randn(1, places, embed_dim) * 0.02)
        self.norm_pre = norm_layer(embed_dim) if pre_norm else nn.Identity()
        drop_path = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.dropout, self.drop_path = nn.Dropout(drop_rate), StochasticDepth(drop_path[-1])
        self.blocks = nn.ModuleList(
            create_block(
                *(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate),
                drop_path[i - 1] if i > 0 else 0.0,  # of the MLP before
                drop_path[i],
                *(norm_layer, act_layer or nn.GELU, use_flash_attn, fused_bias_fc, fused_mlp),
                fused_dropout_add_ln,
                layer_idx=i,
                n_layer=depth,
                last_layer_subset=global_pool == "token",
            )
            for i in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        fc_norm = global_pool == "avg" if fc_norm is None else fc_norm
        self.fc_norm = norm_layer(embed_dim) if fc_norm else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        if weight_init != "skip":
            self.init_weights(weight_init)

    def init_weights(self, mode: str = "") -> None:
        """Initialise all parameters as timm does by default.

        Raises:
            ValueError: ``mode`` is not "".
        """
        if mode != "":
            raise ValueError(f"mode must be '', got {mode!r}")
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(init_weights_vit_timm)

    def _init_weights(self, m: nn.Module) -> None:
        init_weights_vit_timm(m)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that do not decay."""
        return {"pos_embed", "cls_token"}

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions, and put the class token first: ``(batch, seqlen, embed_dim)``."""
        if self.no_embed_class:
            x = x + self.pos_embed
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        return x if self.no_embed_class else x + self.pos_embed

    def forward_features(self, x: Tensor, all_tokens: bool = True) -> Tensor:
        """Run the blocks.

        Args:
            x: ``(batch, in_chans, height, width)``.
            all_tokens: whether to return more than the class token where the classifier reads it
                alone; otherwise the last block computes it alone.

        Returns:
            ``(batch, seqlen, embed_dim)`` or ``(batch, 1, embed_dim)``, after the last norm.
        """
        x, residual = self.norm_pre(self._pos_embed(self.patch_embed(x))), None
        for block in self.blocks[:-1]:
            x, residual = block(x, residual)
        subset = None if all_tokens or self.global_pool != "token" else slice(0, 1)
        x, residual = self.blocks[-1](x, residual, mixer_subset=subset)
        return self._last_norm(x, residual)

    def _last_norm(self, x: Tensor, residual: Tensor) -> Tensor:
        parts = ((self.norm,), (self.dropout,), (self.drop_path,))
        if not self.fused_dropout_add_ln or not _can_fuse(*parts):
            x = self.drop_path(self.dropout(x)) + residual
            return self.norm(x.to(self.norm.weight.dtype))
        rowscale = None
        if self.drop_path.training and self.drop_path.p > 0.0:
            rowscale = self.drop_path(x.new_ones(x.shape[:-1]))
        return layer_norm_fn(
            x,
            self.norm.weight,
            self.norm.bias,
            residual=residual,
            eps=self.norm.eps,
            dropout_p=self.dropout.p if self.training else 0.0,
            rowscale=rowscale,
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify.

        Args:
            x: what ``forward_features`` returned.
            pre_logits: whether to return what the classifier reads.

        Returns:
            ``(batch, num_classes)``; without ``global_pool`` ``(batch, seqlen, num_classes)``.
        """
        if self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        elif self.global_pool == "token":
            x = x[:, 0]
        x = self.fc_norm(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, num_classes)`` of images ``(batch, in_chans, height, width)``."""
        check_tensors(x=x)
        return self.forward_head(self.forward_features(x, all_tokens=False))

    def load_state_dict(self, state_dict, strict: bool = True):
        """Load weights by our names or timm's, those of a convolution over patches, too.

        Raises:
            RuntimeError: a shape does not fit, or with ``strict`` a name is missing or unknown; the
                message has it, and nothing was loaded.
        """
        apart = tuple(i for i, block in enumerate(self.blocks) if block.mixer.cross_attn)
        named = from_timm(state_dict, self.embed_dim, apart)
        check_state_dict(self, named, strict)
        return super().load_state_dict(named, strict=strict)


def init_weights_vit_timm(module: nn.Module, name: str = "") -> None:
    """Initialise a layer: normal weights of a deviation of 0.02, cut off, and no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def vit_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """Make ViT-Base for images of 224 x 224 in patches of 16 x 16; kwargs are those of
    ``VisionTransformer``.

    Raises:
        ValueError: ``pretrained``: load weights by ``load_state_dict``.
    """
    if pretrained:
        raise ValueError("pretrained must be False: load weights by load_state_dict")
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return VisionTransformer(**{**sizes, **kwargs})
