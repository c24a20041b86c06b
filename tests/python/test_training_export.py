"""What a run leaves is of use: from_hf, transformers and the examples load it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from scripts import ROOT
from test_training_models import LLAMA, finetune, hugging_face_folder  # noqa: F401  a fixture
from training_cases import environment, run_here

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share; run_here takes one."""


def logits_of(trainer, tokens):
    with torch.no_grad(), trainer.averaged():
        model = trainer.model.model.eval()
        return model(tokens).logits[..., : model.config.vocab_size]


OWN = {"model__activation_function": "sqrelu", "model__n_positions": 0,
       "model__rotary_emb_fraction": 1.0, "model__pad_vocab_size_multiple": 48,
       "data__tokenizer": "bpe", "data__vocab_size": 300}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"model": "gpt2-124m"}),
        ("mistral", {**LLAMA, "trainer__ema_decay": 0.5}),
        ("qwen3", {**LLAMA, "model__qk_norm": True}),
        ("flash_attn_gpt", OWN),
        ("flash_attn_gpt", {**OWN, "model__tie_word_embeddings": False}),
    ],
)
def test_new_model_is_loaded_and_generates(kind, changes, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flash_attn.models import from_hf

    trainer = run_here(tmp_path, trainer__max_steps=8, **changes)
    folder = tmp_path / "run" / "model"
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    tokens = torch.stack([trainer.dataset[i] for i in range(3)])[:, :12]
    expected = logits_of(trainer, tokens)
    model = from_hf(folder)
    vocab_size = trainer.corpus.tokenizer.vocab_size
    assert model.lm_head.weight.shape[0] == vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    out = model.generate(input_ids=tokens[:1, :4], max_length=8, top_k=1)
    assert out.shape[1] == 8

    if kind != "flash_attn_gpt":  # the same by transformers' own model
        theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys"))
        with torch.no_grad():
            actual = theirs.eval()(tokens).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = trainer.corpus.tokenizer.encode_batch(["two three é"])[0].tolist()
        assert tokenizer("two three é")["input_ids"] == ids
        assert tokenizer.eos_token_id == trainer.corpus.tokenizer.end_of_text


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_stored_tokenizer_is_that_of_the_run(tokenizer, tmp_path):
    from tokenizers import Tokenizer

    changes = {"data__tokenizer": tokenizer, "data__vocab_size": 300}
    own = run_here(tmp_path, trainer__max_steps=2, **changes).corpus.tokenizer
    stored = Tokenizer.from_file(str(tmp_path / "run" / "model" / "tokenizer.json"))
    assert stored.get_vocab_size() == own.vocab_size
    for text in ("one two", "  a\tb\n\r", "Ā ÿ € 漢字 🙂", "\x01\x7f\xa0\xad"):
        ids = own.encode_batch([text])[0].tolist()
        assert stored.encode(text).ids == ids
        assert stored.decode(ids, skip_special_tokens=False) == text


def test_example_writes_with_what_was_trained(tmp_path):
    run_here(tmp_path, trainer__max_steps=4, **OWN)
    line = [sys.executable, str(ROOT / "examples" / "inference" / "generate.py"),
            str(tmp_path / "run" / "model"), "--prompt", "one two"]  # fmt: skip
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "one two" in done.stdout


def test_fine_tuned_model_is_of_its_folders_kind(hugging_face_folder, tmp_path):  # noqa: F811
    from transformers import LlamaForCausalLM

    from flash_attn.models import from_hf

    trainer = finetune(
        tmp_path, hugging_face_folder, "flash_attn", "Wqkv", model__lora__rank=0,
        trainer__max_steps=4,
    )  # fmt: skip
    tokens = torch.stack([trainer.dataset[i] for i in range(3)])
    expected = logits_of(trainer, tokens)
    folder = tmp_path / "run" / "model"
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(from_hf(folder)(tokens).logits, expected)
    stored = (folder / "tokenizer.json").read_bytes()
    assert stored == (hugging_face_folder / "tokenizer.json").read_bytes()


def test_head_that_is_no_longer_the_embedding_is_not_dropped(tmp_path):
    from flash_attn.models import to_hf
    from flash_attn.models._hf_fields import fields_of

    model = run_here(tmp_path, trainer__max_steps=2).model.model
    state = dict(model.state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight must be the word embeddings"):
        to_hf(model, tmp_path / "x", config=fields_of(model.config, 16), state_dict=state)
    assert not (tmp_path / "x").exists()


def test_adapter_of_a_converted_model_is_loaded_and_merged(hugging_face_folder, tmp_path, caplog):  # noqa: F811
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from flash_attn.models import from_hf, to_hf

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*renamed")
        trainer = finetune(
            tmp_path, hugging_face_folder, "flash_attn", "Wqkv,out_proj", trainer__max_steps=4
        )
    assert "instantiate a model of type" not in caplog.text
    folder = tmp_path / "run" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(hugging_face_folder)
    tokens = torch.stack([trainer.dataset[i] for i in range(3)])
    expected = logits_of(trainer, tokens)
    plain = from_hf(hugging_face_folder)
    adapted = PeftModel.from_pretrained(from_hf(hugging_face_folder), folder).eval()
    to_hf(adapted.merge_and_unload(), tmp_path / "merged")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (plain(tokens).logits - expected).abs().max() > 1e-2
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)
