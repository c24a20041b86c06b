"""Hugging Face transformers' own "flash_attention_3" on this package, against eager attention."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from reference import attention
from scripts import ROOT
from test_transformers import (
    assert_close,
    assert_same_model,
    model_pair,
    padding_mask,
    random_tokens,
)

from flash_attn import integrations, v3


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", minversion="5.0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the cases are too small to share
    added = str(ROOT / "hopper")
    if importlib.util.find_spec("flash_attn_interface") is not None:
        added = None
    else:
        sys.path.insert(0, added)
    integrations.register(flash_attention_3=True)
    yield module
    torch.set_num_threads(threads)
    if added:
        sys.path.remove(added)


@pytest.fixture
def calls(transformers, monkeypatch):
    """Names of the functions that transformers took from flash_attn_interface and called."""
    from transformers import modeling_flash_attention_utils as utils

    called = set()
    utils.lazy_import_flash_attention("flash_attention_3")
    for name in ("_flash_fn", "_flash_varlen_fn"):
        function = getattr(utils, name)
        assert function.__module__ == "flash_attn.v3.interface"

        def counted(*args, name=name, function=function, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(utils, name, counted)
    return called


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("Llama", {}), ("Mistral", {"sliding_window": 7}), ("Gemma2", {"sliding_window": 8})],
)
def test_models(transformers, calls, kind, overrides, padded):
    """Logits, gradients and greedy generation; Gemma 2 has a softcap as well."""
    models = model_pair(transformers, kind, name="flash_attention_3", **overrides)
    tokens = random_tokens(3, 19)
    mask = padding_mask([19, 5, 11] if padded else [19] * 3, 19, "left")
    assert_same_model(models, mask.bool(), input_ids=tokens, attention_mask=mask)
    assert calls == {"_flash_varlen_fn" if padded else "_flash_fn"}
    results = [
        m.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in models
    ]
    assert torch.equal(*results)


def test_attention_sinks(calls):
    """transformers hands s_aux to functions that have such a parameter."""
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    q, k, v = torch.randn(2, 9, 4, 16), *torch.randn(2, 2, 9, 2, 16)
    s_aux = torch.randn(4)
    out = _flash_attention_forward(
        *(q, k, v, None, 9),
        is_causal=True,
        s_aux=s_aux,
        attn_implementation="flash_attention_3",
    )
    assert_close(out, attention(q, k, v, causal=True, s_aux=s_aux)[0])
    assert calls == {"_flash_fn"}


def test_packed_sequences(transformers, calls):
    models = model_pair(transformers, name="flash_attention_3")
    tokens = random_tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        parts = [models[0](x).logits for x in tokens.split((8, 12), 1)]
        actual = models[1](tokens, position_ids=positions, use_cache=False).logits
    assert_close(actual, torch.cat(parts, 1))
    assert calls == {"_flash_varlen_fn"}


@pytest.mark.slow
def test_continuous_batching(transformers):
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [20]]
    generation = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    models = model_pair(transformers)
    expected = [
        models[0].generate(torch.tensor([p]), max_new_tokens=6, do_sample=False)[0, len(p) :]
        for p in prompts
    ]
    models[1].set_attn_implementation("flash_attention_3")
    results = models[1].generate_batch(inputs=prompts, generation_config=generation)
    assert [r.generated_tokens for r in results.values()] == [e.tolist() for e in expected]


def test_without_the_distribution(transformers, monkeypatch):
    from flash_attn.integrations import huggingface_models

    find = importlib.util.find_spec
    monkeypatch.setattr(
        huggingface_models.importlib.util,
        "find_spec",
        lambda name: None if name == "flash_attn_interface" else find(name),
    )
    with pytest.raises(ImportError, match=r"pip install \./hopper"):
        integrations.register(flash_attention_3=True)


def test_names_are_the_package_s(transformers):
    module = importlib.import_module("flash_attn_interface")
    assert module.flash_attn_func is v3.flash_attn_func
