"""The benchmark of models, small."""

from __future__ import annotations

import csv

import pytest
import torch
from scripts import ROOT, forget_modules, import_script

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(restore_threads):
    torch.set_num_threads(1)
    yield import_script(BENCHMARKS / "benchmark_models.py")
    forget_modules(BENCHMARKS)


def test_table(benchmark, tmp_path, capsys):
    sizes = ["--batch", "1", "2", "--new-tokens", "3", "--train-batch", "1", "--seqlen", "8"]
    sizes += ["--clock", "cpu"]
    benchmark.main([*sizes, "--case-seconds", "0.01", "--out", str(tmp_path)])
    with (tmp_path / "models.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row) for row in rows] == [benchmark.COLUMNS] * 6
    assert [(row["shape"], row["op"], row["batch"]) for row in rows] == [
        (shape, op, batch)
        for shape in ("llama", "gpt2")
        for op, batch in (("decode", "1"), ("decode", "2"), ("train", "1"))
    ]
    for row in rows:
        ours, theirs = float(row["ours"]), float(row["transformers"])
        assert ours > 0 and theirs > 0
        assert float(row["ratio"]) == pytest.approx(ours / theirs, rel=0.05, abs=0.01)
    assert capsys.readouterr().out.startswith(",".join(benchmark.COLUMNS))


def test_models_that_differ_are_not_compared(benchmark):
    """One weight less, and there is no figure."""
    ours, theirs = benchmark.models_of("llama", torch.float32)
    with torch.no_grad():
        ours.transformer.layers[1].mlp.fc2.weight.zero_()
    with pytest.raises(AssertionError, match="the models are not the same"):
        benchmark.decoding(ours, theirs, 1, 2)
