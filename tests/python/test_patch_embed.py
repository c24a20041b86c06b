"""Patch embedding against a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_modules import assert_as_good_as, run_module
from small_cases import randn

from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.ops.fused_dense import FusedDense

CASES = {
    "square": ((12, 4), {}),
    "not square": (((12, 10), (3, 5)), {"in_chans": 2}),
    "grid": ((12, 4), {"flatten": False}),
    "norm, no bias": ((8, 4), {"norm_layer": torch.nn.LayerNorm, "bias": False}),
    "fused": ((8, 4), {"fused_bias_fc": True}),
}


def plain_of(module):
    """The module by a convolution with its weight."""

    def embed(weights, x):
        kernel = weights["proj.weight"].unflatten(1, (module.in_chans, *module.patch_size))
        out = F.conv2d(x, kernel, weights.get("proj.bias"), stride=module.patch_size)
        out = out.permute(0, 2, 3, 1)
        out = out.flatten(1, 2) if module.flatten else out
        if "norm.weight" not in weights:
            return out
        return F.layer_norm(out, out.shape[-1:], weights["norm.weight"], weights["norm.bias"])

    return embed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_a_convolution(name, dtype):
    sizes, options = CASES[name]
    torch.manual_seed(0)
    module = PatchEmbed(*sizes, embed_dim=24, **options).to(dtype)
    x = randn(2, module.in_chans, *module.img_size, dtype=dtype)
    assert_as_good_as(run_module(module, x), plain_of(module), dict(module.named_parameters()), [x])


def test_attributes():
    module = PatchEmbed()
    assert (module.img_size, module.patch_size) == ((224, 224), (16, 16))
    assert module.grid_size == (14, 14) and module.num_patches == 196 and module.flatten
    assert {n: tuple(p.shape) for n, p in module.state_dict().items()} == {
        "proj.weight": (768, 3 * 16 * 16),
        "proj.bias": (768,),
    }
    assert isinstance(PatchEmbed(fused_bias_fc=True).proj, FusedDense)
    assert isinstance(module.norm, torch.nn.Identity)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"img_size": 10}, r"img_size \(10, 10\) must be a multiple of patch_size \(4, 4\)"),
        ({"img_size": (8, 9)}, r"img_size \(8, 9\) must be a multiple of patch_size \(4, 4\)"),
        ({"patch_size": 0}, "patch_size must be a positive int or two of them, got 0"),
        ({"img_size": (8, 8, 8)}, "img_size must be a positive int or two of them"),
    ],
)
def test_bad_sizes(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PatchEmbed(**{"img_size": 8, "patch_size": 4, **options})


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 1, 8, 8), (3, 8, 8)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"x must be \(batch, 3, 8, 8\), got"):
        PatchEmbed(8, 4, embed_dim=8)(torch.zeros(shape))


def test_bad_kinds():
    with pytest.raises(TypeError, match="patch_size must be an int"):
        PatchEmbed(8, "4")
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        PatchEmbed(8, 4)(3)
