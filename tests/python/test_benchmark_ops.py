"""benchmarks/benchmark_ops.py, on a tiny case."""

from __future__ import annotations

import csv

import pytest
import torch
from scripts import ROOT, import_script

benchmark = import_script(ROOT / "benchmarks" / "benchmark_ops.py")


def of_sqrt(dtype):
    x = benchmark.normal(dtype, 50, 40).abs() + 1
    shape, moved = "50x40", 2 * x.nbytes
    yield from benchmark.both_directions(torch.sqrt, lambda x: x**0.5, (x,), shape, moved, moved)


def test_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "OPERATORS", {"sqrt": of_sqrt})
    benchmark.main(["--dtype", "float32", "--case-seconds", "0", "--out", str(tmp_path)])
    text = (tmp_path / "ops.csv").read_text()
    assert capsys.readouterr().out.splitlines() == text.splitlines()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    assert {(row["operator"], row["shape"], row["dtype"]) for row in rows} == {
        ("sqrt", "50x40", "float32")
    }
    assert all(float(row["ours_ms"]) >= 0 and row["compiled_ms"] == "" for row in rows)


@pytest.mark.parametrize("name", benchmark.OPERATORS)
def test_ours_computes_what_eager_does(name, monkeypatch):
    """The first case of each: the comparison is of equals."""
    small = {32768: 50, 8192: 20, 4096: 32, 2048: 10, 1024: 40, 16: 3}
    made = benchmark.normal
    monkeypatch.setattr(
        benchmark, "normal", lambda dtype, *shape: made(dtype, *(small.get(n, n) for n in shape))
    )
    case = next(benchmark.OPERATORS[name](torch.float32))
    torch.testing.assert_close(case.ours(), case.eager())
