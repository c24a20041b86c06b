"""Images cut into patches, each of them projected to a token."""

from __future__ import annotations

from typing import Callable, Optional, Union

import torch
from torch import Tensor, nn

from flash_attn._arguments import as_int, check_tensors
from flash_attn.ops.fused_dense import FusedDense

__all__ = ["PatchEmbed"]


def _pair(name: str, size) -> tuple[int, int]:
    """Return (height, width), both ``size`` where it is one int."""
    sizes = tuple(size) if isinstance(size, (tuple, list, torch.Size)) else (size, size)
    sizes = tuple(as_int(name, x) for x in sizes)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"{name} must be a positive int or two of them, got {size}")
    return sizes


class PatchEmbed(nn.Module):
    """A linear layer over the pixels of each patch: a convolution without overlap."""

    def __init__(
        self,
        img_size: Union[int, tuple[int, int]] = 224,
        patch_size: Union[int, tuple[int, int]] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Optional[Callable[[int], nn.Module]] = None,
        flatten: bool = True,
        bias: bool = True,
        fused_bias_fc: bool = False,
    ):
        """Make the module.

        ``proj.weight`` is ``(embed_dim, in_chans * patch height * patch width)``, the weight of a
        convolution with its last three dimensions made one.

        Args:
            img_size: height and width of images, or one int for both; multiples of ``patch_size``.
            patch_size: height and width of a patch, or one int for both.
            in_chans: channels of an image.
            embed_dim: size of a token.
            norm_layer: makes the norm of tokens from ``embed_dim``; None: no norm.
            flatten: whether tokens form one sequence rather than a grid.
            bias: whether the projection has a bias.
            fused_bias_fc: whether the projection is a ``flash_attn.ops.fused_dense.FusedDense``.

        Raises:
            ValueError: a size is not positive, or patches do not divide the image.
        """
        super().__init__()
        self.img_size = _pair("img_size", img_size)
        self.patch_size = _pair("patch_size", patch_size)
        if any(size % patch for size, patch in zip(self.img_size, self.patch_size)):
            raise ValueError(
                f"img_size {self.img_size} must be a multiple of patch_size {self.patch_size}"
            )
        self.grid_size = tuple(s // p for s, p in zip(self.img_size, self.patch_size))
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.in_chans = in_chans
        self.flatten = flatten
        pixels = in_chans * self.patch_size[0] * self.patch_size[1]
        self.proj = (FusedDense if fused_bias_fc else nn.Linear)(pixels, embed_dim, bias=bias)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images.

        Args:
            x: ``(batch, in_chans, height, width)``, of ``img_size``, dtype of the parameters.

        Returns:
            ``(batch, num_patches, embed_dim)``, row by row of the grid; without ``flatten``
            ``(batch, grid height, grid width, embed_dim)``.

        Raises:
            ValueError: x has another shape.
        """
        check_tensors(x=x)
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.in_chans, *self.img_size):
            expected = ", ".join(map(str, (self.in_chans, *self.img_size)))
            raise ValueError(f"x must be (batch, {expected}), got {tuple(x.shape)}")
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        patches = x.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        tokens = self.proj(patches.permute(0, 2, 4, 1, 3, 5).flatten(3))
        return self.norm(tokens.flatten(1, 2) if self.flatten else tokens)
