"""Folders that from_hf refuses: damaged, of other models, or contradicting themselves."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hf_cases import CASES, edit_config, saved, tokens
from safetensors.torch import load_file, save_file

from flash_attn.models import from_hf


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a few models, saved once."""
    made = {}
    for name in ("qwen3", "gemma2", "qwen3, biases, tied", "phi3"):
        made[name] = tmp_path_factory.mktemp("there")
        saved(CASES[name], made[name])
    return made


@pytest.fixture
def qwen3(folders, tmp_path):
    return copied(folders["qwen3"], tmp_path)


def copied(folder, tmp_path):
    """A copy of a folder, to damage."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


CONFIGS = {
    "a kind that is unknown": (
        "qwen3",
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        r"model_type must be one of .*llama.*qwen3.*, got 'mixtral' \(architectures \['Mixtral",
    ),
    "no kind": ("qwen3", {"model_type": None, "architectures": ...}, "model_type .* got None"),
    "experts": (
        "qwen3", {"model_type": "qwen3_moe", "num_experts": 8}, "model_type .* got 'qwen3_moe'",
    ),
    "scaling, transformers 5": (
        "qwen3",
        {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}},
        r"rope_parameters\['rope_type'\] must be one of default.*longrope, got 'ntk'",
    ),
    "scaling, transformers 4": (
        "qwen3",
        {"rope_parameters": None, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}},
        r"rope_scaling\['rope_type'\] must be .* got 'mrope'",
    ),
    "scaling, a list": ("qwen3", {"rope_scaling": [2]}, r"rope_scaling must be an object .*\[2\]"),
    "scaling, incomplete": (
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}},
        r"rope_type 'yarn'|'factor'\] must be a positive number, got '4'",
    ),
    "scaling, half a pair": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        r"short_factor'\] must have a number for each of 8 pairs",
    ),
    "activation": ("qwen3", {"hidden_act": "mish"}, "qwen3_config.hidden_act must be .* 'mish'"),
    "heads": ("qwen3", {"num_key_value_heads": 3}, r"n_head \(4\) must be a multiple of .*\(3\)"),
    "a size that is text": ("gemma2", {"hidden_size": "64"}, "hidden_size must be int, got '64'"),
    "no size": ("gemma2", {"num_hidden_layers": ...}, "num_hidden_layers must be int, got None"),
    "a size that is negative": ("qwen3", {"hidden_size": -64}, "must be a positive int, got -64"),
    "a flag that is a number": (
        "qwen3", {"attention_bias": 1}, "attention_bias must be bool, got 1",
    ),
    "kinds of layers": (
        "gemma2",
        {"layer_types": ["chunked_attention"] * 4},
        "gemma2_config.layer_types must be a list of .*chunked_attention",
    ),
    "kinds of layers, another number": (
        "gemma2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 2},
        "layer_types must have an entry for each of 4 layers, got 5",
    ),
    "no window": (
        "gemma2", {"sliding_window": ...}, "gemma2_config.sliding_window must be a number .* None",
    ),
    "both directions": (
        "gemma2",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention must be False, got True",
    ),
    "norms of each head": (
        "qwen3",
        {"model_type": "stablelm", "qk_layernorm": True},
        "stablelm_config.qk_layernorm must be False, got True",
    ),
    "layers without rotary embedding": (
        "qwen3",
        {"model_type": "smollm3", "no_rope_layers": [1, 0]},
        r"no_rope_layers must be a list of 4 flags, got \[1, 0\]",
    ),
    "quantized": (
        "qwen3",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"quantization_config \(quant_method 'gptq'\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, folders, tmp_path):
    base, fields, sentence = CONFIGS[name]
    folder = copied(folders[base], tmp_path)
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=sentence):
        from_hf(folder)


def test_kind_by_architecture(qwen3):
    edit_config(qwen3, model_type=None)
    assert from_hf(qwen3).config.qk_norm


def without(name):
    def damage(weights):
        del weights[name]

    return damage


def with_more(weights):
    weights["model.layers.0.self_attn.sinks"] = torch.zeros(4)


def of_another_size(weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 64)


WEIGHTS = {
    "missing": (without("model.norm.weight"), r"model\.norm\.weight is missing"),
    "one of three missing": (
        without("model.layers.2.self_attn.k_proj.weight"),
        r"model\.layers\.2\.self_attn\.k_proj\.weight is missing$",
    ),
    "head missing": (without("lm_head.weight"), r"lm_head\.weight is missing"),
    "unknown": (with_more, r"model\.layers\.0\.self_attn\.sinks is unknown"),
    "shape": (
        of_another_size,
        r"model\.layers\.1\.mlp\.up_proj\.weight has shape \(80, 64\), by config.json it is "
        r"\(88, 64\)$",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, qwen3):
    damage, sentence = WEIGHTS[name]
    weights = load_file(qwen3 / "model.safetensors")
    damage(weights)
    save_file(weights, qwen3 / "model.safetensors")
    with pytest.raises(RuntimeError, match=sentence):
        from_hf(qwen3)
    if name == "shape":
        with pytest.raises(RuntimeError, match=sentence):
            from_hf(qwen3, strict=False)


def test_tied_weights_that_differ(folders, tmp_path):
    folder = copied(folders["qwen3, biases, tied"], tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    model = from_hf(folder)
    assert model.lm_head.weight is model.transformer.embeddings.word_embeddings.weight
    weights["lm_head.weight"][5, 5] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        from_hf(folder)


def test_more_problems_than_a_message_has(qwen3):
    edit_config(qwen3, num_hidden_layers=3)
    with pytest.raises(RuntimeError, match=r"layers\.3\..* is unknown; .* and 3 more"):
        from_hf(qwen3)


def test_no_dtype(qwen3):
    for dtype in ("half", torch.int8):
        with pytest.raises(ValueError, match=rf"dtype must be one of float32, .* got {dtype}"):
            from_hf(qwen3, dtype=dtype)
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype or its name, got int"):
        from_hf(qwen3, dtype=16)


def test_no_folder(qwen3, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder$"):
        from_hf(tmp_path / "nowhere")
    how = "first: hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"
    with pytest.raises(FileNotFoundError, match=f"Qwen/Qwen3-0.6B is not a folder; .*{how}$"):
        from_hf("Qwen/Qwen3-0.6B")
    (qwen3 / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors"):
        from_hf(qwen3)
    (qwen3 / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        from_hf(qwen3)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_no_json(name, qwen3):
    (qwen3 / name).write_text('{"model_type": "qwen3",')
    with pytest.raises(ValueError, match=rf"{name} is not JSON"):
        from_hf(qwen3)
    (qwen3 / name).write_text("[]")
    with pytest.raises(ValueError, match=rf"{name} must have an object, got \[\]"):
        from_hf(qwen3)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_file(keep, qwen3):
    path = qwen3 / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole checkpoint"):
        from_hf(qwen3)


def test_shards(tmp_path):
    saved(CASES["qwen3"], tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"]["model.norm.weight"]
    shard = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        from_hf(tmp_path)
    (tmp_path / file).write_bytes(shard[:-1])
    with pytest.raises(ValueError, match=f"{file} is not a whole checkpoint"):
        from_hf(tmp_path)
    (tmp_path / file).write_bytes(shard)
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    from_hf(tmp_path)  # it is in a file that is read anyway
    content["weight_map"]["model.norm.weight"] = next(
        other for other in content["weight_map"].values() if other != file
    )
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lacks 'model\.norm\.weight'"):
        from_hf(tmp_path)


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
import torch
from flash_attn.models import from_hf, to_hf
model = from_hf(sys.argv[1])
assert "sympy" not in sys.modules  # seconds
to_hf(model, sys.argv[2])
assert model.config.eos_token_id == 2
with torch.inference_mode():
    tokens = model.generate(torch.tensor([[5, 6, 7]]), None, max_new_tokens=8)
print(tokens[0].tolist())
"""


def test_without_transformers(qwen3, tmp_path):
    """Neither its configurations nor its models are needed."""
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, qwen3, tmp_path / "again"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with torch.inference_mode():
        expected = from_hf(qwen3).generate(torch.tensor([[5, 6, 7]]), None, max_new_tokens=8)
    assert json.loads(text) == expected[0].tolist()
    logits = [from_hf(f)(tokens(1, 8)).logits for f in (qwen3, tmp_path / "again")]
    assert torch.equal(*logits)
