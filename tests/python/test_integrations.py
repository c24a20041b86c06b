"""This package under PyTorch's and transformers' own switches, against their own attention."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F

from flash_attn import integrations
from flash_attn.integrations import sdpa

VOCABULARY = 97


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share."""
    torch.set_num_threads(1)


def assert_close(actual, expected, tolerance=2e-5):
    """Equal up to ``tolerance`` of the largest expected magnitude."""
    limit = tolerance * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


# ------------------------------------------------------------------------------------------------
# torch.nn.functional.scaled_dot_product_attention

SDPA_CASES = {
    "full": {"shape": (2, 4, 4, 65, 65)},
    "cross": {"shape": (2, 4, 4, 33, 70)},
    "scale": {"shape": (1, 2, 2, 40, 40), "scale": 0.3},
    "causal": {"shape": (2, 4, 4, 65, 65), "is_causal": True},
    "causal, more keys": {"shape": (2, 4, 4, 33, 70), "is_causal": True},
    "causal, more queries": {"shape": (2, 4, 4, 70, 33), "is_causal": True},
    "gqa": {"shape": (2, 8, 2, 65, 65), "is_causal": True, "enable_gqa": True},
    "bool mask": {"shape": (2, 4, 4, 33, 70), "mask": ("bool", (2, 1, 33, 70))},
    "bool mask of two dims": {"shape": (2, 4, 4, 33, 70), "mask": ("bool", (33, 70))},
    "additive mask": {"shape": (2, 4, 4, 33, 70), "mask": ("float", (1, 4, 33, 70))},
    "key mask": {"shape": (2, 4, 4, 33, 70), "mask": ("bool", (2, 1, 1, 70))},
    "wide values": {"shape": (2, 4, 4, 33, 70), "headdim_v": 24},
}


def sdpa_inputs(shape, dtype, headdim_v=16, mask=None):
    torch.manual_seed(0)
    batch, heads, heads_k, seqlen_q, seqlen_k = shape
    q = torch.randn(batch, heads, seqlen_q, 16, dtype=dtype, requires_grad=True)
    k = torch.randn(batch, heads_k, seqlen_k, 16, dtype=dtype, requires_grad=True)
    v = torch.randn(batch, heads_k, seqlen_k, headdim_v, dtype=dtype, requires_grad=True)
    attn_mask = None
    if mask is not None:
        kind, mask_shape = mask
        attn_mask = torch.rand(mask_shape) > 0.3
        if kind == "float":
            attn_mask = torch.randn(mask_shape, dtype=dtype)
    return q, k, v, attn_mask


def run_sdpa(q, k, v, **kwargs):
    out = F.scaled_dot_product_attention(q, k, v, **kwargs)
    torch.manual_seed(1)
    return (out, *torch.autograd.grad(out, (q, k, v), torch.randn_like(out)))


@pytest.fixture
def sdpa_calls(monkeypatch):
    """Counts the calls that reach this package's forward and backward."""
    calls = []
    for name in ("_forward", "_backward"):
        function = getattr(sdpa, name)

        def counted(*args, name=name, function=function):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(sdpa, name, counted)
    return calls


@pytest.mark.parametrize("name", SDPA_CASES)
def test_sdpa_equals_pytorchs_own(name, sdpa_calls):
    case = dict(SDPA_CASES[name])
    shape, mask, headdim_v = case.pop("shape"), case.pop("mask", None), case.pop("headdim_v", 16)
    q, k, v, attn_mask = sdpa_inputs(shape, torch.float32, headdim_v, mask)
    expected = run_sdpa(q, k, v, attn_mask=attn_mask, **case)
    with sdpa.registered():
        actual = run_sdpa(q, k, v, attn_mask=attn_mask, **case)
    for a, e in zip(actual, expected):
        assert_close(a, e)
    # PyTorch itself does not offer differing head dims to its CPU kernel.
    assert sdpa_calls == ([] if headdim_v != 16 else ["_forward", "_backward"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sdpa_in_half_precision(dtype, sdpa_calls):
    q, k, v, _ = sdpa_inputs((2, 4, 4, 65, 65), dtype)
    expected = run_sdpa(*(x.detach().double().requires_grad_() for x in (q, k, v)), is_causal=True)
    with sdpa.registered():
        actual = run_sdpa(q, k, v, is_causal=True)
    assert all(a.dtype == dtype for a in actual)
    assert_close(actual[0].double(), expected[0], 2e-2)
    assert sdpa_calls == ["_forward", "_backward"]


def test_sdpa_gives_fp64_to_pytorch(sdpa_calls):
    q, k, v, _ = sdpa_inputs((2, 4, 4, 65, 65), torch.float64)
    expected = run_sdpa(q, k, v)
    with sdpa.registered():
        actual = run_sdpa(q, k, v)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    assert sdpa_calls == []


def test_sdpa_operator_with_causal_and_mask_stays_pytorchs(sdpa_calls):
    """The function refuses both at once; PyTorch's operator has its own meaning for them."""
    q, k, v, mask = sdpa_inputs((2, 4, 4, 33, 33), torch.float32, mask=("float", (1, 4, 33, 33)))
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    expected = operator(q, k, v, 0.0, True, attn_mask=mask)
    with sdpa.registered():
        actual = operator(q, k, v, 0.0, True, attn_mask=mask)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    assert sdpa_calls == []


def test_sdpa_row_that_sees_no_key_is_zero():
    q, k, v, _ = sdpa_inputs((1, 2, 2, 5, 7), torch.float32)
    attn_mask = torch.ones(5, 7, dtype=torch.bool)
    attn_mask[2] = False
    with sdpa.registered():
        out, dq, _, _ = run_sdpa(q, k, v, attn_mask=attn_mask)
    assert not out[:, :, 2].any()
    assert not dq[:, :, 2].any()


def test_sdpa_keeps_the_memory_layout_of_the_query():
    q, k, v = (torch.randn(2, 9, 4, 16).transpose(1, 2) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    with sdpa.registered():
        actual = F.scaled_dot_product_attention(q, k, v)
    assert actual.stride() == expected.stride() or actual.stride() == q.stride()
    assert_close(actual, expected)


def test_sdpa_under_torch_compile(sdpa_calls):
    q, k, v, _ = sdpa_inputs((2, 4, 4, 33, 33), torch.float32)
    expected = run_sdpa(q, k, v, is_causal=True)
    with sdpa.registered():
        actual = torch.compile(run_sdpa, backend="aot_eager")(q, k, v, is_causal=True)
    for a, e in zip(actual, expected):
        assert_close(a, e)
    assert set(sdpa_calls) == {"_forward", "_backward"}


def test_sdpa_register_and_unregister(sdpa_calls):
    q = torch.randn(1, 2, 5, 16)
    sdpa.register()
    sdpa.register()
    assert sdpa.is_registered()
    F.scaled_dot_product_attention(q, q, q)
    assert sdpa_calls == ["_forward"]
    sdpa.unregister()
    sdpa.unregister()
    assert not sdpa.is_registered()
    F.scaled_dot_product_attention(q, q, q)
    assert sdpa_calls == ["_forward"]


def test_sdpa_context_leaves_an_earlier_registration():
    sdpa.register()
    try:
        with sdpa.registered():
            pass
        assert sdpa.is_registered()
    finally:
        sdpa.unregister()


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"),
    reason="this PyTorch has no registry of attention implementations",
)
def test_sdpa_by_pytorchs_registry(sdpa_calls):
    q = torch.randn(1, 2, 5, 16)
    torch.nn.attention.activate_flash_attention_impl("flash_attn")
    try:
        F.scaled_dot_product_attention(q, q, q)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert sdpa_calls == ["_forward"]
    assert not sdpa.is_registered()


# ------------------------------------------------------------------------------------------------
# Hugging Face transformers


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", minversion="5.0")
    integrations.register()
    return module


def tiny_config(transformers, kind="Llama", **overrides):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    sizes.update(overrides)
    return getattr(transformers, f"{kind}Config")(**sizes)


def model_pair(transformers, kind="Llama", suffix="ForCausalLM", **overrides):
    """The same random model twice: with eager attention and with this package."""
    models = []
    for implementation in ("eager", "exact_attention"):
        torch.manual_seed(0)
        config = tiny_config(transformers, kind, **overrides)
        config._attn_implementation = implementation
        models.append(getattr(transformers, kind + suffix)(config).eval())
    return models


def random_tokens(batch, seqlen):
    torch.manual_seed(2)
    return torch.randint(1, VOCABULARY, (batch, seqlen))


def logits_and_gradients(model, valid, **inputs):
    """Logits, and the parameters' gradients of a loss over the valid tokens."""
    model.zero_grad()
    logits = model(use_cache=False, **inputs).logits
    torch.manual_seed(3)
    (logits * torch.randn_like(logits) * valid[..., None]).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits[valid], gradients


def assert_same_model(pair, valid, **inputs):
    expected, expected_gradients = logits_and_gradients(pair[0], valid, **inputs)
    actual, gradients = logits_and_gradients(pair[1], valid, **inputs)
    assert_close(actual, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=0, atol=1e-4 * scale + 1e-9, msg=name
        )


def padding_mask(lengths, seqlen, side):
    positions = torch.arange(seqlen)
    lengths = torch.tensor(lengths)[:, None]
    return (positions < lengths if side == "right" else positions >= seqlen - lengths).long()


@pytest.fixture
def attention_calls(monkeypatch):
    """Names of this package's functions that a model called."""
    from flash_attn.integrations import huggingface

    calls = set()
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        function = getattr(huggingface, name)

        def counted(*args, name=name, function=function, **kwargs):
            calls.add(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(huggingface, name, counted)
    return calls


def test_llama_without_padding(transformers, attention_calls):
    tokens = random_tokens(3, 37)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    assert_same_model(model_pair(transformers), valid, input_ids=tokens)
    assert attention_calls == {"flash_attn_func"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 7])
def test_padded_batch(transformers, attention_calls, side, window):
    kind = "Llama" if window is None else "Mistral"
    overrides = {} if window is None else {"sliding_window": window}
    tokens = random_tokens(3, 37)
    mask = padding_mask([37, 20, 1], 37, side)
    pair = model_pair(transformers, kind, **overrides)
    assert_same_model(pair, mask.bool(), input_ids=tokens, attention_mask=mask)
    assert attention_calls == {"flash_attn_varlen_func"}


@pytest.mark.parametrize("window", [None, 7])
def test_mask_with_holes(transformers, window):
    kind = "Llama" if window is None else "Mistral"
    overrides = {} if window is None else {"sliding_window": window}
    tokens = random_tokens(2, 30)
    mask = torch.ones_like(tokens)
    mask[0, 5:9] = 0
    mask[1, 20] = 0
    pair = model_pair(transformers, kind, **overrides)
    assert_same_model(pair, mask.bool(), input_ids=tokens, attention_mask=mask)


def packed_positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("window", [None, 5])
def test_batch_packed_by_position_ids(transformers, attention_calls, window):
    kind = "Llama" if window is None else "Mistral"
    overrides = {} if window is None else {"sliding_window": window}
    tokens = random_tokens(2, 30)
    positions = torch.cat([packed_positions(11, 1, 18), packed_positions(4, 16, 10)])
    valid = torch.ones_like(tokens, dtype=torch.bool)
    pair = model_pair(transformers, kind, **overrides)
    assert_same_model(pair, valid, input_ids=tokens, position_ids=positions)
    assert attention_calls == {"flash_attn_varlen_func"}


def test_packed_batch_equals_its_sequences_alone(transformers):
    _, model = model_pair(transformers)
    tokens = random_tokens(1, 30)
    lengths = (11, 1, 18)
    cu_seqlens = torch.tensor([0, 11, 12, 30], dtype=torch.int32)
    packed = model(
        input_ids=tokens,
        position_ids=packed_positions(*lengths),
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=18,
        max_length_k=18,
        use_cache=False,
    ).logits
    alone = [model(input_ids=part, use_cache=False).logits for part in tokens.split(lengths, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1))


def test_packed_by_cumulative_lengths_alone(transformers, attention_calls):
    """Layers that are told cumulative lengths and no mask, as vision encoders are."""
    from flash_attn.integrations.huggingface import attention_forward

    torch.manual_seed(4)
    q, k, v = (torch.randn(1, heads, 30, 16) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 11, 12, 30], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    lengths |= {"max_length_q": 18, "max_length_k": torch.tensor(18)}
    module = torch.nn.Module()
    out, weights = attention_forward(module, q, k, v, None, is_causal=False, **lengths)
    assert weights is None
    assert attention_calls == {"flash_attn_varlen_func"}
    for start, end in ((0, 11), (11, 12), (12, 30)):
        parts = (x[:, :, start:end] for x in (q, k, v))
        alone = F.scaled_dot_product_attention(*parts, enable_gqa=True)
        assert_close(out[:, start:end], alone.transpose(1, 2))


def test_softcap(transformers):
    pair = model_pair(
        transformers,
        "Gemma2",
        sliding_window=6,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=16,
    )
    tokens = random_tokens(2, 25)
    mask = padding_mask([25, 14], 25, "right")
    assert_same_model(pair, mask.bool(), input_ids=tokens, attention_mask=mask)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_sinks(transformers, padded):
    pair = model_pair(
        transformers, "GptOss", sliding_window=6, num_local_experts=2, num_experts_per_tok=1
    )
    sinks = [name for name, _ in pair[1].named_parameters() if name.endswith("sinks")]
    assert len(sinks) == 2
    tokens = random_tokens(2, 25)
    mask = padding_mask([25, 14 if padded else 25], 25, "left")
    assert_same_model(pair, mask.bool(), input_ids=tokens, attention_mask=mask)


def test_bidirectional_encoder(transformers):
    torch.manual_seed(0)
    pair = model_pair(
        transformers, "Bert", "ForMaskedLM", num_key_value_heads=4, hidden_dropout_prob=0.0
    )
    tokens = random_tokens(3, 21)
    mask = padding_mask([21, 13, 4], 21, "right")
    assert_same_model(pair, mask.bool(), input_ids=tokens, attention_mask=mask)


def test_relative_position_bias_and_cross_attention(transformers):
    """T5: a learned bias, with gradient, on top of a causal mask and on top of padding."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    pair = model_pair(
        transformers, "T5", "ForConditionalGeneration", decoder_start_token_id=0, **sizes
    )
    tokens = random_tokens(2, 21)
    decoder_tokens = random_tokens(2, 13)
    inputs = {"input_ids": tokens, "attention_mask": padding_mask([21, 9], 21, "right")}
    inputs["decoder_input_ids"] = decoder_tokens
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert bias in dict(pair[1].named_parameters())
    assert_same_model(pair, torch.ones_like(decoder_tokens, dtype=torch.bool), **inputs)


def test_under_torch_compile(transformers):
    eager, model = model_pair(transformers)
    tokens = random_tokens(2, 19)
    mask = padding_mask([19, 8], 19, "left")
    compiled = torch.compile(model, backend="aot_eager")
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    valid = mask.bool()
    assert_close(compiled(**inputs).logits[valid], eager(**inputs).logits[valid])


def test_bfloat16(transformers):
    eager, model = model_pair(transformers)
    tokens = random_tokens(2, 19)
    mask = padding_mask([19, 8], 19, "left")
    valid = mask.bool()
    exact = eager(input_ids=tokens, attention_mask=mask).logits[valid]
    errors = []
    for half in (eager.bfloat16(), model.bfloat16()):
        logits = half(input_ids=tokens, attention_mask=mask).logits[valid].float()
        errors.append(float((logits - exact).detach().abs().max()))
    assert errors[1] <= 2 * errors[0]


def test_mask_given_in_four_dimensions(transformers):
    pair = model_pair(transformers)
    tokens = random_tokens(2, 19)
    torch.manual_seed(5)
    visible = (torch.rand(2, 1, 19, 19) > 0.4) | torch.eye(19, dtype=torch.bool)
    additive = torch.zeros(2, 1, 19, 19).masked_fill(~visible, torch.finfo(torch.float32).min)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    assert_same_model(pair, valid, input_ids=tokens, attention_mask=additive)
    with torch.no_grad():
        from_bool = pair[1](input_ids=tokens, attention_mask=visible).logits
        assert_close(from_bool, pair[0](input_ids=tokens, attention_mask=additive).logits)


def test_chunked_attention_becomes_a_bias(transformers, attention_calls):
    from transformers.masking_utils import create_chunked_causal_mask

    pair = model_pair(transformers)
    tokens = random_tokens(2, 19)
    masks = []
    for model in pair:
        model.config.attention_chunk_size = 5
        embeddings = model.model.embed_tokens(tokens)
        masks.append(create_chunked_causal_mask(model.config, embeddings, None, None))
    assert_close(
        pair[1](input_ids=tokens, attention_mask=masks[1]).logits,
        pair[0](input_ids=tokens, attention_mask=masks[0]).logits,
    )
    assert attention_calls == {"flash_attn_func"}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "GptOss"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate(transformers, attention_calls, cache, kind, padded):
    overrides = {
        "Llama": {},
        "Mistral": {"sliding_window": 7},
        "GptOss": {"sliding_window": 7, "num_local_experts": 2, "num_experts_per_tok": 1},
    }[kind]
    tokens = random_tokens(3, 12)
    mask = padding_mask([12, 5, 1] if padded else [12, 12, 12], 12, "left")
    results = [
        model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=16,
            do_sample=False,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for model in model_pair(transformers, kind, **overrides)
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    for actual, expected in zip(results[1].logits, results[0].logits):
        assert_close(actual, expected)
    assert "flash_attn_with_kvcache" in attention_calls


def test_generate_continues_a_right_padded_prompt(transformers):
    """Padding between the prompt and the new tokens hides keys in the middle of the cache."""
    pair = model_pair(transformers)
    tokens = random_tokens(2, 12)
    mask = padding_mask([12, 7], 12, "right")
    results = [
        model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for model in pair
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunked_prefill(transformers, cache):
    """Several queries after keys that are already cached."""
    tokens = random_tokens(2, 20)
    logits = []
    for model in model_pair(transformers):
        past = transformers.DynamicCache(config=model.config)
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            parts = [
                model(part, past_key_values=past).logits for part in tokens.split([9, 7, 4], 1)
            ]
        logits.append(torch.cat(parts, dim=1))
    assert_close(logits[1], logits[0])


def test_register_returns_the_name_and_refuses_flash(transformers):
    assert integrations.register("exact_attention") == "exact_attention"
    assert integrations.register("another_name") == "another_name"
    with pytest.raises(ValueError, match="'flash' in its name"):
        integrations.register("flash_attn")


def test_dropout_is_applied_in_training_only(transformers):
    _, model = model_pair(transformers, attention_dropout=0.5)
    tokens = random_tokens(2, 19)
    with torch.no_grad():
        quiet = model(input_ids=tokens).logits
        assert torch.equal(quiet, model(input_ids=tokens).logits)
        model.train()
        torch.manual_seed(0)
        noisy = model(input_ids=tokens).logits
        torch.manual_seed(0)
        assert torch.equal(noisy, model(input_ids=tokens).logits)
    assert not torch.allclose(noisy, quiet)


def test_integrations_import_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "flash_attn.integrations.huggingface", raising=False)
    with pytest.raises(ImportError, match="transformers"):
        integrations.register()
