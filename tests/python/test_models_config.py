"""What a configuration may say, what not, and that docs/models.md says it, too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpt_cases import GEMMA, LLAMA, config

from flash_attn.models._config import FIELDS, STOCK, options_of
from flash_attn.models.gpt import GPTLMHeadModel, create_block, create_mixer_cls, create_mlp_cls
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, GatedMlp

ROOT = Path(__file__).parents[2]

WRONG_VALUES = [
    ("n_embd", 0, "a positive int"),
    ("n_layer", 1.5, "a positive int"),
    ("n_head", True, "a positive int"),
    ("n_inner", -4, "a positive int or None"),
    ("activation_function", "swish", "one of gelu, gelu_new"),
    ("resid_pdrop", 1.0, "a probability below 1"),
    ("attn_pdrop", "0.1", "a probability below 1"),
    ("layer_norm_epsilon", 0.0, "a positive number"),
    ("rms_norm", 1, "True or False"),
    ("use_flash_attn", "yes", "True or False"),
    ("rotary_emb_fraction", 1.25, "a fraction from 0 to 1"),
    ("rotary_emb_base", float("inf"), "a positive number"),
    ("window_size", (4,), r"\(left, right\), ints of at least -1"),
    ("window_size", (-2, 0), r"\(left, right\), ints of at least -1"),
    ("layer_types", ["sliding_attention", "linear_attention"], "a list of 'full_attention'"),
    ("mlp_checkpoint_lvl", 3, "0, 1 or 2"),
    ("attn_softcap", -1.0, "a number of at least 0"),
    ("pad_vocab_size_multiple", 0, "a positive int"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG_VALUES)
def test_wrong_values_are_named(name, value, expected):
    with pytest.raises(ValueError, match=rf"config\.{name} must be .*{expected}") as error:
        GPTLMHeadModel(config(**{name: value}))
    assert repr(value)[:80] in str(error.value)


CONTRADICTIONS = [
    ({"n_embd": 30}, r"config\.n_embd \(30\) must be a multiple of config\.n_head \(4\)"),
    ({"n_head_kv": 3}, r"config\.n_head \(4\) must be a multiple of config\.n_head_kv \(3\)"),
    (
        {"layer_types": ["full_attention"]},
        r"config\.layer_types must have an entry for each of 2 layers, got 1",
    ),
    (
        {"mlp_checkpoint_lvl": [0, 0, 1], "fused_mlp": True},
        r"config\.mlp_checkpoint_lvl must have an entry for each of 2 layers, got 3",
    ),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        r"config\.layer_types \(.*\) needs config\.sliding_window",
    ),
    (
        {"sliding_window": 4, "window_size": (3, 0)},
        r"config\.sliding_window \(4\) needs config\.window_size \(-1, -1\)",
    ),
    (
        {"rotary_emb_fraction": 0.4},
        r"config\.rotary_emb_fraction \(0\.4\) must turn an even part of head_dim 8, it is 3",
    ),
    (
        {"rotary_emb_local_base": 100.0},
        r"config\.rotary_emb_local_base \(100\.0\) needs config\.rotary_emb_fraction above 0",
    ),
    (
        {**LLAMA, "rotary_emb_scaling": {"rope_type": "ntk"}},
        r"config\.rotary_emb_scaling\['rope_type'\] must be one of .*, got 'ntk'",
    ),
    (
        {**GEMMA, "rotary_emb_scale_base": 512.0},
        r"config\.rotary_emb_scaling \(.*\) needs no config\.rotary_emb_scale_base",
    ),
    (
        {**LLAMA, "position_embeddings_offset": 2},
        r"config\.position_embeddings_offset \(2\) needs config\.n_positions above 0",
    ),
    ({"alibi_scale": 0.5}, r"config\.alibi_scale \(0\.5\) needs config\.use_alibi=True"),
    ({"parallel_block": True, "prenorm": False}, r"parallel_block \(True\) needs .*prenorm=True"),
    ({"residual_in_fp32": True, "prenorm": False}, r"residual_in_fp32 \(True\) needs .*prenorm"),
    ({"parallel_block_tied_norm": True}, r"tied_norm \(True\) needs config\.parallel_block=True"),
    ({"sandwich_norm": True, "parallel_block": True}, r"sandwich_norm \(True\) needs config\.para"),
    ({"rms_norm_zero_centered": True}, r"rms_norm_zero_centered \(True\) needs config\.rms_norm"),
    (
        {"fused_mlp": True, "activation_function": "gelu"},
        r"config\.fused_mlp \(True\) needs config\.activation_function to be .*, got 'gelu'",
    ),
    (
        {"fused_dense_sqrelu_dense": True},
        r"fused_dense_sqrelu_dense \(True\) needs config\.activation_function 'sqrelu', got 'gelu_",
    ),
    ({"mlp_checkpoint_lvl": 1}, r"config\.mlp_checkpoint_lvl \(1\) needs config\.fused_mlp=True"),
    ({"norm_head": True, "lm_head_bias": True}, r"norm_head \(True\) needs config\.lm_head_bias=F"),
    ({"add_cross_attention": True}, r"config\.add_cross_attention must be False, got True"),
    (
        {"parallel_block": True, "fused_dropout_add_ln": True, "embd_pdrop": 0.1},
        r"needs config\.embd_pdrop \(0\.1\) and config\.resid_pdrop \(0\.0\) to be the same",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "sentence"), CONTRADICTIONS)
def test_contradictions_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GPTLMHeadModel(config(**options))


def test_defaults_are_those_of_transformers():
    from transformers import GPT2Config

    theirs = GPT2Config()
    for name, (default, _) in STOCK.items():
        assert getattr(theirs, name) == default, name


def test_none_is_the_default():
    options = options_of(config(n_head_kv=None, window_size=None, rms_norm=None, layer_types=None))
    assert (options.n_head_kv, tuple(options.window_size), options.rms_norm) == (4, (-1, -1), False)


def documented_attributes():
    table = (ROOT / "docs" / "models.md").read_text().split("<!-- attributes -->")[1]
    table = table.split("\n\n")[0].strip().splitlines()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    return {row[0].strip("`"): row[1].strip("`") for row in rows if row[0].startswith("`")}


def test_documented_attributes():
    expected = {name: default for name, (default, _) in FIELDS.items()}
    documented = {name: ast.literal_eval(text) for name, text in documented_attributes().items()}
    assert documented == expected


def test_hidden_features():
    sizes = {"n_embd": 96, "n_inner": None}
    assert options_of(config(**sizes)).hidden_features == 384
    assert options_of(config(**sizes, activation_function="swiglu")).hidden_features == 256
    gated = {"activation_function": "swiglu", "n_inner": 130}
    assert options_of(config(**gated)).hidden_features == 256
    assert options_of(config(**gated, mlp_multiple_of=4)).hidden_features == 132


def test_layers_of_a_configuration():
    options = config(**GEMMA)
    mixers = [create_mixer_cls(options, layer_idx=i)(32) for i in range(2)]
    assert all(type(mixer) is MHA for mixer in mixers)
    assert [m.inner_attn.window_size for m in mixers] == [(3, 0), (-1, -1)]
    assert [m.rotary_emb.base for m in mixers] == [50.0, 10000.0]
    assert [m.layer_idx for m in mixers] == [0, 1]
    assert mixers[0].inner_attn.softmax_scale == pytest.approx(24**-0.5)
    assert type(create_mlp_cls(options)(32)) is GatedMlp
    fused = config(fused_mlp=True, mlp_checkpoint_lvl=[1, 2])
    mlp = create_mlp_cls(fused, layer_idx=1)(32)
    assert type(mlp) is FusedMLP and mlp.checkpoint_lvl == 2
    block = create_block(config(embd_pdrop=0.3, resid_pdrop=0.2), layer_idx=0)
    assert (block.dropout1.p, block.dropout2.p, block.layer_idx) == (0.3, 0.2, 0)
    block = create_block(config(embd_pdrop=0.3, resid_pdrop=0.2), layer_idx=1, dtype=torch.bfloat16)
    assert (block.dropout1.p, block.norm1.weight.dtype) == (0.2, torch.bfloat16)


def test_model_does_not_import_transformers():
    code = (
        "import sys, flash_attn.models.gpt, flash_attn.models.llama, flash_attn.models.falcon; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
