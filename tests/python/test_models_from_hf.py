"""Folders of Hugging Face as models: their logits and greedy tokens against transformers."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from hf_cases import CASES, CLASSIC_CASES, WINDOW, Case, edit_config, saved, tokens
from safetensors.torch import load_file, save_file
from scripts import ROOT

from flash_attn.models import from_hf, to_hf
from flash_attn.models.gpt import GPTLMHeadModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SEQLEN = 40
_ALL = {**CASES, **CLASSIC_CASES}


def in_bf16(model):
    """Round a model's parameters, but not its buffers: frequencies stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("name", _ALL)
@torch.inference_mode()
def test_logits(name, tmp_path):
    theirs, ids = saved(_ALL[name], tmp_path), tokens(2, SEQLEN)
    ours, expected = from_hf(tmp_path), theirs(ids).logits
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and not ours.training
    # The same sums in another order: a few units of fp32's precision of logits of about 1 to 10.
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=1e-4)
    ours_bf16 = from_hf(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in ours_bf16.parameters()} == {torch.bfloat16}
    bound = 2 * (in_bf16(theirs)(ids).logits.float() - expected).abs().max()
    assert (ours_bf16(ids).logits.float() - expected).abs().max() <= bound


LENGTHS = (5, 11, 2)
NEW = 3 * WINDOW


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_greedy_tokens(name, tmp_path):
    """A batch, and prompts of different lengths; results longer than the window."""
    theirs, ours = saved(CASES[name], tmp_path), from_hf(tmp_path)
    batch, options = tokens(3, 11), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(batch)
    expected = theirs.generate(batch, attention_mask=mask, max_new_tokens=NEW, **options)
    assert torch.equal(ours.generate(batch, None, max_new_tokens=NEW), expected)
    prompts = [row[-n:] for row, n in zip(batch, LENGTHS)]
    for row, n in zip(mask, LENGTHS):
        row[:-n] = 0  # transformers has padding on the left
    expected = theirs.generate(batch, attention_mask=mask, max_new_tokens=NEW, **options)
    ragged = ours.generate(prompts, None, max_new_tokens=NEW)
    assert [x.tolist() for x in ragged] == [
        row[-n - NEW :].tolist() for row, n in zip(expected, LENGTHS)
    ]


@torch.inference_mode()
def test_end_of_sequence_is_generation_configs(tmp_path):
    theirs = saved(CASES["qwen3"], tmp_path)
    ids = tokens(1, 5)
    free = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    stops = [free[9].item(), 95]
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": stops, "pad_token_id": 7, "bos_token_id": None}))
    model = from_hf(tmp_path)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, stops)
    assert model.config.pad_token_id == 7
    out = model.generate(ids, None, max_new_tokens=12, eos_token_id=model.config.eos_token_id)
    first = next(i for i in range(5, len(free)) if free[i].item() in stops)
    assert torch.equal(out[0], free[: first + 1])


V4 = {
    "mistral, no window, yarn": {
        "rope_theta": 1000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False,
                         "original_max_position_embeddings": 16},
    },
    "llama, llama3": {
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    },
    "qwen2": {"rope_theta": 10000.0, "rope_scaling": ..., "sliding_window": 6},
    "qwen2, window of the last": {"rope_theta": 10000.0, "layer_types": None},
    "gemma": {"rope_theta": 10000.0, "hidden_act": "gelu", "hidden_activation": ...},
    "gemma2": {"rope_theta": 10000.0, "layer_types": None},
    "gemma3, linear": {
        "rope_theta": 1e6, "rope_local_base_freq": 1e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "layer_types": None,
               "sliding_window_pattern": 6},
    "phi3, longrope": {
        "rope_theta": 1000.0, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "su", "short_factor": [1.0 + 0.1 * i for i in range(6)],
                         "long_factor": [2.0 + 0.3 * i for i in range(6)]},
    },
    "stablelm": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
}  # fmt: skip


@pytest.mark.parametrize("name", V4)
@torch.inference_mode()
def test_config_of_transformers_4(name, tmp_path):
    saved(_ALL[name], tmp_path)
    ids = tokens(2, SEQLEN)
    expected = from_hf(tmp_path)(ids).logits
    fields = {"rope_parameters": None, "dtype": None, "torch_dtype": "float32", **V4[name]}
    edit_config(tmp_path, **fields)
    assert torch.equal(from_hf(tmp_path)(ids).logits, expected)


def test_defaults_are_those_of_transformers():
    from flash_attn.models._hf_defaults import DEFAULTS

    elsewhere = {  # in rope_parameters of transformers 5, or made of other fields there
        "head_dim", "layer_types", "num_key_value_heads", "num_kv_heads", "ffn_hidden_size",
        "word_embed_proj_dim", "rope_theta", "rope_local_base_freq", "sliding_window_pattern",
        "partial_rotary_factor", "no_rope_layers",
    }  # fmt: skip
    for model_type, fields in DEFAULTS.items():
        if not fields:
            continue
        config = transformers.AutoConfig.for_model(model_type)
        for name, value in fields.items():
            if name == "sliding_window" and model_type.startswith("qwen"):
                continue  # None there, as use_sliding_window is False
            if name not in elsewhere or (name == "head_dim" and value is not None):
                assert getattr(config, name) == value, f"{model_type}.{name}"
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope and name in fields:
                assert rope[name] == fields[name], f"{model_type}.{name}"


def test_dtype_and_device(tmp_path):
    saved(CASES["qwen3"], tmp_path)
    edit_config(tmp_path, dtype="bfloat16")
    assert from_hf(tmp_path).lm_head.weight.dtype == torch.bfloat16
    edit_config(tmp_path, dtype=None)
    assert from_hf(tmp_path).lm_head.weight.dtype == torch.float32  # of the files
    for dtype in (torch.float16, "float16"):
        assert from_hf(tmp_path, dtype=dtype).lm_head.weight.dtype == torch.float16
    assert from_hf(tmp_path, device="meta").lm_head.weight.is_meta
    edit_config(tmp_path, dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match=r"dtype must be one of float32.*'float8_e4m3fn'"):
        from_hf(tmp_path)


def test_overrides(tmp_path):
    theirs, ids = saved(CASES["gemma2"], tmp_path), tokens(2, SEQLEN)
    with torch.inference_mode():
        expected = theirs(ids).logits
        fused = from_hf(tmp_path, fused_dropout_add_ln=True, pad_vocab_size_multiple=64)
        logits = fused(ids).logits
    assert fused.lm_head.weight.shape[0] == 128 and not fused.lm_head.weight[96:].any()
    torch.testing.assert_close(logits[..., :96], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"sliding_windows \(3\) is no attribute"):
        from_hf(tmp_path, sliding_windows=3)
    with pytest.raises(ValueError, match=r"config.attn_softcap must be .* got -1"):
        from_hf(tmp_path, attn_softcap=-1)


def test_no_random_numbers_are_drawn(tmp_path):
    saved(CASES["mistral"], tmp_path)
    before = torch.get_rng_state()
    from_hf(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
@torch.inference_mode()
def test_sharded_and_bin(name, tmp_path):
    theirs, ids = saved(CASES[name], tmp_path / "one"), tokens(2, SEQLEN)
    expected = from_hf(tmp_path / "one")(ids).logits
    theirs.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    assert torch.equal(from_hf(tmp_path / "many")(ids).logits, expected)
    for file in (tmp_path / "one").glob("*.safetensors"):
        torch.save(load_file(file), tmp_path / "one" / "pytorch_model.bin")
        file.unlink()
    assert torch.equal(from_hf(tmp_path / "one")(ids).logits, expected)


@torch.inference_mode()
def test_weights_of_the_model_without_head(tmp_path):
    """As ``AutoModel`` saves them: names without the prefix, and no head."""
    theirs, ids = saved(CASES["qwen2"], tmp_path), tokens(2, SEQLEN)
    theirs.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(from_hf(tmp_path)(ids).logits, theirs(ids).logits)


GPT_OSS = Case(
    "gpt_oss",
    {
        **CASES["qwen3"].options,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
)


@torch.inference_mode()
def test_gpt_oss_without_its_experts(tmp_path):
    theirs, ids = saved(GPT_OSS, tmp_path), tokens(2, SEQLEN)
    with pytest.raises(ValueError, match=r"num_local_experts \(2\): a mixture of experts"):
        from_hf(tmp_path)
    ours = from_hf(tmp_path, strict=False)
    for mine, other in zip(ours.transformer.layers, theirs.model.layers):
        assert torch.equal(mine.mixer.sinks, other.self_attn.sinks) and mine.mixer.sinks.all()
        mine.mlp.fc2.weight.zero_()
        other.mlp.forward = lambda x: (torch.zeros_like(x), None)
    expected = theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
@torch.inference_mode()
def test_attention_of_gpt_oss(layer, tmp_path):
    """A layer with a window and one without: sinks, biases, YaRN without truncation."""
    theirs = saved(GPT_OSS, tmp_path)
    ours = from_hf(tmp_path, strict=False).transformer.layers[layer].mixer
    other = theirs.model.layers[layer].self_attn
    x = torch.randn(2, SEQLEN, 64, generator=torch.Generator().manual_seed(2))
    distance = torch.arange(SEQLEN)[:, None] - torch.arange(SEQLEN)
    seen = (distance >= 0) & (distance < (WINDOW if layer == 0 else SEQLEN))
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
    positions = theirs.model.rotary_emb(x, torch.arange(SEQLEN)[None])
    expected, _ = other(x, position_embeddings=positions, attention_mask=mask)
    torch.testing.assert_close(ours(x), expected, atol=2e-5, rtol=2e-5)


_IMAGES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
           "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip


@pytest.mark.parametrize("names", ["of transformers 4", "of transformers 5"])
@torch.inference_mode()
def test_text_model_of_gemma3(names, tmp_path):
    text = CASES["gemma3"].options
    config = transformers.Gemma3Config(
        text_config=text, vision_config=_IMAGES, mm_tokens_per_image=4, image_token_index=95,
        boi_token_index=93, eoi_token_index=94,
    )  # fmt: skip
    theirs, ids = transformers.Gemma3ForConditionalGeneration(config).eval(), tokens(2, SEQLEN)
    ids[ids > 92] = 3
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old, new = "language_model.model.", "model.language_model."
    given, wanted = (old, new) if names.endswith("5") else (new, old)
    weights = {name.replace(given, wanted): x for name, x in load_file(file).items()}
    assert any(name.startswith(wanted) for name in weights)
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"vision_config .* the part that reads images is not"):
        from_hf(tmp_path)
    ours = from_hf(tmp_path, strict=False)
    expected = theirs(ids).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="'gemma3' is not written: the part that reads images"):
        to_hf(ours, tmp_path / "again")


def test_missing_weights_without_strict_are_random(tmp_path):
    saved(CASES["qwen3"], tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    taken = weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, file)
    torch.manual_seed(3)
    model = from_hf(tmp_path, strict=False)
    layers = model.transformer.layers
    assert 0.001 < layers[1].mlp.fc2.weight.std() < 0.05  # as a new model has it
    assert torch.equal(layers[0].mlp.fc2.weight, weights["model.layers.0.mlp.down_proj.weight"])
    assert taken.std() > 0.1


def test_documentation_has_all_model_types():
    from flash_attn.models._hf_defaults import DEFAULTS

    text = (ROOT / "docs" / "models.md").read_text().split("<!-- model types -->")[1]
    table = text.strip().split("\n\n")[0].splitlines()[2:]
    named = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(DEFAULTS)


@torch.inference_mode()
def test_from_pretrained_converts_the_same(tmp_path):
    saved(CASES["gemma2"], tmp_path)
    model = from_hf(tmp_path)
    again = GPTLMHeadModel.from_pretrained(tmp_path, model.config)
    assert torch.equal(again.eval()(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
