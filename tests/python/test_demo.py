"""The demo, small."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import training_cases  # noqa: F401  makes training importable


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share."""
    torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch, demo_modules):
    """The demo as a module, its model and batches made small."""
    import train_text

    compose = train_text.compose_settings
    sizes = ["model.n_layer=2", "model.n_embd=64", "model.n_head=2", "data.seqlen=64",
             "trainer.evaluate_batches=4", "trainer.peak_tflops=1"]  # fmt: skip
    monkeypatch.setattr(train_text, "compose_settings", lambda lines: compose([*lines, *sizes]))
    yield train_text
    if dist.is_initialized():
        dist.destroy_process_group()


def test_demo_learns_generates_alike_and_reports(small, tmp_path, capsys):
    trainer, history = small.train_for(0.05, "float32", tmp_path)
    assert len(history) >= 20
    assert history[0]["loss"] == pytest.approx(math.log(256), abs=0.1)
    last = [entry["loss"] for entry in history[-5:]]
    assert sum(last) / len(last) < 4.2
    assert trainer.last["validation_loss"] < 4.2
    tokens = trainer.dataset.header.num_tokens
    assert tokens > 1_000_000
    model = trainer.model.model.eval()
    facts = small.show_generation(model, trainer.corpus.tokenizer)
    assert "equal token by token" in capsys.readouterr().out
    report = {
        **facts, "machine": "this one", "parameters": trainer.num_parameters, "precision": "fp32",
        "steps": len(history), "bytes_per_second": 1.0, "first_loss": history[0]["loss"],
        "training_loss": last[-1], "validation_loss": trainer.last["validation_loss"],
        "attention": [], "history": history,
    }  # fmt: skip
    small.write_report(tmp_path, report)
    assert (tmp_path / "report.md").read_text().startswith("Machine: this one")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_notices_generation_that_differs(small, monkeypatch, tmp_path):
    from training.model import make_model
    from training.tokenizer import ByteTokenizer

    model = make_model(small.settings_for(tmp_path).model, ByteTokenizer()).eval()
    other = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: (other(*a, **k) + 1) % 256)
    with pytest.raises(SystemExit, match="differ at token 0"):
        small.show_generation(model, ByteTokenizer())
