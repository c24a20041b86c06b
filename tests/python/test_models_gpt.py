"""GPTs of every configuration, against the same written by plain PyTorch operations."""

from __future__ import annotations

import copy

import pytest
import torch
from gpt_cases import CASES, GEMMA, LLAMA, config, randomized, token_ids
from plain_gpt import PlainGPT
from small_cases import int32

from flash_attn.models.gpt import GPTLMHeadModel, GPTModel
from flash_attn.modules._few import rms_norm_of_few
from flash_attn.ops.triton.layer_norm import RMSNorm
from flash_attn.utils.generation import InferenceParams

BATCH, SEQLEN = 2, 12


def model_of(case, **options):
    options = {**(CASES[case] if isinstance(case, str) else case), **options}
    return randomized(GPTLMHeadModel(config(**options)).eval())


def params(seqlen=SEQLEN, batch=BATCH, **fields):
    return InferenceParams(max_seqlen=seqlen, max_batch_size=batch, **fields)


def assert_close(actual, expected, atol=2e-5, rtol=1e-4, name=""):
    torch.testing.assert_close(
        actual, expected, atol=atol, rtol=rtol, msg=lambda text: f"{name} {text}"
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case):
    model, ids = model_of(case), token_ids(BATCH, SEQLEN)
    plain = copy.deepcopy(model).double()
    named = dict(plain.named_parameters(remove_duplicate=False))
    expected = PlainGPT(model.config, named).logits(ids)
    logits = model(ids).logits
    assert_close(logits.double(), expected)
    dlogits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    logits.backward(dlogits)
    expected.backward(dlogits.double())
    for name, parameter in model.named_parameters():
        wanted = named[name].grad
        # Sums of BATCH * SEQLEN terms of either sign, as large as the gradient's largest elements.
        atol = 1e-5 * max(1.0, wanted.abs().max().item())
        assert_close(parameter.grad.double(), wanted, atol=atol, name=name)


@pytest.mark.parametrize("case", [case for case in CASES if case != "dwconv"])
@torch.inference_mode()
def test_cache_step_by_step(case):
    """The first five tokens at once, then one after the other."""
    model, ids = model_of(case), token_ids(BATCH, SEQLEN)
    whole, cache = model(ids).logits, params()
    parts = []
    for start, end in ((0, 5), *((i, i + 1) for i in range(5, SEQLEN))):
        parts.append(model(ids[:, start:end], inference_params=cache).logits)
        cache.seqlen_offset = end
    assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("use_flash_attn", [True, False])
@pytest.mark.parametrize("case", ["gpt2", "llama", "gemma", "sinks", "alibi", "opt", "gptj"])
@torch.inference_mode()
def test_sequences_of_different_lengths_in_the_cache(case, use_flash_attn):
    model, ids = model_of(case, use_flash_attn=use_flash_attn), token_ids(BATCH, SEQLEN)
    whole, lengths = model(ids).logits, [5, 8]
    cache = params(key_value_memory_dict=model.allocate_inference_cache(BATCH, SEQLEN))
    model(ids[:, :8], inference_params=cache)  # of the first row the last three are overwritten
    cache.lengths_per_sample = int32(lengths)
    for step in range(4):
        token = torch.stack([row[n + step] for row, n in zip(ids, lengths)])[:, None]
        logits = model(token, inference_params=cache, num_last_tokens=1).logits[:, 0]
        for i, n in enumerate(lengths):
            assert_close(logits[i], whole[i, n + step])
        cache.lengths_per_sample += 1


@pytest.mark.parametrize("case", ["gpt2", "llama", "gemma", "sinks", "opt", "alibi", "gptj"])
def test_packed_sequences(case):
    model, ids = model_of(case), token_ids(1, SEQLEN)
    packed = model(ids, cu_seqlens=int32([0, 3, 3, SEQLEN]), max_seqlen=9).logits
    apart = torch.cat([model(ids[:, :3]).logits, model(ids[:, 3:]).logits], 1)
    assert_close(packed, apart)
    packed.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    apart.square().sum().backward()
    for grad, p in zip(grads, model.parameters()):
        assert_close(grad, p.grad, atol=1e-4 * max(1.0, p.grad.abs().max().item()))


WAYS = {
    "composed attention": ("gemma", {"use_flash_attn": False}),
    "composed attention, sinks": ("sinks", {"use_flash_attn": False}),
    "fused norms": ("gpt2", {"fused_dropout_add_ln": True}),
    "fused norms, postnorm": ("opt", {"fused_dropout_add_ln": True}),
    "fused RMS norms, sandwich": ("gemma", {"fused_dropout_add_ln": True}),
    "fused norms, parallel": ("parallel, two norms", {"fused_dropout_add_ln": True}),
    "fused norms, tied": ("gptj", {"fused_dropout_add_ln": True}),
    "fp32 residual": ("llama", {"residual_in_fp32": True}),
    "fp32 residual, parallel": ("gptj", {"residual_in_fp32": True}),
    "blocks again": ("gemma", {"checkpoint_blocks": True}),
    "blocks again, parallel": ("gptj", {"checkpoint_blocks": True}),
    "blocks again, postnorm": ("opt", {"checkpoint_blocks": True}),
    "attention again": ("sinks", {"attn_checkpointing": True}),
    "fused MLP": ("gpt2", {"fused_mlp": True}),
    "fused MLP, levels": ("gpt2", {"fused_mlp": True, "mlp_checkpoint_lvl": [1, 2]}),
    "squared ReLU": ("gpt2, no scale", {"fused_dense_sqrelu_dense": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_compute(way):
    """The same logits and gradients another way, in training."""
    case, options = WAYS[way]
    ids, grads = token_ids(BATCH, SEQLEN), []
    for changed in ({}, options):
        model = model_of(case, **changed).train()
        logits = model(ids).logits
        logits.square().sum().backward()
        grads.append([logits.detach(), *(p.grad for p in model.parameters())])
    for first, second in zip(*grads):
        assert_close(second, first, atol=2e-5 * max(1.0, first.abs().max().item()))


@pytest.mark.parametrize("case", ["llama", "gemma", "gptj", "opt"])
@torch.inference_mode()
def test_bf16(case):
    """As near to fp32 as the plain operations are in bf16, within a factor of two."""
    model, ids = model_of(case), token_ids(BATCH, SEQLEN)
    expected = model(ids).logits
    model = model.bfloat16()
    named = dict(model.named_parameters(remove_duplicate=False))
    plain = PlainGPT(model.config, named)
    error = (model(ids).logits.float() - expected).abs().max()
    assert error <= 2 * (plain.logits(ids).float() - expected).abs().max()


@torch.inference_mode()
def test_last_tokens():
    model, ids = model_of("llama"), token_ids(BATCH, SEQLEN)
    whole = model(ids).logits
    assert_close(model(ids, num_last_tokens=3).logits, whole[:, -3:])
    for wrong in (-1, 1.5):
        with pytest.raises((TypeError, ValueError), match="num_last_tokens must be"):
            model(ids, num_last_tokens=wrong)


@pytest.mark.parametrize("case", ["gpt2", "opt"])
@torch.inference_mode()
def test_positions(case):
    model, ids = model_of(case), token_ids(BATCH, SEQLEN)
    places = torch.arange(SEQLEN).flip(0)
    assert not torch.allclose(model(ids, position_ids=places).logits, model(ids).logits)
    assert torch.equal(model(ids, position_ids=places.flip(0)).logits, model(ids).logits)


def test_packed_call_of_the_cache():
    """What takes no cache, and what does not fit it, is refused."""
    model, ids = model_of("gpt2"), token_ids(BATCH, SEQLEN)
    cu_seqlens = int32([0, SEQLEN])
    for kwargs, sentence in (
        ({"cu_seqlens": cu_seqlens}, "cu_seqlens needs max_seqlen"),
        ({"cu_seqlens": cu_seqlens, "max_seqlen": 12}, r"must be \(1, total\) with cu_seqlens"),
        (
            {"cu_seqlens": cu_seqlens, "max_seqlen": 12, "inference_params": params()},
            "cu_seqlens does not go together with inference_params",
        ),
        ({"position_ids": torch.zeros(3, dtype=torch.long)}, r"position_ids must be \(batch"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(ids, **kwargs)
    with pytest.raises(ValueError, match=r"input_ids must be \(batch, seqlen\), got \(12,\)"):
        model(ids[0])
    with pytest.raises(TypeError, match=r"input_ids must be a torch\.Tensor, got list"):
        model(ids.tolist())


@torch.inference_mode()
def test_more_tokens_than_room():
    """Refused, not truncated."""
    model = model_of("gpt2", n_positions=8)
    with pytest.raises(ValueError, match="12 tokens after 0 in the cache, the model has 8 pos"):
        model(token_ids(BATCH, SEQLEN))
    with pytest.raises(ValueError, match="3 tokens after 6 in the cache, the model has 8"):
        model(token_ids(BATCH, 3), inference_params=params(seqlen_offset=6))
    with pytest.raises(ValueError, match="do not fit into a cache of max_seqlen 4"):
        model_of("llama")(token_ids(BATCH, 5), inference_params=params(seqlen=4))


def test_cache_of_a_layer():
    model = model_of("gemma").bfloat16()
    cache = model.allocate_inference_cache(3, 7)
    assert list(cache) == [0, 1]
    assert cache[0].shape == (3, 7, 2, 2, 16) and cache[0].dtype == torch.bfloat16
    assert model.allocate_inference_cache(3, 7, dtype=torch.float32)[1].dtype == torch.float32


@pytest.mark.parametrize("case", ["gpt2", "opt", "gptj"])
def test_dropout_of_embeddings(case):
    """In training alone; where everything else is one, the output shows what was dropped."""
    model = model_of(case, embd_pdrop=0.5, n_layer=1)
    ids = token_ids(BATCH, SEQLEN)
    assert torch.equal(model(ids).logits, model(ids).logits)
    torch.manual_seed(0)
    first = model.train()(ids).logits
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, first)
    assert not torch.equal(model(ids).logits, first)


def test_initial_weights():
    options = config(n_embd=128, n_layer=8, mup_width_scale=0.25, initializer_range=0.1)
    model = GPTLMHeadModel(options)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name or name.endswith("bias"):
            assert torch.all(parameter == (1.0 if name.endswith("weight") else 0.0)), name
            continue
        std = 0.1 if "embeddings" in name else 0.05
        if name.endswith(("out_proj.weight", "fc2.weight")):
            std /= 4.0  # (2 * n_layer) ** 0.5
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name


def test_padded_vocabulary_and_tied_head():
    model = model_of("gpt2", pad_vocab_size_multiple=64)
    assert model.lm_head.weight.shape == (128, 32)
    assert model.lm_head.weight is model.transformer.embeddings.word_embeddings.weight
    assert model(token_ids(1, 4)).logits.shape == (1, 4, 128)
    assert model_of("llama").lm_head.weight is not model.transformer.embeddings.word_embeddings


def test_names_of_parameters():
    names = set(model_of("gpt2").state_dict())
    layer = {
        f"transformer.layers.{i}.{part}.{kind}"
        for i in range(2)
        for part in ("mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
        for kind in ("weight", "bias")
    }
    assert names == {
        "transformer.embeddings.word_embeddings.weight",
        "transformer.embeddings.position_embeddings.weight",
        *layer,
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "lm_head.weight",
    }
    assert {n.split(".", 3)[3] for n in model_of("gemma").state_dict() if "layers.1." in n} == {
        *("norm1.weight", "norm2.weight", "post_norm1.weight", "post_norm2.weight"),
        *("mixer.Wqkv.weight", "mixer.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"),
        *("mixer.q_norm.weight", "mixer.k_norm.weight"),
    }


# -------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda sd: sd.pop("transformer.ln_f.bias"), r"transformer\.ln_f\.bias is missing"),
        (lambda sd: sd.update(extra=torch.zeros(1)), "extra is unknown"),
        (
            lambda sd: sd.update({"transformer.ln_f.bias": torch.zeros(3)}),
            r"transformer\.ln_f\.bias has shape \(3,\), the model's has \(32,\)",
        ),
        (
            lambda sd: sd.update({"lm_head.weight": torch.zeros(97, 32)}),
            r"lm_head\.weight and .*word_embeddings\.weight differ in the state dict",
        ),
    ],
)
def test_state_dicts_that_do_not_fit(change, sentence):
    """The model is as it was."""
    model, state_dict = model_of("gpt2"), dict(model_of("gpt2", initializer_range=1.0).state_dict())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state_dict = {name: x + 1.0 for name, x in state_dict.items()}
    state_dict.pop("lm_head.weight")
    change(state_dict)
    with pytest.raises(RuntimeError, match=sentence):
        model.load_state_dict(state_dict)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("kept", [0, 1])
def test_one_of_tied_weights_is_enough(kept):
    model = model_of("gpt2")
    names = ["lm_head.weight", "transformer.embeddings.word_embeddings.weight"]
    state_dict = {name: x + 1.0 for name, x in model.state_dict().items()}
    del state_dict[names[1 - kept]]
    model.load_state_dict(state_dict)
    assert torch.equal(model.lm_head.weight, state_dict[names[kept]])
    assert model.lm_head.weight is model.transformer.embeddings.word_embeddings.weight


def test_missing_names_and_assigned_tensors():
    model = model_of("llama")
    missing = {n: x for n, x in model.state_dict().items() if "ln_f" not in n}
    result = model.load_state_dict(missing, strict=False)
    assert result.missing_keys == ["transformer.ln_f.weight"]
    assigned = {n: x.bfloat16() for n, x in model.state_dict().items()}
    model.load_state_dict(assigned, assign=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_body_alone():
    model = model_of("gemma")
    body = GPTModel(model.config).eval()
    body.load_state_dict(model.transformer.state_dict())
    ids = token_ids(BATCH, SEQLEN)
    assert torch.equal(body(ids), model.transformer(ids))
    with pytest.raises(RuntimeError, match=r"ln_f\.weight is missing"):
        body.load_state_dict({n: x for n, x in body.state_dict().items() if "ln_f" not in n})


def test_learns():
    """A sequence by heart."""
    torch.manual_seed(0)
    model = GPTLMHeadModel(config(**{**GEMMA, **LLAMA, "final_logit_softcap": 0.0}))
    ids = token_ids(1, SEQLEN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    out = model.eval().generate(ids[:, :1], max_length=SEQLEN)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", ["fused RMS norms, sandwich", "fused norms, parallel", "fp32 residual"]
)
def test_few_tokens_are_as_many(case, dtype):
    """Without gradients torch's operators serve few elements: the same but for rounding."""
    name, options = WAYS[case]
    model, ids = model_of(name, **options).to(dtype), token_ids(BATCH, SEQLEN)
    expected = model(ids).logits.float()
    with torch.no_grad():
        few = model(ids).logits.float()
    # Of bf16, two roundings of each of some ten steps; logits are up to about 4.
    assert_close(few, expected, atol=2e-5 if dtype is torch.float32 else 0.1)
    assert few.grad_fn is None


def test_norm_in_fp32_of_few_tokens():
    """A residual stream in fp32 is normed in fp32, and so is a gain of 1 + weight."""
    norm = RMSNorm(8, zero_centered_weight=True).bfloat16()
    torch.nn.init.normal_(norm.weight, std=2**-10)
    x = torch.randn(3, 8)
    scale = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    expected = x * scale * (1 + norm.weight.float())
    assert torch.equal(rms_norm_of_few(norm, x), expected.bfloat16())
