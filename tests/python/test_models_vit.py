"""The Vision Transformer against one of plain torch, written here, and against transformers'."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flash_attn.models.vit import (
    VisionTransformer,
    init_weights_vit_timm,
    remap_state_dict_hf_vit,
    vit_base_patch16_224,
)

DIM, HEADS, DEPTH, PATCH, CLASSES = 32, 4, 3, 4, 7
SIZES = {
    "img_size": (16, 12),
    "patch_size": PATCH,
    "embed_dim": DIM,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": CLASSES,
    "mlp_ratio": 1.5,
}
VARIANTS = {
    "token": {},
    "average": {"global_pool": "avg"},
    "all tokens": {"global_pool": ""},
    "no class token": {"global_pool": "avg", "class_token": False},
    "class token without place": {"no_embed_class": True},
    "norm before": {"pre_norm": True, "fc_norm": True},
    "no bias": {"qkv_bias": False},
    "no classifier": {"num_classes": 0},
}
variants = pytest.mark.parametrize("name", VARIANTS)
KERNELS = {
    "torch": {},
    "kernels": {"use_flash_attn": True},
    "fused": {"use_flash_attn": True, "fused_dropout_add_ln": True, "fused_bias_fc": True},
}
kernels = pytest.mark.parametrize("kernel", KERNELS)


def make(seed=0, **options):
    """Return a model none of whose parameters is 0 or 1."""
    torch.manual_seed(seed)
    model = VisionTransformer(**{**SIZES, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(batch=3):
    return torch.randn(batch, 3, 16, 12, generator=torch.Generator().manual_seed(1))


def timm_state(model):
    """A model's weights by timm's names: the patches' of a convolution, qkv in one."""
    state, out = model.state_dict(), {}
    for name, x in state.items():
        if name == "patch_embed.proj.weight":
            x = x.view(DIM, 3, PATCH, PATCH)
        name = name.replace("mixer.Wqkv.", "attn.qkv.").replace("mixer.out_proj.", "attn.proj.")
        if ".mixer.Wq." in name:
            x = torch.cat((x, state[name.replace("Wq.", "Wkv.")]))
            name = name.replace("mixer.Wq.", "attn.qkv.")
        if ".mixer.Wkv." not in name:
            out[name] = x.clone()
    return out


def reference(state, x, global_pool="token", eps=1e-6):
    """The usual order: norm, attention, addition; norm, MLP, addition; by timm's names."""

    def norm(name, x):
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    weight, bias = state["patch_embed.proj.weight"], state.get("patch_embed.proj.bias")
    x = F.conv2d(x, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
    places, token = state["pos_embed"], state.get("cls_token")
    is_placed_first = places.shape[1] == x.shape[1]
    x = x + places if is_placed_first else x
    if token is not None:
        x = torch.cat((token.expand(len(x), -1, -1), x), 1)
    x = x if is_placed_first else x + places
    x = norm("norm_pre", x) if "norm_pre.weight" in state else x
    for i in range(DEPTH):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        heads = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        x = x + linear(f"blocks.{i}.attn.proj", heads.flatten(2))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        x = x + linear(f"blocks.{i}.mlp.fc2", F.gelu(hidden))
    x = norm("norm", x)
    first = 0 if token is None else 1
    x = {"token": x[:, 0], "avg": x[:, first:].mean(1), "": x}[global_pool]
    x = norm("fc_norm", x) if "fc_norm.weight" in state else x
    return linear("head", x) if "head.weight" in state else x


@kernels
@variants
def test_logits_and_gradients(name, kernel):
    model, x = make(**VARIANTS[name], **KERNELS[kernel]), images().requires_grad_()
    state = {n: p.requires_grad_() for n, p in timm_state(model).items()}
    expected = reference(state, x, VARIANTS[name].get("global_pool", "token"))
    actual = model(x)
    # fp32's sums in another order, of values of about 1 to 10.
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(actual, expected, **close)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (dx,) = torch.autograd.grad(actual, x, grad, retain_graph=True)
    torch.testing.assert_close(
        dx, torch.autograd.grad(expected, x, grad, retain_graph=True)[0], rtol=1e-3, atol=1e-3
    )
    actual.backward(grad)
    expected.backward(grad)
    for key in ("cls_token", "pos_embed", "norm.weight"):
        if key in state:
            p = dict(model.named_parameters())[key]
            torch.testing.assert_close(p.grad, state[key].grad, rtol=1e-3, atol=1e-3)
    weight = model.patch_embed.proj.weight.grad.view(DIM, 3, PATCH, PATCH)
    torch.testing.assert_close(weight, state["patch_embed.proj.weight"].grad, rtol=1e-3, atol=1e-3)


@kernels
def test_bf16(kernel):
    """Within twice the error of the plain model in bf16 against fp32."""
    model, x = make(**KERNELS[kernel]), images(8)
    state = timm_state(model)
    with torch.no_grad():
        expected = reference(state, x)
        plain = reference({n: p.bfloat16() for n, p in state.items()}, x.bfloat16())
        actual = model.bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    bound = 2 * (plain.float() - expected).abs().max()
    assert (actual.float() - expected).abs().max() <= bound


@variants
def test_loads_weights_of_timm(name):
    source, model = make(**VARIANTS[name]), make(1, **VARIANTS[name])
    state = timm_state(source)
    held = {n: x.clone() for n, x in state.items()}
    assert not model.load_state_dict(state).missing_keys
    assert all(torch.equal(model.state_dict()[n], x) for n, x in source.state_dict().items())
    assert state.keys() == held.keys() and all(torch.equal(state[n], held[n]) for n in held)
    model.load_state_dict(source.state_dict())  # and by our own names


def test_state_dict_that_does_not_fit():
    model, state = make(), timm_state(make(1))
    before = {n: x.clone() for n, x in model.state_dict().items()}
    del state["blocks.1.norm2.bias"]
    with pytest.raises(RuntimeError, match=r"blocks\.1\.norm2\.bias is missing"):
        model.load_state_dict(state)
    assert model.load_state_dict(before).unexpected_keys == []
    bad = {**timm_state(make(1)), "head.weight": torch.zeros(3, DIM)}
    with pytest.raises(RuntimeError, match=r"head\.weight has shape \(3, 32\)"):
        model.load_state_dict(bad)
    with pytest.raises(RuntimeError, match="extra is unknown"):
        model.load_state_dict({**timm_state(make(1)), "extra": torch.zeros(1)})
    assert all(torch.equal(model.state_dict()[n], x) for n, x in before.items())
    assert model.load_state_dict(state, strict=False).missing_keys == ["blocks.1.norm2.bias"]


def test_last_block_computes_the_class_token_alone():
    model, seen = make(use_flash_attn=True), []
    model.blocks[-1].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    x = images()
    logits = model(x)
    features = model.forward_features(x)
    assert seen == [(3, 1, DIM), (3, 13, DIM)] and features.shape == (3, 13, DIM)
    torch.testing.assert_close(model.forward_head(features), logits, rtol=1e-4, atol=1e-4)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(model.head(pooled), logits, rtol=1e-4, atol=1e-4)


@kernels
def test_dropout_and_stochastic_depth(kernel):
    """Drawn in training alone, the same from a seed; a branch dropped for sure is not there."""
    options = {"drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.3}
    model = make(**options, **KERNELS[kernel]).train()
    torch.manual_seed(0)
    a, b = model(images()), model(images())
    assert not torch.equal(a, b)
    torch.manual_seed(0)
    assert torch.equal(model(images()), a)
    exact = make(**KERNELS[kernel])
    torch.testing.assert_close(model.eval()(images()), exact(images()))
    probabilities = [block.drop_path2.p for block in model.blocks]
    assert (
        probabilities == pytest.approx([0.0, 0.15, 0.3]) and model.drop_path.p == probabilities[-1]
    )
    assert [block.drop_path1.p for block in model.blocks] == pytest.approx([0.0, 0.0, 0.15])
    alone = make(drop_path_rate=1.0, **KERNELS[kernel]).train()
    x = images()
    assert torch.isfinite(alone(x)).all()
    # The last block's two branches never come through.
    for layer in (alone.blocks[-1].mlp.fc2, alone.blocks[-1].mixer.out_proj):
        torch.manual_seed(1)
        before = alone(x)
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        torch.manual_seed(1)
        assert torch.equal(alone(x), before)
    nn.init.zeros_(alone.blocks[0].mixer.out_proj.weight)
    torch.manual_seed(1)
    assert not torch.equal(alone(x), before)


@pytest.mark.parametrize("names", ["today's", "of version 4"])
@pytest.mark.parametrize("use_flash_attn", [False, True])
def test_transformers(use_flash_attn, names):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=48,
        image_size=16,
        patch_size=PATCH,
        num_labels=CLASSES,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(config).eval()
    state = theirs.state_dict()
    if names == "of version 4":
        state = {in_version_4(name): x for name, x in state.items()}
    ours = make(
        img_size=16,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        use_flash_attn=use_flash_attn,
    )
    ours.load_state_dict(remap_state_dict_hf_vit(state))
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = theirs(x).logits
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
        error = (ours.bfloat16()(x.bfloat16()).float() - expected).abs().max()
        theirs_bf16 = theirs.bfloat16()(x.bfloat16()).logits.float()
    assert error <= 2 * (theirs_bf16 - expected).abs().max()
    headless = {n: p for n, p in state.items() if not n.startswith("classifier")}
    assert "head.weight" not in remap_state_dict_hf_vit(headless)
    broken = {n: p for n, p in state.items() if "key" not in n and "k_proj" not in n}
    with pytest.raises(RuntimeError, match=r"lacks k of blocks\.0\.mixer\.Wqkv\.weight"):
        remap_state_dict_hf_vit(broken)


def in_version_4(name):
    """Names of Hugging Face's checkpoints of ViT, such as google/vit-base-patch16-224."""
    for new, old in (
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(new, old)
    return name


def test_initial_weights():
    torch.manual_seed(0)
    model = VisionTransformer(**{**SIZES, "embed_dim": 64})
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    assert float(model.cls_token.detach().abs().max()) < 1e-5
    for x in (model.pos_embed, model.blocks[0].mlp.fc1.weight):
        assert float(x.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert float(x.detach().abs().max()) < 2.0
    assert not model.blocks[0].mlp.fc1.bias.any()
    layer = nn.Linear(200, 200)
    init_weights_vit_timm(layer)
    assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    torch.manual_seed(0)
    skipped = VisionTransformer(**{**SIZES, "embed_dim": 64}, weight_init="skip")
    assert skipped.blocks[0].mlp.fc1.bias.any()


def test_base():
    model = vit_base_patch16_224(depth=1, num_classes=10)
    assert model.embed_dim == 768 and model.patch_embed.num_patches == 196
    assert model.blocks[0].mlp.fc1.weight.shape == (3072, 768)
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"global_pool": "max"}, "global_pool must be '', 'token' or 'avg', got 'max'"),
        ({"class_token": False}, "global_pool='token' needs class_token=True"),
        ({"init_values": 1e-5}, r"init_values \(LayerScale\) must be None, got 1e-05"),
        ({"weight_init": "jax"}, "weight_init must be '' or 'skip', got 'jax'"),
        ({"img_size": 15}, "must be a multiple of patch_size"),
        ({"num_heads": 5}, "must be a positive multiple of num_heads"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**SIZES, **options})


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="pretrained must be False"):
        vit_base_patch16_224(pretrained=True)
    with pytest.raises(ValueError, match="mode must be '', got 'moco'"):
        make().init_weights("moco")
    with pytest.raises(ValueError, match=r"x must be \(batch, 3, 16, 12\), got \(1, 3, 16, 16\)"):
        make()(torch.randn(1, 3, 16, 16))
