"""Hugging Face transformers' models on this package, against their own eager attention."""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flash_attn import integrations

VOCABULARY = 97


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share."""
    torch.set_num_threads(1)


def assert_close(actual, expected, tolerance=2e-5):
    """Equal up to ``tolerance`` of the largest expected magnitude."""
    limit = tolerance * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


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
    if kind == "Falcon":  # derives it
        del sizes["head_dim"]
    sizes.update(overrides)
    return getattr(transformers, f"{kind}Config")(**sizes)


def model_pair(
    transformers, kind="Llama", suffix="ForCausalLM", name="exact_attention", **overrides
):
    """The same random model twice: with eager attention and with this package."""
    models = []
    for implementation in ("eager", name):
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


# ------------------------------------------------------------------------------------------------
# The mask, to whoever computes with it


def chunked(size):
    from transformers import masking_utils

    return masking_utils.chunked_causal_mask_function(size, torch.tensor([0, 2]))


def mask_functions():
    from transformers import masking_utils as masks

    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
    packed = masks.packed_sequence_compatibility_function(
        masks.causal_mask_function, positions, segments
    )
    return {
        "causal": masks.causal_mask_function,
        "bidirectional": masks.bidirectional_mask_function,
        "window": masks.sliding_window_causal_mask_function(3),
        "wide window": masks.sliding_window_causal_mask_function(30),
        "window on both sides": masks.sliding_window_bidirectional_mask_function(2),
        "packed": packed,
        "chunked": chunked(3),
    }


MASK_KINDS = (
    "causal",
    "bidirectional",
    "window",
    "wide window",
    "window on both sides",
    "packed",
    "chunked",
)
PADDING = {
    "none": None,
    "full": [[1] * 6] * 2,
    "left": [[1] * 6, [0, 0, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 1], [1] * 6],
}


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_is_that_of_eager_attention(transformers, kind, padding, skip, dtype):
    """None where eager attention gets None; elsewhere every element of its floating mask."""
    from transformers.masking_utils import eager_mask

    from flash_attn.integrations.huggingface import attention_mask

    if kind == "packed" and padding != "none":
        pytest.skip("transformers looks for packed sequences without padding only")
    tokens = PADDING[padding]
    arguments = {
        "batch_size": 2,
        "q_length": 6,
        "kv_length": 6,
        "mask_function": mask_functions()[kind],
        "attention_mask": None if tokens is None else torch.tensor(tokens).bool(),
        "allow_is_bidirectional_skip": skip and kind == "bidirectional",
        "dtype": dtype,
    }
    expected = eager_mask(**arguments)
    mask = attention_mask(**arguments)
    assert (mask is None) == (expected is None)
    if mask is None:
        return
    assert mask.shape == expected.shape
    assert mask.dtype == dtype
    assert torch.equal(mask + 0, expected)
    scores = torch.randn(2, 4, 6, 6, dtype=dtype)
    assert torch.equal(scores + mask, scores + expected)
    assert torch.equal(mask[:, 0, 2:, :4], expected[:, 0, 2:, :4])
    assert torch.equal(torch.cat([mask, scores], 1), torch.cat([expected, scores], 1))
    assert type(mask * 1) is torch.Tensor


READERS = {
    "list": lambda mask: torch.tensor(mask.tolist()),
    "numpy": lambda mask: torch.from_numpy(mask.numpy()),
    "array": lambda mask: torch.from_numpy(np.asarray(mask)),
    "dlpack": torch.from_dlpack,
    "deep copy": copy.deepcopy,
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
}


@pytest.mark.parametrize("reader", READERS)
def test_mask_read_as_memory(transformers, reader):
    from transformers.masking_utils import eager_mask

    from flash_attn.integrations.huggingface import attention_mask

    mask = attention_mask(2, 6, 6)
    assert torch.equal(READERS[reader](mask), eager_mask(2, 6, 6))
    assert mask.data_ptr() == mask.dense().data_ptr() != 0


@pytest.mark.parametrize("q_offset", [4, torch.tensor(4)])
def test_mask_over_a_cache(transformers, q_offset):
    """Two queries at positions 4 and 5, over a static cache with room for more."""
    from transformers.masking_utils import eager_mask

    from flash_attn.integrations.huggingface import PatternMask, attention_mask

    arguments = {"batch_size": 2, "q_length": 2, "kv_length": 9, "q_offset": q_offset}
    arguments["attention_mask"] = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]).bool()
    mask = attention_mask(**arguments)
    assert isinstance(mask, PatternMask)
    assert torch.equal(mask + 0, eager_mask(**arguments))


def test_mask_that_must_be_there(transformers):
    """Doge adds to it, DeepSeek-V3.2 indexes it: a causal mask is never left out."""
    from flash_attn.integrations.huggingface import attention_mask

    for options in ({}, {"allow_is_causal_skip": False}, {"allow_is_causal_skip": True}):
        mask = attention_mask(1, 4, 4, **options)
        visible = mask[0, 0] == 0
        assert torch.equal(visible, torch.ones(4, 4, dtype=torch.bool).tril())


def write_into_view(mask):
    mask[:, :, :, :2][:, :, 3:] = torch.finfo(torch.float32).min


def write_into_detached(mask):
    mask.detach()[:, :, 3:, :2] = torch.finfo(torch.float32).min


def write_in_place(mask):
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[3:, :2] = True
    mask.masked_fill_(hidden, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", [write_into_view, write_in_place, write_into_detached])
def test_writes_into_the_mask_count(transformers, mode, write):
    """Attention follows what a model wrote into the mask."""
    from flash_attn.integrations.huggingface import attention_forward, attention_mask

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    with mode():
        mask = attention_mask(1, 5, 5)
        out, _ = attention_forward(torch.nn.Module(), q, k, v, mask)
        assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
        write(mask)
        visible[3:, :2] = False
        out, _ = attention_forward(torch.nn.Module(), q, k, v, mask)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        assert_close(out, expected.transpose(1, 2))


def test_padding_rows_see_the_tokens_of_an_encoder(transformers, attention_calls):
    """Some models pool a row of padding; eager attention gives it all tokens."""
    torch.manual_seed(0)
    pair = model_pair(
        transformers, "Bert", "ForMaskedLM", num_key_value_heads=4, hidden_dropout_prob=0.0
    )
    tokens = random_tokens(3, 21)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    for side in ("left", "right"):
        mask = padding_mask([21, 13, 4], 21, side)
        assert_same_model(pair, everything, input_ids=tokens, attention_mask=mask)
    assert attention_calls == {"flash_attn_varlen_func"}


def test_windowed_encoder_with_padding(transformers):
    pair = model_pair(
        transformers,
        "ModernBert",
        "ForMaskedLM",
        local_attention=6,
        global_attn_every_n_layers=2,
        num_hidden_layers=3,
        cls_token_id=1,
        sep_token_id=2,
    )
    tokens = random_tokens(3, 21)
    mask = padding_mask([21, 13, 18], 21, "right")
    assert_same_model(pair, mask.bool(), input_ids=tokens, attention_mask=mask)


def test_no_mask_is_no_mask_for_layers_of_transformers(transformers):
    """Splinter's layers do not say whether they are causal; BridgeTower's say so and are not."""
    from flash_attn.integrations.huggingface import attention_forward

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
    own = torch.nn.Module()
    theirs = type("Layer", (torch.nn.Module,), {"__module__": "transformers.models.x"})()
    expected = {
        causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
        for causal in (False, True)
    }
    for module, attribute, argument, causal in (
        (own, None, None, False),
        (own, True, None, True),
        (own, False, None, False),
        (own, True, False, False),
        (theirs, True, None, False),
        (theirs, False, True, True),
    ):
        module.__dict__.pop("is_causal", None)
        if attribute is not None:
            module.is_causal = attribute
        out, _ = attention_forward(module, q, k, v, None, is_causal=argument)
        assert_close(out, expected[causal])


# ------------------------------------------------------------------------------------------------
# Keywords of a layer


class Layer(torch.nn.Module):
    """A layer that passes what it is given to its attention, and names one keyword itself."""

    is_causal = True

    def forward(self, *args, routing=None, **kwargs):
        from flash_attn.integrations.huggingface import attention_forward

        return attention_forward(self, *args, routing=routing, **kwargs)[0]


def layer_inputs():
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16), torch.randn(2, 2, 6, 16)


def eager(q, k, v, bias, sinks=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def causal_bias(size):
    visible = torch.ones(size, size, dtype=torch.bool).tril()
    return torch.zeros(size, size).masked_fill(~visible, -torch.inf)


@pytest.mark.parametrize("masked", [False, True])
def test_indices_of_visible_keys(transformers, masked):
    """DeepSeek-V3.2 and its kin: every query sees some keys only."""
    from flash_attn.integrations.huggingface import attention_mask

    q, k, v = layer_inputs()
    indices = torch.rand(2, 6, 6).argsort(-1)[..., :4]
    indices[..., 0] = torch.arange(6)  # itself
    hidden = torch.ones(2, 6, 6, dtype=torch.bool).scatter(-1, indices, False)
    expected = eager(
        q, k, v, causal_bias(6) + torch.zeros(2, 1, 6, 6).masked_fill(hidden[:, None], -torch.inf)
    )
    mask = attention_mask(2, 6, 6) if masked else None
    assert_close(Layer()(q, k, v, mask, indices=indices.to(torch.int32)), expected)


@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1), (2, 4, 6, 1)])
def test_sinks(transformers, shape):
    """One sink for each head, or for each query (Inkling 2); with gradients."""
    q, k, v = (x.requires_grad_() for x in layer_inputs())
    sinks = torch.randn(shape, requires_grad=True)
    leaves = (q, k, v, sinks)
    column = sinks.view(1, 4, 1, 1) if len(shape) == 1 else sinks
    expected = eager(q, k, v, causal_bias(6), column)
    out = Layer()(q, k, v, None, sinks=sinks)
    assert_close(out, expected)
    dout = torch.randn_like(out)
    for a, e in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout)
    ):
        assert_close(a, e)


def test_sinks_of_another_shape(transformers):
    with pytest.raises(TypeError, match=r"sinks must be \(4,\) or"):
        Layer()(*layer_inputs(), None, sinks=torch.zeros(2, 4))


def test_unknown_keyword_of_a_layer_is_refused(transformers):
    with pytest.raises(TypeError, match="Layer passes 'routing' to its attention"):
        Layer()(*layer_inputs(), None, routing=torch.zeros(1))
    with pytest.raises(TypeError, match="has no indexer"):
        Layer()(*layer_inputs(), None, block_indices=torch.zeros(1))


def test_keywords_from_outside_change_nothing(transformers):
    """A caller's keywords reach every layer of a model; eager attention ignores them."""
    inputs = layer_inputs()
    expected = Layer()(*inputs, None)
    out = Layer()(*inputs, None, position_ids=torch.arange(6)[None], use_cache=True, mine=3)
    assert torch.equal(out, expected)


def test_attention_weights_are_announced_missing(transformers):
    with pytest.warns(UserWarning, match="output_attentions=True needs"):
        Layer()(*layer_inputs(), None, output_attentions=True)


# ------------------------------------------------------------------------------------------------
# Half precision around a model


@pytest.mark.parametrize("padded", [False, True])
def test_autocast(transformers, padded):
    eager_model, model = model_pair(transformers)
    tokens = random_tokens(2, 19)
    mask = padding_mask([19, 8 if padded else 19], 19, "left")
    valid = mask.bool()
    exact = eager_model(input_ids=tokens, attention_mask=mask).logits[valid]
    errors = []
    for half in (eager_model, model):
        with torch.autocast("cpu", torch.bfloat16):
            logits = half(input_ids=tokens, attention_mask=mask).logits[valid]
        assert logits.dtype == torch.bfloat16
        logits.sum().backward()
        errors.append(float((logits - exact).detach().abs().max()))
    assert 0 < errors[1] <= 2 * errors[0]


def test_dtypes_that_differ(transformers):
    """Norms in fp32 before queries and keys, as adapters are trained with them."""
    q, k, v = layer_inputs()
    out = Layer()(q, k, v.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), eager(q, k, v, causal_bias(6)), 2e-2)


# ------------------------------------------------------------------------------------------------
# torch.compile and torch.export


KINDS_TO_COMPILE = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "GptOss": {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Bloom": {"n_layer": 1, "n_head": 4},
}


def compile_case(transformers, kind, padded):
    overrides = {"num_hidden_layers": 1, **KINDS_TO_COMPILE[kind]}
    eager_model, model = model_pair(transformers, kind, **overrides)
    inputs = {"input_ids": random_tokens(2, 19), "use_cache": False}
    valid = torch.ones(2, 19, dtype=torch.bool)
    if padded:
        inputs["attention_mask"] = padding_mask([19, 8], 19, "left")
        valid = inputs["attention_mask"].bool()
    return eager_model, model, inputs, valid


@pytest.mark.parametrize(
    ("kind", "padded"),
    [("Llama", True), ("Llama", False), ("Mistral", True), ("GptOss", False), ("Bloom", True)],
)
@pytest.mark.filterwarnings("ignore:BloomAttention")
def test_compiled_as_one_graph(transformers, kind, padded):
    eager_model, model, inputs, valid = compile_case(transformers, kind, padded)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(**inputs).logits
    expected = eager_model(**inputs).logits
    assert_close(logits[valid], expected[valid])
    for each in (logits, expected):
        each[valid].square().mean().backward()
    for a, b in zip(model.parameters(), eager_model.parameters()):
        if b.grad is not None:
            scale = float(b.grad.abs().max())
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-4 * scale + 1e-9)


def test_compiled_padding_keeps_its_pattern(transformers):
    """The mask of a padded batch stays a causal flag and a bias for the keys."""
    _, model, inputs, _ = compile_case(transformers, "Llama", padded=True)
    biases = []

    def backend(graph, _):
        for node in graph.graph.nodes:
            if node.target is torch.ops.flash_attn._flash_attn_forward.default:
                causal, bias = node.args[5], node.kwargs["attn_bias"]
                biases.append((causal, tuple(bias.meta["example_value"].shape)))
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    assert biases == [(True, (2, 1, 1, 19))]


@pytest.mark.parametrize(
    ("kind", "strict", "padded"),
    [
        ("Llama", False, True),
        ("Llama", False, False),
        ("Mistral", False, False),
        ("Llama", True, True),
    ],
)
def test_exported_with_dynamic_shapes(transformers, kind, strict, padded):
    eager_model, model, inputs, _ = compile_case(transformers, kind, padded)
    dims = {0: torch.export.Dim("batch", min=2, max=16), 1: torch.export.Dim("seq", min=2, max=64)}
    shapes = {name: None if name == "use_cache" else dims for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict)
    inputs = {"input_ids": random_tokens(3, 11), "use_cache": False}
    valid = torch.ones(3, 11, dtype=torch.bool)
    if padded:
        inputs["attention_mask"] = padding_mask([11, 3, 8], 11, "left")
        valid = inputs["attention_mask"].bool()
    logits = program.module()(**inputs).logits[valid]
    assert_close(logits, eager_model(**inputs).logits[valid])


def test_compiled_layers_take_the_mask(transformers):
    """Layers compiled one by one get a mask that was made outside."""
    eager_model, model, inputs, valid = compile_case(transformers, "Llama", padded=True)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_close(model(**inputs).logits[valid], eager_model(**inputs).logits[valid])


def test_generation_with_a_compiled_model(transformers):
    eager_model, model, inputs, _ = compile_case(transformers, "Llama", padded=True)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    del inputs["use_cache"]
    results = [
        each.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
        for each in (eager_model, model)
    ]
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------
# Models that look for their own names


def test_layers_without_the_interface_are_named(transformers):
    with pytest.warns(UserWarning, match="FalconAttention .* without transformers' attention"):
        model_pair(transformers, "Falcon")


def test_models_with_the_interface_get_no_warning(transformers, recwarn):
    model_pair(transformers)
    assert not [w for w in recwarn if "attention interface" in str(w.message)]


@pytest.fixture(scope="module")
def flash_attention_2(transformers):
    integrations.register(flash_attention_2=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Falcon"])
def test_flash_attention_2_on_the_cpu(
    transformers, flash_attention_2, kind, padded, attention_2_calls
):
    overrides = {"Mistral": {"sliding_window": 7}, "Falcon": {"new_decoder_architecture": True}}
    overrides = overrides.get(kind, {})
    models = model_pair(transformers, kind, name="flash_attention_2", **overrides)
    tokens = random_tokens(3, 19)
    mask = padding_mask([19, 5, 11] if padded else [19] * 3, 19, "left")
    assert_same_model(models, mask.bool(), input_ids=tokens, attention_mask=mask)
    assert attention_2_calls
    results = [
        m.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in models
    ]
    assert torch.equal(*results)


@pytest.fixture
def attention_2_calls(monkeypatch):
    """Counts calls of the functions that transformers took from this package."""
    from transformers import modeling_flash_attention_utils as utils

    calls = []
    utils.lazy_import_flash_attention("flash_attention_2")
    for name in ("_flash_fn", "_flash_varlen_fn"):
        function = getattr(utils, name)
        assert function.__module__ == "flash_attn.flash_attn_interface"

        def counted(*args, name=name, function=function, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(utils, name, counted)
    return calls


def test_flash_attention_2_refuses_what_would_be_wrong(transformers, flash_attention_2):
    """transformers' flash layers of GPT-Neo forget the window of local attention."""
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
    )
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="lose their window"):
        transformers.GPTNeoForCausalLM(config)
    config = transformers.BloomConfig(vocab_size=VOCABULARY, n_layer=1, hidden_size=64, n_head=4)
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        transformers.BloomForCausalLM(config)


@pytest.mark.slow
def test_continuous_batching(transformers, flash_attention_2):
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [20]]
    generation = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    models = model_pair(transformers)
    expected = [
        models[0].generate(torch.tensor([p]), max_new_tokens=6, do_sample=False)[0, len(p) :]
        for p in prompts
    ]
    models[1].set_attn_implementation("flash_attention_2")
    results = models[1].generate_batch(inputs=prompts, generation_config=generation)
    assert [r.generated_tokens for r in results.values()] == [e.tolist() for e in expected]
