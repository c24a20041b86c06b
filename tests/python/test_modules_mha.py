"""Attention modules against plain PyTorch with the same parameters, and decoding against the whole
sequence."""

from __future__ import annotations

import pytest
import reference
import torch
from module_decoding import InferenceParams, decode, poisoned_cache
from plain_modules import PlainMHA, assert_as_good_as, run_module, weights_of
from small_cases import assert_all_close, int32, randn

from flash_attn import flash_attn_interface
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules import mha
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    HeadOptions,
    LinearResidual,
    ParallelMHA,
    SelfAttention,
    get_alibi_slopes,
)

DIM, HEADS = 32, 4
both_kinds = pytest.mark.parametrize("flash", [False, True], ids=["composed", "kernels"])


def make(seed=0, dtype=torch.float32, **options):
    """An MHA of small sizes with fixed parameters, layer 3."""
    torch.manual_seed(seed)
    return MHA(DIM, HEADS, layer_idx=3, **options).to(dtype)


def plain_of(module):
    """The PlainMHA of a module made by ``make``."""
    slopes = module.inner_attn.alibi_slopes
    rotary = getattr(module, "rotary_emb", None)
    return PlainMHA(
        module.num_heads,
        module.num_heads_kv,
        module.causal,
        module.inner_attn.window_size,
        module.inner_attn.softmax_scale,
        slopes,
        (rotary.dim, rotary.base, rotary.interleaved, rotary.scale_base) if rotary else (),
    )


# get_alibi_slopes


@pytest.mark.parametrize("nheads", [1, 2, 3, 8, 12, 20])
def test_alibi_slopes(nheads):
    """The paper's rule: a geometric sequence from 2 ** (-8 / n), interpolated from a power of 2."""
    slopes = get_alibi_slopes(nheads)
    assert len(slopes) == nheads
    power = max(p for p in (1, 2, 4, 8, 16) if p <= nheads)
    torch.testing.assert_close(slopes[:power], [2 ** (-8 / power * (i + 1)) for i in range(power)])
    of_twice = get_alibi_slopes(2 * power)
    torch.testing.assert_close(slopes[power:], of_twice[0::2][: nheads - power])


def test_alibi_slopes_need_a_head():
    with pytest.raises(ValueError, match="nheads must be positive, got 0"):
        get_alibi_slopes(0)


# Attention without weights

SCORES = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.4},
    "window": {"window_size": (2, 1)},
    "causal window": {"window_size": (3, 5), "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.2, 0.1]), "causal": True},
}


def as_reference(score):
    return {n: x for n, x in score.items() if n != "attention_dropout"}


def gradients(out, *leaves):
    return [out, *torch.autograd.grad((out * randn(*out.shape, seed=5)).sum(), leaves)]


@both_kinds
@pytest.mark.parametrize("name", SCORES)
def test_self_attention(name, flash):
    qkv = randn(2, 7, 3, 4, 8, grad=True)
    module = (FlashSelfAttention if flash else SelfAttention)(**SCORES[name])
    actual = gradients(module(qkv), qkv)
    expected, _ = reference.attention(*qkv.double().unbind(2), **as_reference(SCORES[name]))
    assert_all_close(actual, [x.float() for x in gradients(expected, qkv)])


@both_kinds
@pytest.mark.parametrize("seqlens", [(5, 9), (9, 5), (1, 6)])
@pytest.mark.parametrize("name", SCORES)
def test_cross_attention(name, seqlens, flash):
    """Queries that see no key, where there are more queries than keys, give 0 and no NaN."""
    q = randn(2, seqlens[0], 4, 8, grad=True)
    kv = randn(2, seqlens[1], 2, 2, 8, grad=True)
    module = (FlashCrossAttention if flash else CrossAttention)(**SCORES[name])
    actual = gradients(module(q, kv), q, kv)
    k, v = kv.double().unbind(2)
    expected, _ = reference.attention(q.double(), k, v, **as_reference(SCORES[name]))
    wanted = [expected, *torch.autograd.grad((expected * randn(*q.shape, seed=5)).sum(), (q, kv))]
    assert_all_close(actual, [x.float() for x in wanted])


@both_kinds
def test_causal_of_the_call(flash):
    qkv = randn(1, 6, 3, 2, 8)
    of_self = FlashSelfAttention if flash else SelfAttention
    of_cross = FlashCrossAttention if flash else CrossAttention
    for causal in (False, True):
        expected = of_self(causal=causal)(qkv)
        assert torch.equal(of_self(causal=not causal)(qkv, causal=causal), expected)
        q, kv = qkv[:, :, 0], qkv[:, :, 1:]
        assert_all_close([of_cross(causal=not causal)(q, kv, causal=causal)], [expected])


@both_kinds
def test_dropout_is_for_training(flash):
    qkv = randn(2, 16, 3, 4, 8)
    for module in (
        (FlashSelfAttention if flash else SelfAttention)(attention_dropout=0.5),
        (FlashCrossAttention if flash else CrossAttention)(attention_dropout=0.5),
    ):
        is_self = isinstance(module, (FlashSelfAttention, SelfAttention))
        tensors = (qkv,) if is_self else (qkv[:, :, 0], qkv[:, :, 1:])
        torch.manual_seed(0)
        dropped = module(*tensors)
        torch.manual_seed(0)
        assert torch.equal(module(*tensors), dropped)
        whole = module.eval()(*tensors)
        assert torch.equal(module(*tensors), whole)
        assert (dropped - whole).abs().max() > 0.1
        # Every weight is kept half the time and doubled: the mean of many stays.
        ones = [torch.ones_like(x) for x in tensors]
        assert module.train()(*ones).mean().sub(1.0).abs() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_composed_attention_in_other_dtypes(dtype):
    qkv = randn(2, 9, 3, 4, 8).to(dtype)
    out = SelfAttention(causal=True)(qkv)
    assert out.dtype == dtype
    exact, _ = reference.attention(*qkv.double().unbind(2), causal=True)
    plain, _ = reference.attention(*qkv.unbind(2), causal=True)
    reference.assert_attention_close(out, exact, plain, "out")


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_never_read(causal):
    """Keys of padding hold NaN, as do their gradients' factors."""
    lengths = torch.tensor([6, 3, 0])
    mask = torch.arange(6) < lengths[:, None]
    kv = randn(3, 6, 2, 2, 8).masked_fill(~mask[:, :, None, None, None], torch.nan).requires_grad_()
    q = randn(3, 4, 4, 8, grad=True)
    out = CrossAttention(causal=causal)(q, kv, key_padding_mask=mask)
    dq, dkv = torch.autograd.grad(out.square().sum(), (q, kv))
    assert out[2].eq(0).all() and dq[2].eq(0).all()
    assert dkv[~mask].eq(0).all() and out.isfinite().all() and dq.isfinite().all()
    for i, n in ((0, 6), (1, 3)):  # each sequence as if it were alone
        alone = q[i : i + 1].detach().requires_grad_(), kv[i : i + 1, :n].detach().requires_grad_()
        expected = FlashCrossAttention(causal=causal)(*alone)
        wanted = torch.autograd.grad(expected.square().sum(), alone)
        assert_all_close([out[i], dq[i], dkv[i, :n]], [x[0] for x in (expected, *wanted)])


def test_padding_between_tokens():
    """A mask of self-attention hides keys and leaves places as they are."""
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, False]])
    qkv = randn(2, 5, 3, 2, 8)
    bias = torch.zeros(2, 1, 1, 5).masked_fill(~mask[:, None, None], -torch.inf)
    slopes = torch.tensor([0.5, 0.3])
    module = SelfAttention(causal=True, alibi_slopes=slopes)
    out = module(qkv, key_padding_mask=mask.int())
    expected = flash_attn_interface.flash_attn_qkvpacked_func(
        qkv, causal=True, alibi_slopes=slopes, attn_bias=bias
    )
    assert_all_close([out], [expected])
    assert out[1, 0].eq(0).all()


def test_packed_sequences_without_weights():
    lengths, total = (4, 0, 6), 10
    cu_seqlens = int32([0, 4, 4, 10])
    qkv = randn(total, 3, 4, 8)
    parts = qkv.split(lengths)
    module = FlashSelfAttention(causal=True, window_size=(2, 0))
    expected = [module(part[None])[0] for part in parts if len(part)]
    assert_all_close([module(qkv, cu_seqlens=cu_seqlens, max_seqlen=6)], [torch.cat(expected)])
    module = FlashCrossAttention(causal=True)
    kv, cu_seqlens_k = randn(9, 2, 2, 8), int32([0, 6, 7, 9])
    out = module(qkv[:, 0], kv, None, cu_seqlens, 6, cu_seqlens_k, 6)
    pairs = zip(qkv[:, 0].split(lengths), kv.split((6, 1, 2)))
    expected = [module(q[None], k[None])[0] for q, k in pairs if len(q)]
    assert_all_close([out], [torch.cat(expected)])


def test_slopes_are_not_rounded():
    """A model's half() rounds its buffers; kernels take fp32 slopes, and plain ones stay exact."""
    slopes = torch.tensor(get_alibi_slopes(12))
    for flash in (False, True):
        for dtype in (torch.float16, torch.bfloat16):
            module = MHA(48, 12, use_alibi=True, use_flash_attn=flash, causal=True).to(dtype)
            assert torch.equal(module.inner_attn.alibi_slopes, slopes)
            module(randn(1, 5, 48).to(dtype))
    module = MHA(48, 12, use_alibi=True).to("meta")
    assert module.inner_attn.alibi_slopes.is_meta
    assert MHA(48, 12, use_alibi=True, device="meta").to_empty(device="cpu") is not None


# MHA

MODULES = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"causal": True, "num_heads_kv": 2},
    "one key head, window": {"num_heads_kv": 1, "window_size": (3, 1)},
    "alibi": {"causal": True, "use_alibi": True},
    "alibi, grouped, window": {"num_heads_kv": 2, "use_alibi": True, "window_size": (4, 2)},
    "rotary": {"causal": True, "rotary_emb_dim": 8},
    "rotary of a part, pairs": {"rotary_emb_dim": 6, "rotary_emb_interleaved": True},
    "rotary, grouped": {"rotary_emb_dim": 4, "num_heads_kv": 2, "rotary_emb_base": 500.0},
    "xpos": {"causal": True, "rotary_emb_dim": 8, "rotary_emb_scale_base": 64},
    "xpos, grouped": {"rotary_emb_dim": 8, "rotary_emb_scale_base": 64, "num_heads_kv": 1},
    "convolution": {"dwconv": True, "causal": True},
    "convolution, grouped": {"dwconv": True, "num_heads_kv": 2},
    "convolution, rotary": {"dwconv": True, "rotary_emb_dim": 8, "causal": True},
    "no bias": {"qkv_proj_bias": False, "out_proj_bias": False, "fused_bias_fc": True},
    "scale": {"softmax_scale": 0.5},
    "checkpointing": {"checkpointing": True, "num_heads_kv": 2, "rotary_emb_dim": 8},
}


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_mha(name, dtype, flash):
    module = make(use_flash_attn=flash, dtype=dtype, **MODULES[name])
    x = randn(2, 11, DIM, dtype=dtype)
    actual = run_module(module, x)
    assert actual["out"].dtype == dtype
    assert_as_good_as(actual, plain_of(module), dict(module.named_parameters()), [x])


def test_convolution_is_that_of_its_module():
    module, x = make(dwconv=True), randn(2, 6, DIM)
    qkv = module.Wqkv(x)
    expected = module.dwconv_qkv(qkv.transpose(1, 2))[..., :-2].transpose(1, 2)
    assert_all_close([module._project(x)], [expected])


CROSS = {
    "plain": {},
    "grouped, causal": {"num_heads_kv": 2, "causal": True},
    "alibi": {"use_alibi": True},
    "convolution": {"dwconv": True},
}


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CROSS)
def test_cross_mha(name, dtype, flash):
    module = make(use_flash_attn=flash, dtype=dtype, cross_attn=True, **CROSS[name])
    inputs = [randn(2, 6, DIM, dtype=dtype), randn(2, 9, DIM, dtype=dtype, seed=1)]
    assert_as_good_as(
        run_module(module, *inputs), plain_of(module), dict(module.named_parameters()), inputs
    )
    whole = module(inputs[0], inputs[0])
    assert torch.equal(module(inputs[0]), whole)


@both_kinds
@pytest.mark.parametrize("subset", [slice(0, 1), torch.tensor([4, 1])], ids=["slice", "index"])
@pytest.mark.parametrize("dwconv", [False, True])
def test_mixer_subset(subset, dwconv, flash):
    module = make(use_flash_attn=flash, cross_attn=True, dwconv=dwconv, return_residual=True)
    x = randn(2, 6, DIM)
    out, residual = module(x, mixer_subset=subset)
    assert residual is x
    expected = plain_of(module)(dict(module.named_parameters()), x, subset=subset)
    assert_all_close([out], [expected])
    assert_all_close([out], [module(x)[0][:, subset]])


@pytest.mark.parametrize("cross_attn", [False, True])
def test_return_residual(cross_attn):
    plain = make(cross_attn=cross_attn)
    module = make(cross_attn=cross_attn, return_residual=True)
    assert module.state_dict().keys() == plain.state_dict().keys()
    projection = module.Wkv if cross_attn else module.Wqkv
    assert isinstance(projection, LinearResidual)
    x = randn(2, 6, DIM)
    out, residual = projection(x)
    assert residual is x and torch.equal(out, torch.nn.Linear.forward(projection, x))
    out, residual = module(x)
    assert residual is x and torch.equal(out, plain(x))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "Wqkv.weight Wqkv.bias out_proj.weight out_proj.bias"),
        ({"use_alibi": True, "rotary_emb_dim": 8, "rotary_emb_scale_base": 512, "out_proj_bias":
          False}, "Wqkv.weight Wqkv.bias out_proj.weight"),
        ({"cross_attn": True, "qkv_proj_bias": False},
         "Wq.weight Wkv.weight out_proj.weight out_proj.bias"),
        ({"dwconv": True}, "Wqkv.weight Wqkv.bias dwconv_qkv.weight dwconv_qkv.bias "
         "out_proj.weight out_proj.bias"),
        ({"dwconv": True, "num_heads_kv": 2}, "Wqkv.weight Wqkv.bias dwconv_q.weight dwconv_q.bias "
         "dwconv_kv.weight dwconv_kv.bias out_proj.weight out_proj.bias"),
    ],
)  # fmt: skip
@both_kinds
def test_state_dict(options, names, flash):
    module = make(use_flash_attn=flash, **options)
    assert list(module.state_dict()) == names.split()
    if not module.cross_attn:
        features = (HEADS + 2 * module.num_heads_kv) * (DIM // HEADS)
        assert module.Wqkv.weight.shape == (features, DIM)


def test_device_and_dtype():
    module = MHA(DIM, HEADS, dwconv=True, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())


PACKED = {
    "plain": {},
    "grouped, causal": {"num_heads_kv": 2, "causal": True},
    "rotary": {"rotary_emb_dim": 8, "causal": True},
    "rotary, grouped, pairs": {
        "rotary_emb_dim": 4, "rotary_emb_interleaved": True, "num_heads_kv": 1
    },
    "xpos": {"rotary_emb_dim": 8, "rotary_emb_scale_base": 32, "causal": True},
    "alibi, window": {"use_alibi": True, "window_size": (3, 2)},
    "checkpointing": {"checkpointing": True, "num_heads_kv": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", [int, torch.tensor])
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_are_padded_ones(name, kind):
    """Values and gradients, against the composed module with a padding mask."""
    mask = torch.arange(8) < torch.tensor([5, 8, 1])[:, None]
    x = randn(3, 8, DIM)
    padded = make(**PACKED[name])
    packed = make(use_flash_attn=True, **PACKED[name])

    def by_packing(x):
        tokens, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, mask)
        out = packed(tokens, cu_seqlens=cu_seqlens, max_seqlen=kind(max_seqlen))
        return pad_input(out, indices, 3, 8)

    def by_masking(x):
        return padded(x, key_padding_mask=mask) * mask[..., None]

    results = []
    for module, function in ((packed, by_packing), (padded, by_masking)):
        leaf = x.clone().requires_grad_()
        results.append(gradients(function(leaf), leaf, *module.parameters()))
    assert_all_close(*results)


def test_packed_cross_attention():
    """Queries of a subset of tokens over all tokens, as in BERT's last layer."""
    module = make(cross_attn=True, use_flash_attn=True, num_heads_kv=2)
    x, x_kv = randn(4, DIM), randn(9, DIM, seed=1)
    cu_seqlens, cu_seqlens_k = int32([0, 3, 4]), int32([0, 5, 9])
    lengths = {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": 5}
    out = module(x, x_kv, cu_seqlens=cu_seqlens, max_seqlen=3, **lengths)
    parts = [module(a[None], b[None])[0] for a, b in zip(x.split((3, 1)), x_kv.split((5, 4)))]
    assert_all_close([out], [torch.cat(parts)])


@both_kinds
def test_checkpointing_computes_attention_again(flash):
    """With the same dropout."""
    x, calls, results = randn(2, 6, DIM, grad=True), [], []
    for checkpointing in (False, True):
        module = make(dropout=0.4, use_flash_attn=flash, checkpointing=checkpointing)
        module.inner_attn.register_forward_pre_hook(
            lambda *_, checkpointing=checkpointing: calls.append(checkpointing)
        )
        torch.manual_seed(1)
        results.append(gradients(module(x), x))
    assert calls == [False, True, True]
    assert_all_close(*results)


@pytest.mark.parametrize(
    ("name", "flash"), [("rotary, grouped", True), ("alibi", False), ("checkpointing", True)]
)
def test_compiled_whole(name, flash):
    module = make(use_flash_attn=flash, **MODULES[name])
    x = randn(2, 6, DIM)
    expected = run_module(module, x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    actual = gradients_of(compiled(leaf), leaf, module)
    assert_all_close(actual, list(expected.values()))


def gradients_of(out, x, module):
    leaves = [*module.parameters(), x]
    return [out, *torch.autograd.grad(out, leaves, weights_of(out).to(out.dtype))]


@both_kinds
def test_autocast(flash):
    """Projections give bf16; rotary embedding and attention go on with it."""
    module = make(use_flash_attn=flash, rotary_emb_dim=8, num_heads_kv=2, causal=True)
    x = randn(2, 6, DIM)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)


# With a cache

DECODING = {
    "plain": {},
    "grouped": {"num_heads_kv": 2},
    "one key head, window": {"num_heads_kv": 1, "window_size": (3, 0)},
    "window beyond": {"window_size": (2, 5)},
    "alibi": {"use_alibi": True},
    "alibi, grouped, window": {"use_alibi": True, "num_heads_kv": 2, "window_size": (4, 0)},
    "rotary": {"rotary_emb_dim": 8},
    "rotary, pairs": {"rotary_emb_dim": 8, "rotary_emb_interleaved": True, "num_heads_kv": 2},
    "rotary of a part": {"rotary_emb_dim": 6, "num_heads_kv": 1},
    "rotary of a part, pairs": {"rotary_emb_dim": 4, "rotary_emb_interleaved": True},
    "xpos": {"rotary_emb_dim": 8, "rotary_emb_scale_base": 32},
    "xpos, window": {"rotary_emb_dim": 4, "rotary_emb_scale_base": 32, "window_size": (3, 0)},
    "scale": {"softmax_scale": 0.7},
    "queries apart": {"cross_attn": True, "num_heads_kv": 2},
}


@both_kinds
@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_decoding_is_the_whole_sequence(name, mode, flash):
    """A prompt, a longer continuation and single tokens."""
    module = make(use_flash_attn=flash, causal=True, **DECODING[name]).eval()
    x = randn(2, 11, DIM)
    with mode():
        expected = plain_whole(module, x)
        assert_all_close([decode(module, x, (5, 3, 1, 1, 1))], [expected])
        assert_all_close([decode(module, x, (1,) * 11)], [expected])


def plain_whole(module, x):
    """The whole sequence by plain operations."""
    return plain_of(module)(dict(module.named_parameters()), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoding_in_half_precision(dtype):
    module = make(use_flash_attn=True, causal=True, rotary_emb_dim=8, num_heads_kv=2, dtype=dtype)
    x = randn(2, 11, DIM, dtype=dtype)
    weights = dict(module.named_parameters())
    with torch.no_grad():
        out = decode(module, x, (5, 3, 1, 1, 1))
        exact = plain_of(module)({n: p.double() for n, p in weights.items()}, x.double())
        plain = plain_of(module)(weights, x)
    reference.assert_attention_close(out, exact, plain, "out")


@both_kinds
@pytest.mark.parametrize("name", DECODING)
def test_decoding_sequences_of_different_lengths(name, flash):
    """One token, then two, each sequence behind its own prompt."""
    module = make(use_flash_attn=flash, causal=True, **DECODING[name]).eval()
    x, lengths = randn(3, 10, DIM), [7, 2, 0]
    caches = poisoned_cache(module, 3, 16)
    with torch.no_grad():
        expected = plain_whole(module, x)
        for i, length in enumerate(lengths[:2]):
            prompt = InferenceParams(16, 3, 0, i, caches)
            module(x[i : i + 1, :length], inference_params=prompt)
        params = InferenceParams(16, 3, 99, 0, caches, int32(lengths))
        for count in (1, 2):
            new = torch.stack([x[i, n : n + count] for i, n in enumerate(lengths)])
            out = module(new, inference_params=params)
            wanted = torch.stack([expected[i, n : n + count] for i, n in enumerate(lengths)])
            assert_all_close([out], [wanted])
            lengths = [n + count for n in lengths]
            params.lengths_per_sample += count


@both_kinds
@pytest.mark.parametrize("rotary", [{}, {"rotary_emb_dim": 8}], ids=["", "rotary"])
def test_cache_of_a_module_that_is_not_causal(rotary, flash):
    """All tokens of a call see each other and those before."""
    module = make(use_flash_attn=flash, num_heads_kv=2, **rotary).eval()
    x = randn(2, 9, DIM)
    with torch.no_grad():
        out = decode(module, x, (6, 3))
        assert_all_close([out[:, :6]], [plain_whole(module, x[:, :6])])
        assert_all_close([out[:, 6:]], [plain_whole(module, x)[:, 6:]])


@both_kinds
@pytest.mark.parametrize("lengths", [None, int32([9, 9, 4, 4, 9])], ids=["one", "each"])
def test_rows_of_a_cache(lengths, flash):
    """A part of the batch has its rows alone; the cache is made where there is none."""
    module = make(use_flash_attn=flash, causal=True, num_heads_kv=2, rotary_emb_dim=8).eval()
    x, params = randn(2, 6, DIM), InferenceParams(8, 5, batch_size_offset=2)
    with torch.no_grad():
        first = module(x[:, :4], inference_params=params)
        cache = params.key_value_memory_dict[3]
        assert cache.shape == (5, 8, 2, 2, 8)
        cache[:2], cache[4:], cache[:, 4:] = 7.0, 7.0, 7.0
        params.seqlen_offset, params.lengths_per_sample = 4, lengths
        second = module(x[:, 4:], inference_params=params)
    assert cache[:2].eq(7).all() and cache[4:].eq(7).all() and cache[:, 6:].eq(7).all()
    assert_all_close([torch.cat((first, second), 1)], [module(x)])


@both_kinds
@pytest.mark.parametrize("rotary", [{}, {"rotary_emb_dim": 8}], ids=["", "rotary"])
def test_no_gradient_flows_through_the_cache(rotary, flash):
    module = make(use_flash_attn=flash, causal=True, **rotary)
    x, params = randn(2, 6, DIM, grad=True), InferenceParams(8, 2)
    out = module(x, inference_params=params)
    assert not params.key_value_memory_dict[3].requires_grad
    assert_all_close([out], [module(x)])
    out.sum().backward()  # of the output projection, at least
    assert module.out_proj.weight.grad is not None


def test_update_kv_cache():
    params = InferenceParams(6, 3)
    kv = randn(2, 4, 2, 2, 8)
    out = mha._update_kv_cache(kv[:, :3], params, 0)
    assert torch.equal(out, kv[:, :3]) and params.key_value_memory_dict[0].shape == (3, 6, 2, 2, 8)
    params.seqlen_offset = 3
    out = mha._update_kv_cache(kv[:, 3:], params, 0)
    assert torch.equal(out, kv)
    assert out.data_ptr() == params.key_value_memory_dict[0].data_ptr()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_allocate_inference_cache(dtype):
    cache = make(num_heads_kv=2).allocate_inference_cache(3, 7, dtype)
    assert cache.shape == (3, 7, 2, 2, 8) and cache.dtype == (dtype or torch.float32)


# Bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"embed_dim": 30}, "embed_dim must be a positive multiple of num_heads, got 30 and 4"),
        ({"num_heads": 0}, "embed_dim must be a positive multiple of num_heads, got 32 and 0"),
        ({"num_heads_kv": 3}, "num_heads must be a positive multiple of num_heads_kv, got 4 and 3"),
        ({"rotary_emb_dim": 10}, "rotary_emb_dim must be even and at most the head dim 8, got 10"),
        ({"rotary_emb_dim": 3}, "rotary_emb_dim must be even and at most the head dim 8, got 3"),
        ({"rotary_emb_dim": 8, "cross_attn": True}, "rotary_emb_dim must be 0 with cross_attn"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MHA(**{"embed_dim": DIM, "num_heads": HEADS, **options})


X, CU, CACHE = torch.zeros(2, 5, DIM), int32([0, 4, 10]), torch.zeros(2, 9, 2, 4, 8)
FLASH, PARAMS = {"use_flash_attn": True}, {"inference_params": InferenceParams(4, 2)}


@pytest.mark.parametrize(
    ("module", "call", "sentence"),
    [
        (FLASH, {"x": X[0], "cu_seqlens": CU}, "cu_seqlens needs max_seqlen"),
        ({}, {"x": X[0], "cu_seqlens": CU, "max_seqlen": 6}, "cu_seqlens needs use_flash_attn"),
        (FLASH, {"x": X, "cu_seqlens": CU, "max_seqlen": 6},
         r"x must be \(total, 32\) with cu_seqlens, got \(2, 5, 32\)"),
        (FLASH | {"dwconv": True}, {"x": X[0], "cu_seqlens": CU, "max_seqlen": 6},
         "cu_seqlens needs a module with dwconv=False"),
        (FLASH, {"key_padding_mask": torch.ones(2, 5) > 0},
         "key_padding_mask needs use_flash_attn=False.*unpad_input"),
        ({}, {"key_padding_mask": torch.ones(2, 4) > 0}, r"key_padding_mask must be .* \(2, 5\)"),
        ({}, {"x": X[0]}, r"x must be \(batch, seqlen, 32\), got \(5, 32\)"),
        ({}, {"x": X[..., 1:]}, r"x must be \(batch, seqlen, 32\), got \(2, 5, 31\)"),
        ({}, {"x_kv": X}, "x_kv needs a module with cross_attn=True"),
        ({}, {"mixer_subset": slice(0, 1)}, "mixer_subset needs a module with cross_attn=True"),
        ({"layer_idx": None}, PARAMS, "inference_params needs a module with layer_idx"),
        ({"dwconv": True}, PARAMS, "inference_params needs a module with dwconv=False"),
        ({}, PARAMS | {"key_padding_mask": torch.ones(2, 5) > 0},
         "inference_params does not go together with key_padding_mask"),
        (FLASH, PARAMS | {"causal": True}, "inference_params does not go together with causal"),
        ({}, PARAMS, "5 tokens from inference_params.seqlen_offset 0 on do not fit into a cache of "
         "max_seqlen 4"),
        (FLASH, PARAMS, "do not fit into a cache of max_seqlen 4"),
        (FLASH, {"inference_params": InferenceParams(9, 1)}, r"has 1 rows: 2 sequences"),
        (FLASH, {"inference_params": InferenceParams(9, 2, -1)}, "seqlen_offset -1 on do not fit"),
        (FLASH, {"inference_params": InferenceParams(9, 2, 0, 0, {}, int32([1]))},
         r"lengths_per_sample must have an entry for each of 2 sequences, got \(1,\)"),
        (FLASH, {"inference_params": InferenceParams(9, 2, 0, 0, {0: CACHE[:, :, :, 1:]})},
         r"key_value_memory_dict\[0\] is \(2, 9, 2, 3, 8\)"),
        ({}, {"inference_params": InferenceParams(9, 2, 0, 0, {0: CACHE.half()})},
         r"torch.float16 on cpu, but .* torch.float32 on cpu"),
        (FLASH | {"cross_attn": True}, {"x": X[0], "cu_seqlens": CU, "max_seqlen": 6},
         "cu_seqlens needs cu_seqlens_k"),
        (FLASH | {"cross_attn": True}, {"cu_seqlens_k": CU, "max_seqlen_k": 6},
         "cu_seqlens_k needs cu_seqlens"),
    ],
)  # fmt: skip
def test_bad_calls(module, call, sentence):
    module = MHA(DIM, HEADS, **{"layer_idx": 0, **module})
    with pytest.raises(ValueError, match=sentence):
        module(**{"x": X, **call})


@both_kinds
def test_a_sequence_without_room(flash):
    module = make(use_flash_attn=flash, causal=True)
    params = InferenceParams(4, 2, lengths_per_sample=int32([1, 4]))
    with pytest.raises((RuntimeError, IndexError)):
        module(X[:, :1], inference_params=params)


@both_kinds
def test_unknown_arguments(flash):
    module = make(use_flash_attn=flash)
    with pytest.raises(TypeError, match="sinks"):
        module(X, sinks=None)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        module([1.0])


@pytest.mark.parametrize(
    ("kind", "tensors", "sentence"),
    [
        (SelfAttention, [torch.zeros(2, 5, 2, 4, 8)], r"qkv must be .*\(2, 5, 2, 4, 8\)"),
        (CrossAttention, [X, torch.zeros(2, 5, 2, 4, 8)], r"q must be .*\(2, 5, 32\)"),
        (
            CrossAttention,
            [torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 3, 8)],
            "multiple of its 3",
        ),
        (CrossAttention, [X, X], r"kv must be .*\(2, 5, 32\)"),
    ],
)
def test_bad_shapes_without_weights(kind, tensors, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind()(*tensors)


def test_bad_window_without_weights():
    with pytest.raises(TypeError, match="window_size must be two ints, got 3"):
        SelfAttention(window_size=3)(torch.zeros(1, 2, 3, 1, 8))


def test_names_that_other_packages_import():
    for name in ("flash_attn_varlen_kvpacked_func", "flash_attn_with_kvcache"):
        assert getattr(mha, name) is getattr(flash_attn_interface, name)


# ParallelMHA on one process; test_parallel_modules.py has more of them


@both_kinds
@pytest.mark.parametrize("name", ["grouped", "alibi", "rotary", "xpos, grouped"])
def test_parallel_mha_alone_is_mha(name, flash):
    options = {"use_flash_attn": flash, **MODULES[name]}
    module, alone = make(**options), ParallelMHA(DIM, HEADS, None, layer_idx=3, **options)
    alone.load_state_dict(module.state_dict())
    x = randn(2, 6, DIM)
    expected = run_module(module, x)
    assert_all_close(list(run_module(alone, x).values()), list(expected.values()))
    assert_all_close([alone(x.flatten(0, 1), seqlen=6)], [expected["out"].flatten(0, 1)])
    with torch.no_grad():
        assert_all_close([decode(alone, x, (3, 1, 2))], [decode(module, x, (3, 1, 2))])
    if flash:
        packed = {"cu_seqlens": int32([0, 2, 12]), "max_seqlen": 10}
        tokens = x.flatten(0, 1)
        assert_all_close([alone(tokens, **packed)], [module(tokens, **packed)])


@pytest.mark.parametrize(
    ("x", "call", "sentence"),
    [
        (X[0], {}, r"x must be \(batch, seqlen, embed_dim\), got \(5, 32\)"),
        (X, {"seqlen": 5}, r"x must be \(tokens, embed_dim\), got \(2, 5, 32\)"),
        (X[0], {"seqlen": 3}, r"seqlen \(3\) must divide x's 5 tokens"),
        (X[0], {"cu_seqlens": CU}, "cu_seqlens needs max_seqlen"),
    ],
)
def test_bad_calls_of_parallel_mha(x, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        ParallelMHA(DIM, HEADS, None, use_flash_attn=True)(x, **call)


@pytest.mark.parametrize(
    ("options", "head_options", "sentence"),
    [
        (
            {"cross_attn": True},
            HeadOptions(qk_norm=torch.nn.LayerNorm),
            r"head_options\.qk_norm must be None with cross_attn",
        ),
        (
            {"cross_attn": True},
            HeadOptions(rotary_emb=RotaryEmbedding(8)),
            r"head_options\.rotary_emb must be None with cross_attn",
        ),
        ({}, HeadOptions(head_dim=0), r"head_options\.head_dim must be positive, got 0"),
        ({}, HeadOptions(rotary_emb=RotaryEmbedding(16)), "at most the head dim 8, got 16"),
    ],
)
def test_head_options_that_do_not_go_together(options, head_options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MHA(32, 4, head_options=head_options, **options)


def test_sinks_and_softcap_of_cross_attention():
    """Through the kernels as by torch operations."""
    torch.manual_seed(0)
    options = {
        "cross_attn": True,
        "head_options": HeadOptions(head_dim=12, softcap=2.0, sinks=True),
    }
    modules = [MHA(32, 4, use_flash_attn=flash, **options) for flash in (True, False)]
    assert modules[0].Wq.weight.shape == (48, 32)
    with torch.no_grad():
        modules[0].sinks.normal_()
    modules[1].load_state_dict(modules[0].state_dict())
    x, x_kv = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    for module in modules:
        module.out = module(x, x_kv)
        module.out.square().sum().backward()
    torch.testing.assert_close(modules[0].out, modules[1].out, atol=1e-5, rtol=1e-4)
    for first, second in zip(*(module.parameters() for module in modules)):
        torch.testing.assert_close(first.grad, second.grad, atol=1e-4, rtol=1e-4)
