"""Transformer blocks against plain PyTorch with the same parameters."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from plain_modules import PlainMHA, assert_as_good_as, run_module, weights_of
from small_cases import assert_all_close, randn

from flash_attn.modules.block import Block, ParallelBlock, StochasticDepth
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp

DIM, HEADS = 32, 4
HAVE_FUSED = importlib.util.find_spec("flash_attn.ops.triton.layer_norm") is not None
needs_fused = pytest.mark.skipif(not HAVE_FUSED, reason="without flash_attn.ops.triton.layer_norm")
fused_or_not = pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=needs_fused)], ids=["composed", "fused"]
)


def make(kind=Block, seed=0, dtype=torch.float32, mixer=None, **options):
    """A block of small sizes, causal attention through the kernels, fixed parameters."""
    torch.manual_seed(seed)
    mixer = {"num_heads": HEADS, "causal": True, "use_flash_attn": True, **(mixer or {})}
    mixer_cls = partial(MHA, **mixer)
    module = kind(DIM, mixer_cls, partial(Mlp, hidden_features=48), **options)
    for name, parameter in module.named_parameters():
        if "norm" in name:  # neither 1 nor 0
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return module.to(dtype)


def part(weights, prefix):
    return {n[len(prefix) + 1 :]: t for n, t in weights.items() if n.startswith(prefix + ".")}


def norm(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def mixed(weights, x):
    return PlainMHA(HEADS, HEADS, causal=True)(part(weights, "mixer"), x)


def mlp(weights, x):
    of = part(weights, "mlp")
    return F.linear(
        F.gelu(F.linear(x, of["fc1.weight"], of["fc1.bias"])), of["fc2.weight"], of["fc2.bias"]
    )


def plain_prenorm(weights, x, residual=None):
    residual = x if residual is None else x + residual
    residual = mixed(weights, norm(weights, "norm1", residual)) + residual
    return torch.stack((mlp(weights, norm(weights, "norm2", residual)), residual))


def plain_postnorm(weights, x):
    x = norm(weights, "norm1", mixed(weights, x) + x)
    return norm(weights, "norm2", mlp(weights, x) + x)


def plain_parallel(weights, x1, x2=None, residual=None):
    for branch in (x2, residual):
        x1 = x1 if branch is None else x1 + branch
    first = norm(weights, "norm1", x1)
    second = norm(weights, "norm2", x1) if "norm2.weight" in weights else first
    return torch.stack((mixed(weights, first), mlp(weights, second), x1))


def run(module, *inputs):
    """Values and gradients of a block's results, stacked."""

    class Stacked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = module

        def forward(self, *inputs):
            out = self.block(*inputs)
            return (
                torch.stack([x.to(inputs[0].dtype) for x in out]) if isinstance(out, tuple) else out
            )

    results = run_module(Stacked(), *inputs)
    return {name.replace("dblock.", "d"): x for name, x in results.items()}


def check(module, plain, *inputs):
    assert_as_good_as(run(module, *inputs), plain, dict(module.named_parameters()), list(inputs))


def tokens(count, dtype=torch.float32):
    return [randn(2, 7, DIM, seed=i, dtype=dtype) for i in range(count)]


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@fused_or_not
@both_dtypes
@pytest.mark.parametrize("with_residual", [False, True])
def test_prenorm(with_residual, dtype, fused):
    module = make(fused_dropout_add_ln=fused, dtype=dtype)
    check(module, plain_prenorm, *tokens(1 + with_residual, dtype))


@fused_or_not
@both_dtypes
@pytest.mark.parametrize("return_residual", [False, True])
def test_postnorm(return_residual, dtype, fused):
    """With and without layers that return their input."""
    options = {"prenorm": False, "return_residual": return_residual}
    module = make(fused_dropout_add_ln=fused, dtype=dtype, **options)
    module.mixer.return_residual = module.mlp.return_residual = return_residual
    check(module, plain_postnorm, *tokens(1, dtype))


@fused_or_not
@both_dtypes
@pytest.mark.parametrize("tied_norm", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parallel(count, tied_norm, dtype, fused):
    """The first block's one branch, the second one's two, and those with a residual stream."""
    module = make(ParallelBlock, fused_dropout_add_ln=fused, tied_norm=tied_norm, dtype=dtype)
    check(module, plain_parallel, *tokens(count, dtype))


@fused_or_not
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_residual_in_fp32(kind, fused):
    """The stream keeps what bf16 would round away."""
    module = make(kind, fused_dropout_add_ln=fused, residual_in_fp32=True, dtype=torch.bfloat16)
    x, residual = randn(2, 7, DIM, dtype=torch.bfloat16), 1000.0 + randn(2, 7, DIM, seed=1)
    branches = (x,) if kind is Block else (x, x)
    *outs, stream = module(*branches, residual=residual)
    assert stream.dtype == torch.float32 and all(out.dtype == torch.bfloat16 for out in outs)
    if kind is ParallelBlock:
        assert_all_close([stream], [residual + 2 * x.float()])
    else:
        assert (stream - residual).abs().max() < 10
        assert not torch.equal(stream, stream.bfloat16().float())
    assert module(x)[-1].dtype == torch.float32


@fused_or_not
def test_a_model_of_prenorm_blocks_is_one_of_sums(fused):
    """Three blocks, each of which adds the branch of the one before."""
    blocks = [make(seed=i, fused_dropout_add_ln=fused) for i in range(3)]
    x, residual, plain = randn(2, 7, DIM), None, randn(2, 7, DIM)
    for block in blocks:
        x, residual = block(x, residual)
        weights = dict(block.named_parameters())
        plain = plain + mixed(weights, norm(weights, "norm1", plain))
        plain = plain + mlp(weights, norm(weights, "norm2", plain))
    assert_all_close([x + residual], [plain])


@fused_or_not
@pytest.mark.parametrize("subset", [slice(0, 1), torch.tensor([5, 2])], ids=["slice", "index"])
def test_mixer_subset(subset, fused):
    """The tokens kept are as they would be among all."""
    module = make(fused_dropout_add_ln=fused, mixer={"cross_attn": True, "causal": False})
    x, residual = tokens(2)
    whole = module(x, residual)
    kept = module(x, residual, mixer_subset=subset)
    assert_all_close(kept, [out[:, subset] for out in whole])


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_mixer_kwargs(kind):
    """Packed sequences; the caller's dict stays as it is."""
    module = make(kind)
    x = randn(9, DIM)
    kwargs = {"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32), "max_seqlen": 5}
    given = dict(kwargs)
    outs = module(x, mixer_kwargs=kwargs)
    parts = [module(part[None]) for part in x.split((4, 5))]
    assert_all_close(outs, [torch.cat([p[0] for p in pair]) for pair in zip(*parts)])
    assert kwargs == given


def test_norms_without_parameters():
    module = make(norm_cls=partial(torch.nn.LayerNorm, elementwise_affine=False))
    ones = make()
    for norm in (ones.norm1, ones.norm2):
        norm.weight.data.fill_(1.0), norm.bias.data.zero_()
    ones.load_state_dict(module.state_dict(), strict=False)
    (x,) = tokens(1)
    assert_all_close(module(x), ones(x))


def test_without_mlp():
    torch.manual_seed(0)
    mixer = partial(MHA, num_heads=HEADS)
    for prenorm in (True, False):
        module = Block(DIM, mixer, torch.nn.Identity, prenorm=prenorm)
        assert not any("2" in name for name, _ in module.named_modules())
        (x,) = tokens(1)
        weights = dict(module.named_parameters())
        attended = PlainMHA(HEADS, HEADS)
        if prenorm:
            out, residual = module(x)
            assert residual is x
            expected = attended(part(weights, "mixer"), norm(weights, "norm1", x))
        else:
            out = module(x)
            expected = norm(weights, "norm1", attended(part(weights, "mixer"), x) + x)
        assert_all_close([out], [expected])


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_defaults(kind):
    module = kind(128)
    assert module.mixer.num_heads == 2 and module.mlp.fc1.out_features == 512
    expected = {"mixer.Wqkv.weight", "mixer.out_proj.bias", "norm1.weight", "norm2.bias"}
    assert expected < set(module.state_dict())
    assert module.mixer.Wqkv.weight.shape == (384, 128)
    assert not any("drop" in name for name in module.state_dict())


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_marks(kind):
    for sequence_parallel in (False, True):
        for shared in (False, True):
            module = make(kind, sequence_parallel=sequence_parallel, mark_shared_params=shared)
            for name, parameter in module.named_parameters():
                of_norm = name.startswith("norm")
                marks = (
                    hasattr(parameter, "_sequence_parallel"),
                    hasattr(parameter, "_shared_params"),
                )
                assert marks == (of_norm and sequence_parallel, of_norm and shared)


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_allocate_inference_cache(kind):
    cache = make(kind).allocate_inference_cache(2, 5, torch.float16)
    assert cache.shape == (2, 5, 2, HEADS, DIM // HEADS) and cache.dtype == torch.float16


# Dropout and drop path


def test_stochastic_depth():
    x = randn(4000, 2, 3, grad=True)
    module = StochasticDepth(0.25)
    torch.manual_seed(0)
    out = module(x)
    dropped = out.flatten(1).eq(0).all(1)
    assert abs(dropped.double().mean().item() - 0.25) < 0.03
    assert_all_close([out[~dropped]], [x[~dropped] / 0.75])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad[dropped].eq(0).all() and grad[~dropped].sub(1 / 0.75).abs().max() < 1e-6
    assert module.eval()(x) is x and StochasticDepth(0.0)(x) is x
    assert StochasticDepth(1.0)(x).eq(0).all()
    assert repr(module) == "StochasticDepth(p=0.25)"
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match="p must be a probability"):
            StochasticDepth(p)


@fused_or_not
@pytest.mark.parametrize("prenorm", [False, True])
def test_drop_path_drops_samples(prenorm, fused):
    """Of both branches: a sample's branches are added, scaled, or not at all."""
    paths = {"drop_path1": 0.5, "drop_path2": 0.25}
    module = make(prenorm=prenorm, fused_dropout_add_ln=fused, **paths)
    whole = make(prenorm=prenorm)
    x, residual = randn(1, 7, DIM).expand(64, -1, -1), randn(1, 7, DIM, seed=1).expand(64, -1, -1)
    weights = dict(whole.named_parameters())

    def outcome(first, second):
        scales = first / 0.5, second / 0.75
        if not prenorm:
            y = norm(weights, "norm1", mixed(weights, x[:1]) * scales[0] + x[:1])
            return norm(weights, "norm2", mlp(weights, y) * scales[1] + y)
        stream = x[:1] * scales[0] + residual[:1]
        return mixed(weights, norm(weights, "norm1", stream)) * scales[1] + stream

    torch.manual_seed(0)
    out = module(x, residual)[1] if prenorm else module(x)
    outcomes = torch.stack([outcome(a, b)[0] for a in (0, 1) for b in (0, 1)])
    distance = (out[:, None] - outcomes).abs().amax((2, 3))
    assert distance.amin(1).max() < 1e-4
    assert distance.argmin(1).bincount(minlength=4).gt(0).all()
    out = module.eval()(x, residual)[1] if prenorm else module.eval()(x)
    expected = whole(x, residual)[1] if prenorm else whole(x)
    assert_all_close([out], [expected])


@fused_or_not
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_dropout_of_branches(kind, fused):
    """In training alone; both branches of a parallel block by masks of their own."""
    module = make(kind, resid_dropout1=0.5, resid_dropout2=0.5, fused_dropout_add_ln=fused)
    x, zero = torch.ones(2, 64, DIM), torch.zeros(2, 64, DIM)
    if kind is Block:
        module.mlp, module.mixer = torch.nn.Identity(), torch.nn.Identity()
        stream = module(x, zero)[1]
        values, shares = (0.0, 2.0), (0.5, 0.5)
    else:
        stream = module(x, x, zero)[2]
        values, shares = (0.0, 2.0, 4.0), (0.25, 0.5, 0.25)
    for value, share in zip(values, shares):
        assert abs(stream.eq(value).double().mean().item() - share) < 0.05
    assert sum(stream.eq(v).sum().item() for v in values) == stream.numel()
    evaluated = module.eval()(x, zero)[1] if kind is Block else module.eval()(x, x, zero)[2]
    assert evaluated.eq(1.0 if kind is Block else 2.0).all()


@needs_fused
def test_fused_rms_norm():
    from flash_attn.ops.triton.layer_norm import RMSNorm

    def rms(weights, name, x):
        scale = x.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        return x * scale * weights[f"{name}.weight"]

    def plain(weights, x, residual):
        stream = x + residual
        stream = mixed(weights, rms(weights, "norm1", stream)) + stream
        return torch.stack((mlp(weights, rms(weights, "norm2", stream)), stream))

    check(make(norm_cls=RMSNorm, fused_dropout_add_ln=True), plain, *tokens(2))
    check(make(norm_cls=RMSNorm), plain, *tokens(2))


@fused_or_not
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_compiled_whole(kind, fused):
    module = make(kind, fused_dropout_add_ln=fused)
    inputs = tokens(2)
    expected = run(module, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in inputs]
    out = torch.stack(compiled(*inputs))
    grads = torch.autograd.grad(out, [*module.parameters(), *inputs], weights_of(out).float())
    assert_all_close([out, *grads], list(expected.values()))


# Bad input


class Scaled(torch.nn.Module):
    def __init__(self, *_):
        super().__init__()


def test_bad_options():
    with pytest.raises(ValueError, match="post_norm_cls needs prenorm=True"):
        Block(DIM, prenorm=False, post_norm_cls=torch.nn.LayerNorm)
    with pytest.raises(ValueError, match="residual_in_fp32 needs prenorm=True"):
        make(prenorm=False, residual_in_fp32=True)
    with pytest.raises(ValueError, match="p must be a probability, got 2"):
        make(drop_path1=2)


@needs_fused
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_what_is_not_fused(kind):
    with pytest.raises(
        TypeError, match=r"needs norm_cls to make torch\.nn\.LayerNorm .*, got Scaled"
    ):
        make(kind, norm_cls=Scaled, fused_dropout_add_ln=True)
    with pytest.raises(
        TypeError, match=r"needs dropout_cls to make torch\.nn\.Dropout, got Scaled"
    ):
        make(kind, dropout_cls=Scaled, fused_dropout_add_ln=True)
    if kind is ParallelBlock:
        with pytest.raises(ValueError, match="resid_dropout1 and resid_dropout2 to be the same"):
            make(kind, resid_dropout1=0.1, fused_dropout_add_ln=True)


def test_bad_calls():
    x, module = torch.zeros(2, 7, DIM), make(prenorm=False)
    with pytest.raises(ValueError, match="residual needs a block with prenorm=True"):
        module(x, x)
    with pytest.raises(ValueError, match="mixer_subset needs a block with prenorm=True"):
        module(x, mixer_subset=slice(0, 1))
    with pytest.raises(TypeError, match=r"hidden_states must be a torch\.Tensor, got list"):
        module([x])
    with pytest.raises(TypeError, match=r"residual must be a torch\.Tensor, got int"):
        make()(x, 3)
    with pytest.raises(TypeError, match=r"hidden_states2 must be a torch\.Tensor, got int"):
        make(ParallelBlock)(x, 3)
