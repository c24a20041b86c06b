"""Frequencies of longer contexts are those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.layers.scaled_rotary import ScaledRotaryEmbedding, check_scaling

HEAD_DIM, BASE, ORIGINAL = 32, 500.0, 64
_PAIRS = HEAD_DIM // 2
SCALINGS = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0},
    "yarn, all options": {
        "factor": 4.0, "beta_fast": 8, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn, attention factor": {"factor": 4.0, "attention_factor": 1.3},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0 + 0.1 * i for i in range(_PAIRS)],
        "long_factor": [2.0 + 0.3 * i for i in range(_PAIRS)],
    },
}  # fmt: skip


def scaling_of(name):
    original = {} if name == "linear" else {"original_max_position_embeddings": ORIGINAL}
    return {"rope_type": name.split(",")[0], **SCALINGS[name], **original}


@pytest.mark.parametrize("seqlen", [40, 64, 65, 200])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies(name, seqlen):
    scaling = scaling_of(name)
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=ORIGINAL,
        rope_parameters={**scaling, "rope_theta": BASE},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=seqlen)
    rotary = ScaledRotaryEmbedding(HEAD_DIM, base=BASE, scaling=scaling)
    rotary._update_cos_sin_cache(seqlen, device=torch.device("cpu"), dtype=torch.float32)
    torch.testing.assert_close(rotary.inv_freq, expected, atol=0.0, rtol=1e-6)
    # angles are up to 200, whose fp32 neighbours differ by 1.5e-5
    angles = torch.outer(torch.arange(seqlen).double(), expected.double())
    torch.testing.assert_close(
        rotary._cos_cached.double(), angles.cos() * factor, atol=4e-5, rtol=0.0
    )
    torch.testing.assert_close(
        rotary._sin_cached.double(), angles.sin() * factor, atol=4e-5, rtol=0.0
    )


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_tables_follow_the_length(name):
    """Up and down again, as sequences of different lengths come."""
    rotary = ScaledRotaryEmbedding(HEAD_DIM, base=BASE, scaling=scaling_of(name))
    q = torch.randn(1, 200, 3, 1, HEAD_DIM)
    for seqlen in (40, 200, 64, 120):
        fresh = ScaledRotaryEmbedding(HEAD_DIM, base=BASE, scaling=scaling_of(name))
        part = q[:, :seqlen]
        assert torch.equal(rotary(part.clone()), fresh(part.clone()))


@pytest.mark.parametrize("name", SCALINGS)
def test_half_precision_modules_keep_their_frequencies(name):
    rotary = ScaledRotaryEmbedding(HEAD_DIM, base=BASE, scaling=scaling_of(name))
    rotary._update_cos_sin_cache(100, device=torch.device("cpu"), dtype=torch.bfloat16)
    cast = ScaledRotaryEmbedding(HEAD_DIM, base=BASE, scaling=scaling_of(name)).bfloat16()
    cast._update_cos_sin_cache(100, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert torch.equal(rotary._cos_cached, cast._cos_cached)


def test_default_is_not_scaled():
    scaled = ScaledRotaryEmbedding(HEAD_DIM, base=BASE, scaling={"rope_type": "default"})
    assert torch.equal(scaled.inv_freq, RotaryEmbedding(HEAD_DIM, base=BASE).inv_freq)


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        ({"rope_type": "ntk"}, r"scaling\['rope_type'\] must be one of .*, got 'ntk'"),
        ({}, r"scaling\['rope_type'\] must be one of .*, got None"),
        ({"rope_type": "linear"}, "scaling of rope_type 'linear' needs 'factor'"),
        (
            {"rope_type": "yarn", "factor": 2.0},
            "scaling of rope_type 'yarn' needs 'original_max_position_embeddings'",
        ),
        ({"rope_type": "linear", "factor": 0.0}, r"scaling\['factor'\] must be a positive number"),
        ({"rope_type": "linear", "factor": "2"}, r"must be a positive number, got '2'"),
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 3},
            r"unknown key 'beta_fast' \(3\)",
        ),
        (
            {**scaling_of("llama3"), "low_freq_factor": 4.0},
            "'low_freq_factor'] must be less than 'high_freq_factor', got 4.0 and 4.0",
        ),
        (
            {**scaling_of("longrope"), "short_factor": [1.0]},
            r"\['short_factor'\] must have a number for each of 16 pairs, got \[1.0\]",
        ),
    ],
)  # fmt: skip
def test_wrong_scaling(scaling, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_scaling(scaling, HEAD_DIM)


def test_scaling_is_a_dict():
    with pytest.raises(TypeError, match=r"scaling must be a dict with rope_type, got 2\.0"):
        check_scaling(2.0, HEAD_DIM)
