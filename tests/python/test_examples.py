"""The examples, small."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading

import httpx
import pytest
import torch
from scripts import ROOT, import_script

EXAMPLES = ROOT / "examples"
INFERENCE = EXAMPLES / "inference"
TEXT = "def read(self):\n    return self.lines\n\n\nclass Reader:\n    lines = []\n" * 40
PROMPT = "class Reader:\n    def"


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    torch.set_num_threads(1)


def inference(name):
    return import_script(INFERENCE / f"{name}.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of Hugging Face's layout with one tokenizer: a target and a draft."""
    make_checkpoint = inference("tiny_checkpoint").make_checkpoint
    folder = tmp_path_factory.mktemp("models")
    for name, layers in (("target", 2), ("draft", 1)):
        make_checkpoint(folder / name, layers=layers, width=64, seconds=0.0, text=TEXT)
    return folder / "target", folder / "draft"


# ---------------------------------------------------------------------------- inference


def test_generate(folders):
    """Greedy text is that of transformers."""
    from transformers import AutoModelForCausalLM

    module = inference("generate")
    checkpoint = inference("checkpoint").load(folders[0])
    options = ["--prompt", PROMPT, "--max-tokens", "24"]
    options = module.parse_arguments([*options, "--temperature", "0", "--device", "cpu"])
    out = io.StringIO()
    count = module.generate(checkpoint, options, out)
    theirs = AutoModelForCausalLM.from_pretrained(folders[0])
    ids = torch.tensor([checkpoint.tokenizer.encode(PROMPT).ids])
    mask = torch.ones_like(ids)
    tokens = theirs.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)[0]
    assert count == len(tokens) - ids.shape[1]
    assert out.getvalue() == checkpoint.tokenizer.decode(tokens.tolist()) + "\n"


def test_generate_samples_by_its_seed(folders):
    module = inference("generate")
    checkpoint = inference("checkpoint").load(folders[0])

    def text(*options):
        out = io.StringIO()
        options = ["--prompt", PROMPT, "--max-tokens", "20", "--device", "cpu", *options]
        module.generate(checkpoint, module.parse_arguments(options), out)
        return out.getvalue()

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    with pytest.raises(ValueError, match="top_p must be from 0 to 1, got 2"):
        text("--top-p", "2")
    with pytest.raises(ValueError, match="exceed the 1024 that the model"):
        text("--max-tokens", "1024")
    with pytest.raises(ValueError, match="--prompt must have at least one token, got ''"):
        text("--prompt", "")


@pytest.mark.parametrize("name", ["generate", "serve", "speculative"])
def test_programs_end_with_a_sentence(name, folders, tmp_path, monkeypatch):
    """What is wrong with a folder, a device or an option is told without a traceback."""
    module = inference(name)

    def error(*options):
        arguments = ["--target", *options] if name == "speculative" else list(options)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            module.main()
        assert isinstance(exit.value.code, str)  # which Python prints, with status 1
        return exit.value.code

    assert error(tmp_path / "nowhere") == f"{name}.py: {tmp_path / 'nowhere'} is not a folder"
    (tmp_path / "config.json").write_text("{}")
    assert error(tmp_path) == f"{name}.py: {tmp_path} has no tokenizer.json"
    if name != "speculative":
        text = error(folders[0], "--device", "cuda:99")
        assert text.startswith(f"{name}.py: device 'cuda:99' cannot be used: ")
    if name == "serve":
        assert error(folders[0], "--block-size", "0").startswith("serve.py: ")


def test_folders_that_cannot_be_loaded(folders, tmp_path):
    load = inference("checkpoint").load
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        load(tmp_path)


@pytest.mark.parametrize("lookahead", [1, 4])
def test_speculative(folders, lookahead):
    """Greedy tokens are those without a draft, and each call of the target accounts for its own."""
    module, load = inference("speculative"), inference("checkpoint").load
    target, draft = map(load, folders)
    result = module.compare(target, draft, PROMPT, 30, lookahead, top_k=1)
    assert result.drafted == result.plain
    new = len(result.plain) - len(target.tokenizer.encode(PROMPT).ids)
    assert result.calls + result.num_kept + 1 == new
    # Where one token is left there is nothing to draft.
    assert result.calls - 1 <= result.num_drafted <= result.calls * lookahead
    own = module.compare(target, load(folders[0]), PROMPT, 30, lookahead, top_k=1)  # all is kept
    assert own.num_kept == own.num_drafted > 0 and own.calls < new - 1


def test_speculative_needs_one_vocabulary(folders, tmp_path):
    module, load = inference("speculative"), inference("checkpoint").load
    make_checkpoint = inference("tiny_checkpoint").make_checkpoint
    make_checkpoint(tmp_path / "other", layers=1, width=64, seconds=0.0, text=TEXT.upper())
    with pytest.raises(ValueError, match="the draft's tokenizer has other tokens"):
        module.compare(load(folders[0]), load(tmp_path / "other"), PROMPT, 5, 2, top_k=1)


def test_server_ends_what_runs(folders):
    """The program, from its command line to SIGTERM in the middle of a stream."""
    command = [sys.executable, str(INFERENCE / "serve.py"), str(folders[0]), "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        log = []
        for line in server.stderr:
            log.append(line)
            if "running on" in line:
                break
        url = line.split("running on ")[1].split()[0]
        threading.Thread(target=lambda: log.extend(server.stderr), daemon=True).start()
        body = {"prompt": PROMPT, "max_tokens": 150, "ignore_eos": True, "stream": True}
        lines = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            for line in filter(None, response.iter_lines()):
                if not lines:
                    server.send_signal(signal.SIGTERM)
                lines.append(line)
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.wait(30) in (0, -signal.SIGTERM), "".join(log)
    finally:
        server.kill()
        server.wait()
    assert "Traceback" not in "".join(log)


# ----------------------------------------------------------------------------- training


def test_vit():
    """The shapes are what they are called, and a small model learns 24 of them by heart."""
    vit = import_script(EXAMPLES / "vit_images.py")
    images, labels = vit.draw_images(24, torch.Generator().manual_seed(0))
    assert images.shape == (24, 3, 32, 32) and set(labels.tolist()) == set(range(5))
    many, kinds = vit.draw_images(400, torch.Generator().manual_seed(1))
    filled = (many.mean(1) > 0).float().mean((1, 2))
    shares = [filled[kinds == i].mean().item() for i in range(5)]
    # Areas in squares of the radius: 3.1 and 2.9, 2.0, 1.6 and 1.8.
    order = [vit.SHAPES[i] for i in sorted(range(5), key=lambda i: -shares[i])]
    assert set(order[:2]) == {"disc", "square"} and order[2] == "ring"
    torch.manual_seed(0)
    model = vit.make_model(embed_dim=32, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert vit.accuracy(model, images, labels) > 0.9


def test_vit_runs(capsys):
    vit = import_script(EXAMPLES / "vit_images.py")
    found = vit.main(["--steps", "2", "--batch", "4", "--embed-dim", "32", "--depth", "1"])
    assert 0.0 <= found <= 1.0
    assert "accuracy on 1000 new images" in capsys.readouterr().out


def test_bert():
    """Labels follow from the words, and the unpadded pass is that of all tokens."""
    bert = import_script(EXAMPLES / "bert_classification.py")
    draw = random.Random(0)
    reviews = [bert.review(draw) for _ in range(200)]
    for text, label in reviews:
        words = text.split()
        assert label == (bool(set(words) & set(bert.GOOD)) != ("not" in words))
    assert 60 < sum(label for _, label in reviews) < 140
    encode, vocab_size = bert.word_encoder()
    tokens, mask, labels = bert.batch_of(encode, 0, 16, random.Random(1))
    assert bool((tokens[~mask] == 0).all()) and bool((tokens[mask] > 0).all())
    torch.manual_seed(0)
    model = bert.Classifier(bert.BertModel(bert.small_config(vocab_size)))
    losses = bert.train(model, lambda: (tokens, mask, labels), 40, 1e9, 1e-3)
    assert losses[-1] < 0.2 < losses[0]
    unpadded, padded, difference = bert.beside_padding(model.eval(), tokens, mask)
    assert difference < 1e-4 and unpadded > 0 and padded > 0


def test_bert_from_a_folder(tmp_path, capsys):
    """Weights of a folder are what training starts from."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertModel

    bert = import_script(EXAMPLES / "bert_classification.py")
    encode, vocab_size = bert.word_encoder()
    texts = [bert.review(random.Random(i))[0] for i in range(300)]
    words = {word: encode(word)[1] for word in " ".join(texts).split()}
    words.update({word: i for i, word in enumerate(bert.SPECIAL)})
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    config = bert.small_config(vocab_size, hidden_size=64)
    theirs = BertModel(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model, encoded = bert.load(tmp_path)
    ids = torch.tensor([encoded(texts[0])])
    assert ids[0].tolist() == encode(texts[0])
    pooled = model.eval()(ids).pooler_output
    torch.testing.assert_close(pooled, theirs(ids).pooler_output, rtol=1e-4, atol=1e-5)
    arguments = ["--folder", str(tmp_path), "--steps", "1", "--batch", "2"]
    assert 0.0 <= bert.main(arguments) <= 1.0
    assert "of the batch is padding" in capsys.readouterr().out
