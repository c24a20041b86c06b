"""What is trained: new models, their text and their folders, and Hugging Face's with LoRA."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from training_cases import rows, run_here, write_texts

from training.settings import SettingError


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share; run_here takes one."""


LLAMA = {
    "model": "llama-tiny",
    "model__n_layer": 2,
    "model__n_embd": 32,
    "model__n_head": 2,
    "model__n_head_kv": 1,
    "model__n_inner": 48,
    "model__n_positions": 0,
    "model__rotary_emb_fraction": 1.0,
    "model__tie_word_embeddings": False,
}


def test_llama_shape_learns_writes_text_and_leaves_a_folder(tmp_path):
    from flash_attn.models import from_hf

    samples = "{_target_: training.callbacks.Samples, prompt: 'one two ', tokens: 24, top_k: 1}"
    trainer = run_here(tmp_path, trainer__max_steps=60, trainer__evaluate_every=30, **LLAMA,
                       **{"+callbacks__samples": samples, "trainer__ema_decay": 0.5})  # fmt: skip
    assert trainer.last["loss"] < 2.0
    text = (tmp_path / "run" / "samples.txt").read_text()
    assert text.startswith("step 30\none two ")
    assert text.split("step 60\n")[1].startswith("one two ")

    model = from_hf(tmp_path / "run" / "model")
    tokens = torch.stack([trainer.dataset[i] for i in range(3)])
    with torch.no_grad(), trainer.averaged():
        expected = trainer.model.model.eval()(tokens).logits
        actual = model(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    """A Llama of transformers with random weights, and a tokenizer of the texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("llama")
    write_texts(folder / "texts")
    texts = (path.read_text() for path in sorted((folder / "texts").iterdir()))
    train_bpe(texts, 300, "<|endoftext|>", folder / "tokenizer.json")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip
    model.save_pretrained(folder)
    return folder


def finetune(tmp_path, folder, library, targets, **changes):
    return run_here(tmp_path, **{
        "model": "pretrained", "model__pretrained": str(folder), "model__library": library,
        "model__lora__rank": 4, "model__lora__target_modules": f"[{targets}]",
        "data__tokenizer": "folder", "data__tokenizer_folder": str(folder), "data__seqlen": 8,
        "trainer__max_steps": 20, "trainer__checkpoint_every": 10, "optimizer__lr": 0.02,
        "data__hold_out": 0, **changes,
    })  # fmt: skip


def test_lora_trains_its_adapter_alone_and_peft_loads_it(hugging_face_folder, tmp_path):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    trainer = finetune(tmp_path, hugging_face_folder, "transformers", "q_proj,v_proj,o_proj")
    losses = [float(loss) for (loss,) in rows(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0] - 0.3
    original = LlamaForCausalLM.from_pretrained(hugging_face_folder).eval()
    trained = dict(trainer.model.named_parameters())
    for name, parameter in original.named_parameters():
        candidates = [n for n in trained if n.replace("base_layer.", "").endswith(name)]
        assert len(candidates) == 1
        assert torch.equal(trained[candidates[0]], parameter)
    manifest = tmp_path / "run" / "checkpoints" / "step-00000020" / "manifest.json"
    size, _ = json.loads(manifest.read_text())["files"]["__0_0.distcp"]
    assert size < 4 * sum(parameter.numel() for parameter in original.parameters())

    tokens = torch.stack([trainer.dataset[i] for i in range(3)])
    with torch.no_grad():
        plain = original(tokens).logits
        expected = trainer.model.model.eval()(tokens).logits
        adapted = PeftModel.from_pretrained(original, tmp_path / "run" / "adapter").eval()
        actual = adapted(tokens).logits
    assert (actual - plain).abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_lora_on_a_converted_model(hugging_face_folder, tmp_path):
    from peft import PeftModel

    from flash_attn.models import from_hf

    trainer = finetune(tmp_path, hugging_face_folder, "flash_attn", "Wqkv,out_proj,fc1")
    losses = [float(loss) for (loss,) in rows(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0] - 0.3
    original = from_hf(hugging_face_folder, dtype=torch.float32)
    tokens = torch.stack([trainer.dataset[i] for i in range(3)])
    with torch.no_grad():
        expected = trainer.model.model.eval()(tokens).logits
        adapted = PeftModel.from_pretrained(original, tmp_path / "run" / "adapter").eval()
        torch.testing.assert_close(adapted(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_all_weights_of_a_folder_can_be_trained(hugging_face_folder, tmp_path):
    from transformers import LlamaForCausalLM

    trainer = finetune(tmp_path, hugging_face_folder, "transformers", "x", model__lora__rank=0)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    for name, parameter in trainer.model.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_lora_goes_on_from_its_checkpoint(hugging_face_folder, tmp_path):
    options = {"scheduler__name": "constant", "model__lora__dropout": 0.1}
    call = (tmp_path, hugging_face_folder, "transformers", "q_proj")
    finetune(*call, trainer__max_steps=10, **options)
    finetune(*call, **options)
    in_parts = rows(tmp_path / "run", "step", "loss")
    finetune(*call, trainer__resume="never", **options)
    assert rows(tmp_path / "run", "step", "loss") == in_parts


def test_lora_of_unknown_modules_is_refused(hugging_face_folder, tmp_path):
    sentence = r"model.lora.target_modules must be names of .*, got \['Wqkv'\]"
    with pytest.raises(SettingError, match=sentence):
        finetune(tmp_path, hugging_face_folder, "transformers", "Wqkv")


def test_tokenizer_larger_than_the_model_is_refused(hugging_face_folder, tmp_path):
    config = json.loads((hugging_face_folder / "tokenizer.json").read_text())
    larger = tmp_path / "larger"
    larger.mkdir()
    for i in range(400):
        config["added_tokens"].append({
            "id": 300 + i, "content": f"<{i}>", "special": True, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False,
        })  # fmt: skip
    (larger / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match=r"model.pretrained has a vocabulary of 300 tokens"):
        finetune(tmp_path, hugging_face_folder, "transformers", "q_proj",
                 data__tokenizer_folder=str(larger))  # fmt: skip


def test_pretrained_model_of_an_unknown_kind_is_a_sentence(hugging_face_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(hugging_face_folder, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "mixtral"}))
    with pytest.raises(SettingError, match=r"got .*'mixtral'.*; model\.library=transformers takes"):
        finetune(tmp_path, folder, "flash_attn", "Wqkv")
