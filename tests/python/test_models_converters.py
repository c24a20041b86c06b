"""Models of transformers, converted: their logits, and back again bit by bit."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from model_cases import CASES, VOCAB, hf_model, in_bf16

from flash_attn.models.gpt import GPTLMHeadModel

BATCH, SEQLEN = 2, 40


def converters(case):
    """The functions of a configuration and of a state dict, there and back."""
    module = importlib.import_module(f"flash_attn.models.{case.module}")
    name = "gpt2" if case.module == "gpt" else case.module
    to_config = getattr(module, f"{name}_config_to_gpt2_config", copy.copy)
    remap = getattr(module, f"remap_state_dict_hf_{name}")
    return to_config, remap, getattr(module, f"inv_remap_state_dict_hf_{name}")


def converted(case, theirs, **attributes):
    """Our model of one of theirs, with attributes of the configuration besides."""
    to_config, remap, _ = converters(case)
    config = to_config(theirs.config)
    for name, value in attributes.items():
        setattr(config, name, value)
    model = GPTLMHeadModel(config).eval()
    model.load_state_dict(remap(theirs.state_dict(), config))
    return model


def tokens(seqlen=SEQLEN):
    return torch.randint(VOCAB, (BATCH, seqlen), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_logits(name):
    theirs, ids = hf_model(CASES[name]), tokens()
    ours, expected = converted(CASES[name], theirs), theirs(ids).logits
    # The same sums in another order: a few units of fp32's precision of logits of about 1 to 10.
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=1e-4)
    theirs_bf16, ours_bf16 = in_bf16(theirs), in_bf16(ours)
    bound = 2 * (theirs_bf16(ids).logits.float() - expected).abs().max()
    assert (ours_bf16(ids).logits.float() - expected).abs().max() <= bound


@pytest.mark.parametrize("name", CASES)
def test_back_again(name):
    case, theirs = CASES[name], hf_model(CASES[name])
    to_config, remap, inverse = converters(case)
    config, state_dict = to_config(theirs.config), theirs.state_dict()
    config.pad_vocab_size_multiple = 64
    before = {key: x.clone() for key, x in state_dict.items()}
    back = inverse(remap(state_dict, config), config)
    if case.module == "gpt_neox":  # files have the head by another name than the model
        back["lm_head.weight"] = back.pop("embed_out.weight")
    assert back.keys() == before.keys()
    for key, x in before.items():
        assert torch.equal(back[key], x), key
        assert torch.equal(state_dict[key], x), key
    assert all(x.is_contiguous() for x in back.values())
