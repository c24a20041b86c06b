"""Models written as folders of Hugging Face, which transformers loads bit by bit."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hf_cases import CASES, CLASSIC_CASES, edit_config, saved, tokens
from hf_ranks import RANKS, run_rank
from processes import on_processes
from safetensors.torch import load_file

from flash_attn.models import from_hf, to_hf
from flash_attn.models.gpt import GPTLMHeadModel

_ALL = {**CASES, **CLASSIC_CASES}


def weights_of(folder):
    """All tensors in a folder's safetensors files."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(file))
    return weights


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype and torch.equal(actual[name], x), name


@pytest.mark.parametrize("name", _ALL)
def test_back_again(name, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    theirs = saved(_ALL[name], there)
    to_hf(from_hf(there, pad_vocab_size_multiple=64), back)
    assert_equal(weights_of(back), weights_of(there))
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert_equal(again.state_dict(), theirs.state_dict())
    mine, other = (json.loads((folder / "config.json").read_text()) for folder in (back, there))
    assert mine == other
    ids = tokens(2, 12)
    with torch.inference_mode():
        assert torch.equal(from_hf(back)(ids).logits, from_hf(there)(ids).logits)


def test_shards(tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    saved(CASES["gemma2"], there)
    model = from_hf(there, dtype=torch.bfloat16)
    to_hf(model, back, max_shard_bytes=100_000)
    files = sorted(back.glob("model-*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 120_000
    expected = {name: x.to(torch.bfloat16) for name, x in weights_of(there).items()}
    assert_equal(weights_of(back), expected)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert_equal(again.state_dict() | expected, again.state_dict())


def test_of_a_new_model(tmp_path):
    """Of a configuration of transformers, and weights of its own."""
    theirs = transformers.Qwen3Config(**CASES["qwen3"].options)
    from flash_attn.models.qwen import qwen3_config_to_gpt2_config

    torch.manual_seed(0)
    model = GPTLMHeadModel(qwen3_config_to_gpt2_config(theirs)).eval()
    with pytest.raises(ValueError, match="config must be given"):
        to_hf(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    to_hf(model, tmp_path / "new", config=theirs)
    ids = tokens(2, 12)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    average = {name: x * 0.5 for name, x in model.state_dict().items()}
    to_hf(model, tmp_path / "average", config=theirs, state_dict=average)
    written = load_file(tmp_path / "average" / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], model.transformer.ln_f.weight * 0.5)


def test_tokens_of_generation(tmp_path):
    saved(CASES["qwen3"], tmp_path / "there")
    path = tmp_path / "there" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 7]}))
    to_hf(from_hf(tmp_path / "there"), tmp_path / "back")
    written = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [5, 7], "pad_token_id": 0}


def test_dtype_of_transformers_4(tmp_path):
    saved(CASES["qwen3"], tmp_path / "there")
    edit_config(tmp_path / "there", dtype=None, torch_dtype="float32")
    to_hf(from_hf(tmp_path / "there", dtype=torch.float16), tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["torch_dtype"] == "float16" and "dtype" not in written


def test_in_place_of_an_older_one(tmp_path):
    """Weights of the older one go, other files stay."""
    saved(CASES["mistral"], tmp_path, max_shard_size="100KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    model = from_hf(tmp_path)
    model.lm_head.weight.data.mul_(2)
    to_hf(model, tmp_path)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert torch.equal(from_hf(tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("exists", [False, True])
def test_link_to_a_folder(exists, tmp_path):
    saved(CASES["mistral"], tmp_path / "there")
    model, link, target = (
        from_hf(tmp_path / "there"),
        tmp_path / "link",
        tmp_path / "deep" / "folder",
    )
    if exists:
        target.mkdir(parents=True)
    link.symlink_to(target)
    for _ in range(2):  # empty or none, then with files
        to_hf(model, link)
        assert link.is_symlink() and (target / "model.safetensors").is_file()
        assert torch.equal(from_hf(link).lm_head.weight, model.lm_head.weight)
    assert {path.name for path in target.parent.iterdir()} == {"folder"}


def test_file_in_the_folders_place(tmp_path):
    saved(CASES["mistral"], tmp_path / "there")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"folder must be new or a folder, .*is a file"):
        to_hf(from_hf(tmp_path / "there"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}


@pytest.mark.parametrize("exists", [False, True])
def test_failure_leaves_the_folder(exists, tmp_path, monkeypatch):
    saved(CASES["qwen3"], tmp_path / "there")
    model, back = from_hf(tmp_path / "there"), tmp_path / "back"
    if exists:
        to_hf(model, back)
    before = {path.name: path.read_bytes() for path in back.glob("*")}

    def full(state_dict, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    model.lm_head.weight.data.mul_(2)
    with pytest.raises(OSError, match="No space left"):
        to_hf(model, back)
    assert {path.name: path.read_bytes() for path in back.glob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"there", *(["back"] if exists else [])}


def test_refused(tmp_path):
    saved(CASES["qwen3"], tmp_path / "there")
    back = tmp_path / "back"
    model = from_hf(tmp_path / "there", sliding_window=4)
    with pytest.raises(ValueError, match=r"config.sliding_window is 4, but None"):
        to_hf(model, back)
    model = from_hf(tmp_path / "there")
    with pytest.raises(RuntimeError, match=r"lm_head\.weight is missing"):
        weights = model.state_dict()
        del weights["lm_head.weight"]
        to_hf(model, back, state_dict=weights)
    with pytest.raises(TypeError, match="model must be a GPTLMHeadModel, got Linear"):
        to_hf(torch.nn.Linear(2, 2), back)
    with pytest.raises(TypeError, match="config must be transformers' configuration or a dict"):
        to_hf(model, back, config=3)
    with pytest.raises(ValueError, match=r"model_type must be one of .* got 'mixtral'"):
        to_hf(model, back, config={"model_type": "mixtral"})
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        to_hf(model, back, max_shard_bytes=0)
    assert not back.exists()


def test_over_processes(tmp_path):
    for name in ("gemma2", "qwen3, biases, tied", "opt"):
        saved(_ALL[name], tmp_path / name)
    on_processes(RANKS, run_rank, tmp_path)
