"""The Python blocks of the pages about models run as typed, in a folder that has tiny models by the
names that the pages use."""

from __future__ import annotations

import ast
import builtins
import re
import socket

import pytest
import torch
import torch.distributed as dist
import transformers
from scripts import ROOT, import_script
from test_models_formats import meta_model, write_meta

PAGES = [
    "README.md",
    "docs/models.md",
    "docs/generation.md",
    "docs/distributed.md",
    "docs/flash_attention_3.md",
    "docs/serving.md",
]
TEXT = "Once upon a time there was\na reader of lines.\n" * 60
TOO_LARGE = ("VisionTransformer(",)  # 86 million parameters; the conversion has tests of its own


def blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "README.md":
        text = re.search(r"^## Models$.*?^## ", text, re.MULTILINE | re.DOTALL)[0]
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


BLOCKS = [
    pytest.param(block, id=f"{page}-{i}") for page in PAGES for i, block in enumerate(blocks(page))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Qwen3-*: tiny models of Hugging Face with one tokenizer; a BERT; a Llama in Meta's format."""
    folder = tmp_path_factory.mktemp("pages")
    make = import_script(ROOT / "examples" / "inference" / "tiny_checkpoint.py").make_checkpoint
    for name, layers in (("Qwen3-1.7B", 2), ("Qwen3-0.6B", 1)):
        make(folder / name, layers=layers, width=64, seconds=0.0, text=TEXT)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    bert = transformers.BertConfig(num_hidden_layers=2, **sizes)
    transformers.BertForPreTraining(bert).save_pretrained(folder / "bert-base-uncased")
    (folder / "llama").mkdir()
    write_meta(folder / "llama" / "7B", meta_model(), by_columns=False)
    return folder


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells a process that is alone."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def undefined(block):
    """Names that a block reads and does not make."""
    nodes = list(ast.walk(ast.parse(block)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    made |= {
        (alias.asname or alias.name).split(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return {node.id for node in names} - made - set(dir(builtins))


def imports(block):
    tree = ast.parse(block)
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return ast.unparse(tree)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs_as_typed(block, folder, one_process, restore_threads, monkeypatch):
    assert undefined(block) == set()
    torch.set_num_threads(1)
    monkeypatch.chdir(folder)
    is_large = any(call in block for call in TOO_LARGE)
    exec(imports(block) if is_large else block, {"__name__": "block"})


def test_pages_have_blocks():
    assert [len(blocks(page)) for page in PAGES] == [1, 5, 3, 2, 2, 2]
    assert undefined("import a.b\nx = a.c(y)\nprint([z for z in x])") == {"y"}
    assert undefined("def f(x):\n    return x + y\nf(1)") == {"y"}
