"""Hooks, adapters, subclasses and other forwards on layers whose work an operator does, too."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from test_models_decode_step import make_model
from torch import nn
from transformers import BertConfig

from flash_attn.models.bert import BertPredictionHeadTransform
from flash_attn.models.vit import VisionTransformer
from flash_attn.modules.block import Block, ParallelBlock
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP
from flash_attn.ops.triton.layer_norm import RMSNorm


def hook(module):
    module.register_forward_hook(lambda module, args, out: 2 * out)


def forward(module):
    own = module.forward
    module.forward = lambda x: 2 * own(x)


def subclass(module):
    kind = type(module)
    module.__class__ = type(
        "Other", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)}
    )


WAYS = pytest.mark.parametrize("change", [hook, forward, subclass])


def double(module):
    """The same by the parameters."""
    for parameter in module.parameters(recurse=False):
        parameter.data.mul_(2)


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize("activation", ["gelu_approx", "sqrelu"])
@WAYS
def test_fused_mlp(change, activation, layer):
    torch.manual_seed(0)
    mlp = FusedMLP(8, 16, activation=activation, return_residual=True, checkpoint_lvl=1)
    other, x = copy.deepcopy(mlp), torch.randn(3, 8, requires_grad=True)
    change(getattr(mlp, layer))
    double(getattr(other, layer))
    out, expected = mlp(x)[0], other(x)[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert mlp(x)[1] is x
    grads = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_adapters_of_a_fused_mlp_learn():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    mlp = nn.ModuleDict({"mlp": FusedMLP(8, 16)})
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False), mlp
    )
    mlp["mlp"](torch.randn(3, 8)).square().sum().backward()
    adapters = [p for n, p in mlp.named_parameters() if "lora_" in n]
    assert len(adapters) == 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters)


def changed_and_doubled(model, name, change, norm_input):
    """Outputs of a model with a norm that is changed, and with one whose weights are double."""
    found = []
    for way in (change, double):
        other = copy.deepcopy(model)
        way(other.get_submodule(name))
        found.append(norm_input(other))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert (found[0] - norm_input(model)).abs().max() > 1e-3


@pytest.mark.parametrize("grad", [False, True])  # without, few elements go another way
@pytest.mark.parametrize("tokens", [2, 600])
@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
@WAYS
def test_norms_of_blocks(change, norm_cls, tokens, grad):
    torch.manual_seed(0)
    x = torch.randn(1, tokens, 32)
    options = {"mixer_cls": partial(MHA, num_heads=2), "norm_cls": norm_cls}
    options["fused_dropout_add_ln"] = True
    with torch.set_grad_enabled(grad):
        for block in (Block(32, **options), Block(32, prenorm=False, **options)):
            for name in ("norm1", "norm2"):
                changed_and_doubled(block, name, change, lambda block: block(x)[0])
        parallel = ParallelBlock(32, **options)
        changed_and_doubled(parallel, "norm2", change, lambda block: block(x)[1])


@WAYS
def test_last_norms(change):
    model = make_model(fused_dropout_add_ln=True, n_positions=300)
    ids = torch.randint(67, (2, 300))
    changed_and_doubled(model, "transformer.ln_f", change, lambda model: model(ids).logits)
    config = BertConfig(hidden_size=32, fused_dropout_add_ln=True)
    head, x = BertPredictionHeadTransform(config), torch.randn(600, 32)
    changed_and_doubled(head, "layer_norm", change, lambda head: head(x))
    vit = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5,
        fused_dropout_add_ln=True,
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 16, 16)
    changed_and_doubled(vit, "norm", change, lambda vit: vit.forward_features(images))


@WAYS
def test_dropouts_in_evaluation(change):
    block = Block(32, mixer_cls=partial(MHA, num_heads=2), mlp_cls=nn.Identity).eval()
    x, residual = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    for name in ("dropout1", "drop_path1"):
        other = copy.deepcopy(block)
        change(other.get_submodule(name))
        torch.testing.assert_close(other(x, residual)[1], 2 * x + residual)


@WAYS
def test_heads_and_convolutions(change):
    model = make_model(norm_head=True, tie_word_embeddings=False)
    ids = torch.randint(67, (2, 5))
    expected = 2 * model(ids).logits
    change(model.lm_head)
    torch.testing.assert_close(model(ids).logits, expected)
    mixer, x = MHA(32, 2, dwconv=True), torch.randn(2, 5, 32)
    changed_and_doubled(mixer, "dwconv_qkv", change, lambda mixer: mixer(x))
