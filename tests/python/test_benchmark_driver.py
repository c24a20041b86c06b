"""The benchmark driver, the memory measurement and the demo, on tiny cases."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
EXAMPLES = ROOT / "examples"
SHAPE = ["--seqlen", "65", "--nheads", "4", "--headdim", "16"]


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share."""
    torch.set_num_threads(1)


def _forget_modules(directory):
    for path in directory.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def benchmark_modules(monkeypatch):
    """Makes the benchmark's own modules importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    _forget_modules(BENCHMARKS)


@pytest.fixture
def demo_modules(monkeypatch, benchmark_modules):
    """Makes the demo's own modules importable."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    _forget_modules(EXAMPLES)


def run_script(name, *arguments):
    """Runs one of the repository's scripts on one thread."""
    command = [sys.executable, str(ROOT / name), *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=one_thread)


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_driver_measures_every_operation_and_checks_it(tmp_path):
    arguments = [*SHAPE, "--nheads-k", "2", "--batch", "2", "--budget", "0.05", "--refcheck"]
    dtypes = ["--dtype", "float32", "bfloat16"]
    operations = ["--op", "fwd", "bwd", "fwd_bwd", "decode", "varlen"]
    finished = run_script(
        "benchmarks/benchmark_attn.py", *operations, *dtypes, *arguments, "--out", str(tmp_path)
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = read_rows(tmp_path / "attention.csv")
    # Four operations, full and causal, and decode, which has one mask; two dtypes, three peers.
    assert len(rows) == (4 * 2 + 1) * 2 * 3
    assert {row["peer"] for row in rows} == {"flash_attn", "sdpa", "plain"}
    for row in rows:
        assert float(row["median_ms"]) >= float(row["min_ms"]) > 0
        assert float(row["error_ratio"]) <= 1 or row["peer"] != "flash_attn"
        assert row["peer"] != "sdpa" or float(row["ratio_to_sdpa"]) == 1
        assert row["torch"] == torch.__version__


def test_plain_attention_stops_where_its_scores_would_not_fit(tmp_path):
    limit = ["--max-plain-gib", "0.00001", "--peers", "flash_attn", "plain", "--budget", "0.05"]
    finished = run_script(
        "benchmarks/benchmark_attn.py", "--op", "fwd", *SHAPE, *limit, "--out", str(tmp_path)
    )
    assert finished.returncode == 0, finished.stderr
    assert {row["peer"] for row in read_rows(tmp_path / "attention.csv")} == {"flash_attn"}


def test_memory_of_plain_attention_is_seen(tmp_path):
    """Plain attention keeps several (1024, 1024) fp32 matrices for each of 4 heads."""
    peers = ["--peers", "flash_attn", "plain", "--dtype", "float32"]
    shape = ["--seqlen", "1024", "--nheads", "4", "--headdim", "16"]
    finished = run_script("benchmarks/memory.py", *shape, *peers, "--out", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    extra = {row["peer"]: float(row["extra_mib"]) for row in read_rows(tmp_path / "memory.csv")}
    assert extra["plain"] > 2 * 16
    assert extra["flash_attn"] < 16


@pytest.mark.parametrize("batch", [1, 3])
def test_demo_generates_alike_with_and_without_cache(demo_modules, batch):
    from gpt import GPT, GPTConfig, KVCache, generate, generate_without_cache

    torch.manual_seed(0)
    model = GPT(GPTConfig(num_layers=2, width=64, num_heads=2, max_seqlen=64))
    for parameter in model.parameters():  # some start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    prompt = torch.randint(256, (batch, 11))
    assert torch.equal(generate(model, prompt, 30), generate_without_cache(model, prompt, 30))
    with torch.inference_mode():
        cache = KVCache.empty(model.config, batch)
        parts = [model(part, cache) for part in prompt.split([5, 1, 5], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(prompt), rtol=0, atol=1e-4)


def test_demo_learns(demo_modules):
    from corpus import load_corpus, random_batch
    from gpt import GPT, GPTConfig
    from train_text import loss_of

    text, held_out = load_corpus()
    assert len(text) > len(held_out) > 10_000
    torch.manual_seed(0)
    model = GPT(GPTConfig(num_layers=1, width=32, num_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        batch = random_batch(text, 4, 64, torch.Generator().manual_seed(step))
        loss = loss_of(model, *batch, torch.float32)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(256), abs=1e-3)
    assert losses[-1] < 3.8


@pytest.mark.parametrize("op", ["fwd", "bwd", "varlen"])
def test_refcheck_finds_a_wrong_result(benchmark_modules, op):
    from cases import Case, make_inputs
    from peers import PEERS
    from refcheck import RefCheck

    case = Case(op, "float32", 2, 33, 33, 4, 2, 16, 24, causal=True)
    inputs = make_inputs(case)
    check = RefCheck(case, inputs)
    right = PEERS["flash_attn"](case, inputs)()
    assert check.ratio(right) <= 1
    wrong = [x.clone() for x in right]
    wrong[-1].view(-1)[7] += 0.01
    assert check.ratio(wrong) > 1
    wrong[-1].view(-1)[7] = torch.nan
    assert check.ratio(wrong) == float("inf")


def test_operations_are_counted(benchmark_modules):
    from cases import Case

    def flops(op, causal):
        return Case(op, "float32", 2, 10, 10, 3, 3, 8, 4, causal).flops()

    scores = 2 * 3 * 10 * 10
    assert flops("fwd", False) == scores * 2 * (8 + 4)
    assert flops("bwd", False) == scores * 2 * (3 * 8 + 2 * 4)
    assert flops("fwd_bwd", True) == (flops("fwd", False) + flops("bwd", False)) / 2
    varlen = Case("varlen", "float32", 2, 16, 16, 1, 1, 8, 8, False)
    assert varlen.lengths() == [16, 2]
    assert varlen.flops() == (16**2 + 2**2) * 2 * 16
