"""What models refuse rather than to compute or write something else than was meant."""

from __future__ import annotations

import pytest
import torch
from hf_cases import CASES, CLASSIC_CASES, edit_config, saved, tokens
from test_models_decode_step import make_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig
from transformers import BertModel as TheirBertModel

from flash_attn.models import from_hf, to_hf
from flash_attn.models.bert import BertModel


@pytest.fixture
def tied(tmp_path):
    saved(CASES["qwen3, biases, tied"], tmp_path / "theirs")
    return from_hf(tmp_path / "theirs")


def test_heads_that_are_no_longer_tied(tied, tmp_path):
    to_hf(tied, tmp_path / "ours")
    head = tied.lm_head.weight
    tied.lm_head.weight = nn.Parameter(head.clone())
    to_hf(tied, tmp_path / "equal")
    tied.lm_head.weight.data[3, 2] += 1.0
    with pytest.raises(ValueError, match=r"lm_head\.weight must be the word embeddings where"):
        to_hf(tied, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    state_dict = {**tied.state_dict(), "lm_head.weight": head + 1}
    with pytest.raises(ValueError, match=r"lm_head\.weight must be the word embeddings where"):
        to_hf(tied, tmp_path / "other", state_dict=state_dict)


def bert_config(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, intermediate_size=64, max_position_embeddings=16, **sizes)
    for name, value in options.items():
        setattr(config, name, value)
    return config


def test_padding_that_would_be_pooled():
    ids, mask = torch.randint(1, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    config = bert_config(use_flash_attn=True)
    model = BertModel(config).eval()
    with pytest.raises(ValueError, match="attention_mask must have a token first in every seq"):
        model(ids, attention_mask=mask)
    assert (
        BertModel(config, add_pooling_layer=False)(ids, attention_mask=mask).pooler_output is None
    )
    assert model(ids, attention_mask=mask.flip(1)).pooler_output.shape == (2, 32)
    with pytest.raises(ValueError, match=r"input_ids must have a token in every .* got \(2, 0\)"):
        model(ids[:, :0])


def test_padding_without_kernels_is_pooled_as_theirs_is(tmp_path):
    theirs = TheirBertModel(bert_config(attn_implementation="eager")).eval()
    theirs.save_pretrained(tmp_path)
    ids, mask = torch.randint(1, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    ours = BertModel.from_pretrained(str(tmp_path), bert_config()).eval()
    found, expected = (m(ids, attention_mask=mask).pooler_output for m in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_fractions_that_turn_nothing():
    with pytest.raises(ValueError, match=r"rotary_emb_fraction \(0\.1\) must turn .* head_dim 8"):
        make_model(n_positions=0, rotary_emb_fraction=0.1)


@pytest.mark.parametrize("where", ["top", "rope_parameters"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_partial_rotary_factors_of_whole_heads(name, where, tmp_path):
    saved(CASES[name], tmp_path)
    partial = {"partial_rotary_factor": 0.5}
    if where == "rope_parameters":
        partial = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **partial}}
    edit_config(tmp_path, **partial)
    with pytest.raises(ValueError, match=r"partial_rotary_factor must be 1 .* a \w+ model.* 0\.5"):
        from_hf(tmp_path)


@pytest.mark.parametrize("base", [{}, {"rope_theta": 300.0}])
@pytest.mark.parametrize("name", ["qwen3", "stablelm", "llama"])
def test_both_names_of_rotary_parameters(name, base, tmp_path):
    """transformers goes by ``rope_scaling`` where there are both."""
    saved({**CASES, **CLASSIC_CASES}[name], tmp_path)
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    both["rope_scaling"] = {"rope_type": "linear", "factor": 4.0, **base}
    edit_config(tmp_path, **both)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = tokens(2, 7)
    with torch.no_grad():
        found, expected = from_hf(tmp_path)(ids).logits, theirs(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
