"""The benchmark driver and the memory measurement, on tiny cases."""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import peer_agreement
import pytest
import torch
from backends import needs_emulator
from scripts import ROOT, forget_modules

import flash_attn

BENCHMARKS = ROOT / "benchmarks"
SHAPE = ["--seqlen", "65", "--nheads", "4", "--headdim", "16"]


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share."""
    torch.set_num_threads(1)


@pytest.fixture
def benchmark_modules(monkeypatch):
    """Makes the benchmark's own modules importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    forget_modules(BENCHMARKS)
    forget_modules(ROOT / "examples")  # text_lengths.py imports from there


def run_script(name, *arguments):
    """Runs one of the repository's scripts on one thread."""
    command = [sys.executable, str(ROOT / name), *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=one_thread)


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_driver_measures_every_operation_and_checks_it(tmp_path):
    arguments = [*SHAPE, "--nheads-k", "2", "--batch", "2", "--case-seconds", "0.05", "--refcheck"]
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
        assert row["share_of_tile_peak"] == "" or 0 < float(row["share_of_tile_peak"]) < 1


def test_plain_attention_stops_where_its_scores_would_not_fit(tmp_path):
    limit = [
        "--max-plain-gib",
        "0.00001",
        "--peers",
        "flash_attn",
        "plain",
        "--case-seconds",
        "0.05",
    ]
    finished = run_script(
        "benchmarks/benchmark_attn.py", "--op", "fwd", *SHAPE, *limit, "--out", str(tmp_path)
    )
    assert finished.returncode == 0, finished.stderr
    assert {row["peer"] for row in read_rows(tmp_path / "attention.csv")} == {"flash_attn"}


def test_memory_of_plain_attention_is_seen(tmp_path):
    """Plain attention keeps several (1024, 1024) fp32 matrices for each of 4 heads."""
    peers = ["--peers", "flash_attn", "plain", "--dtype", "float32"]
    shape = ["--seqlen", "1024", "--nheads", "4", "--headdim", "16"]
    finished = run_script("benchmarks/benchmark_memory.py", *shape, *peers, "--out", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    extra = {row["peer"]: float(row["extra_mib"]) for row in read_rows(tmp_path / "memory.csv")}
    assert extra["plain"] > 2 * 16
    assert extra["flash_attn"] < 16


@pytest.mark.parametrize("op", ["fwd", "bwd", "varlen"])
def test_refcheck_finds_a_wrong_result(benchmark_modules, op):
    from cases.case import Case, make_inputs
    from measuring.refcheck import RefCheck
    from peers.registry import PEERS

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
    from cases.case import Case

    def flops(op, causal):
        return Case(op, "float32", 2, 10, 10, 3, 3, 8, 4, causal).flops()

    scores = 2 * 3 * 10 * 10
    assert flops("fwd", False) == scores * 2 * (8 + 4)
    assert flops("bwd", False) == scores * 2 * (3 * 8 + 2 * 4)
    assert flops("fwd_bwd", True) == (flops("fwd", False) + flops("bwd", False)) / 2
    assert flops("decode", True) == flops("decode", False)
    windowed = Case("fwd", "float32", 1, 10, 10, 1, 1, 8, 8, True, window=3)
    assert windowed.scores() == 1 + 2 + 3 + 4 * 7
    assert Case("fwd", "float32", 1, 10, 10, 1, 1, 8, 8, True, window=99).scores() == 55
    varlen = Case("varlen", "float32", 2, 16, 16, 1, 1, 8, 8, False)
    assert varlen.lengths() == [16, 2]
    assert varlen.flops() == (16**2 + 2**2) * 2 * 16


def test_bytes_are_counted(benchmark_modules):
    from cases.case import Case

    fwd = Case("fwd", "bfloat16", 2, 10, 10, 4, 2, 8, 8, False).work()
    assert fwd.bytes == 2 * (2 * 10) * (4 * 16 + 2 * 16)  # q and out, k and v
    assert fwd.exps == 2 * 4 * 100
    bwd = Case("bwd", "bfloat16", 2, 10, 10, 4, 2, 8, 8, False).work()
    assert bwd.bytes == 2 * fwd.bytes  # with dout, dq, dk and dv


@pytest.mark.parametrize("page_size", [0, 1, 4, 16])
def test_decode_from_pages_is_right(benchmark_modules, page_size):
    from cases.case import Case, make_inputs
    from measuring.refcheck import RefCheck
    from peers.registry import PEERS

    case = Case("decode", "float32", 3, 1, 32, 4, 2, 16, 16, False, page_size=page_size)
    inputs = make_inputs(case)
    assert not torch.equal(inputs.k[0], inputs.k[1])
    assert RefCheck(case, inputs).ratio(PEERS["flash_attn"](case, inputs)()) <= 1


@pytest.fixture(scope="module")
def other_process():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["onednn", "openvino", "ggml", "sdpa_flash", "sdpa_math"])
def test_others_compute_the_same(other_process, name, dtype, causal):
    result = other_process.submit(peer_agreement.differences, name, dtype, causal).result()
    if isinstance(result, str):
        pytest.skip(result)
    same_mask, other_mask = result
    assert same_mask <= 1
    assert other_mask > 1


def test_samples_stand_beside_the_peak_of_the_tile_unit(benchmark_modules, monkeypatch):
    from measuring import tile_peak, timing

    rates = iter([1e9, *([2e9, 4e9] * 3)])  # the first says that there is such a unit
    monkeypatch.setattr(tile_peak, "amx_rate", lambda: next(rates))
    monkeypatch.setattr(tile_peak, "seconds", lambda run, repeats: 2.0)
    beside = tile_peak.PeakBeside()
    runs = {"one": lambda: None}
    samples = timing.take_turns(runs, {"one": 1.0}, 60.0, max_samples=3, timed=beside.seconds)
    assert samples == {"one": [2.0, 2.0, 2.0]}
    assert beside.share(runs["one"], 1.5e9) == pytest.approx(0.25)
    assert beside.share(runs["one"], 0.0) is None
    assert beside.share(print, 1.5e9) is None

    monkeypatch.setattr(tile_peak, "amx_rate", lambda: 0.0)
    without = tile_peak.PeakBeside()
    assert without.seconds(runs["one"], 1) == 2.0
    assert without.share(runs["one"], 1.5e9) is None


def test_limits_are_work_over_time(benchmark_modules):
    from cases.case import Case, make_inputs
    from measuring.timing import seconds
    from peers.limits import LIMITS
    from peers.unsupported import Unsupported

    case = Case("decode", "float32", 1, 1, 4096, 4, 4, 64, 64, False)
    inputs = make_inputs(case)
    for name, make in LIMITS.items():
        try:
            run, work = make(case, inputs)
        except Unsupported:
            assert name in ("amx_peak", "dot_peak")
            continue
        run()
        rate = max(work.flops, work.exps, work.bytes) / seconds(run) / 1e9
        assert 0.01 < rate < 1e5, name
    assert torch.tensor(1e-39) * 1 > 0, "loading the loops changed this thread's arithmetic"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 instructions")
def test_limits_of_other_cpus_compile(benchmark_modules, tmp_path):
    """This machine may have neither the instructions nor a test of them."""
    from native import build

    source = BENCHMARKS / "native" / "limits.cpp"
    command = build.command(source, tmp_path / "limits.so", "-march=sapphirerapids", "-Werror")
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_tile_instructions_are_written_in_one_place():
    """Compilers' intrinsics for them may lack that they touch memory: gcc 12's do."""
    instruction = re.compile(
        r"\b(_tile_|__tile_|ldtilecfg|tileload|tilestore|tilerelease|tilezero|tdp)"
    )
    folders = (ROOT / name for name in ("benchmarks", "csrc", "emulator", "tests/cpp", "tools"))
    sources = [path for folder in folders for path in folder.rglob("*.[chi]*") if path.is_file()]
    users = [path.name for path in sources if instruction.search(path.read_text(errors="replace"))]
    assert users == ["tile_amx.h"]


def test_a_wrong_peer_is_left_out(benchmark_modules, monkeypatch):
    from cases.case import Case
    from measuring import measure

    def wrong(case, inputs):
        return lambda: (torch.zeros_like(inputs.q),)

    monkeypatch.setitem(measure.PEERS, "onednn", wrong)
    case = Case("fwd", "float32", 1, 16, 16, 2, 2, 8, 8, False)
    budget = measure.Budget(None, 0.01, 1.0)
    result = measure.measure(case, ("flash_attn", "onednn"), budget, refcheck=False)
    assert [row["peer"] for row in result.rows] == ["flash_attn"]
    assert any("differs" in note for note in result.notes)


def test_budget_leaves_out_what_would_take_too_long(benchmark_modules):
    from cases.case import Case
    from measuring.measure import Budget

    case = Case("fwd", "float32", 1, 16, 16, 2, 2, 8, 8, False)
    longer = dataclasses.replace(case, seqlen_q=1600, seqlen_k=1600)
    budget = Budget(60.0, 1.0, 1.0)
    assert budget.suffices(longer, ("flash_attn", "sdpa"))
    budget.learn(case, "sdpa", 0.01)
    assert budget.guess(longer, "sdpa") == pytest.approx(100)
    assert "100 s" in budget.refusal(longer, "sdpa")
    assert not budget.refusal(longer, "flash_attn")
    budget.learn(case, "sdpa", 0.0015)
    assert budget.suffices(longer, ("sdpa",))
    budget.started -= 50
    assert not budget.suffices(longer, ("sdpa",))


def test_grid_writes_table_pictures_summary_and_roofline(
    tmp_path, benchmark_modules, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    import benchmark_attn
    import report
    from cases import grids

    def tiny():
        cases = [grids.case(op, "float32", 1, 64, 2, 2, 16, True) for op in grids.PASSES]
        cases.append(grids.case("decode", "bfloat16", 1, 64, 4, 2, 16, False, page_size=16))
        cases.append(grids.case("fwd", "float32", 1, 512, 2, 2, 16, True, window=32))
        ragged = {"lengths_of": "documents", "ragged": (5, 60)}
        return [*cases, grids.case("varlen", "float32", 2, 60, 2, 2, 16, True, **ragged)]

    monkeypatch.setitem(benchmark_attn.GRIDS, "quick", tiny)
    peers = ["flash_attn", "no_window", "sdpa", "fma_peak", "exp_peak", "read"]
    options = ["--quick", "--case-seconds", "0.02", "--peers", *peers, "--out", str(tmp_path)]
    assert benchmark_attn.main(options) == 0
    drawn = {"ratios.png", "others.png"}
    assert drawn <= {path.name for path in tmp_path.iterdir()}
    for name in drawn:
        (tmp_path / name).unlink()
    emulated = {"seqlen": 256, "headdim": 64, "causal": True, "million_a_second": 1.5}
    rows = [{**emulated, "checks": checks, "cpu": "a CPU"} for checks in ("memory", "all")]
    write_rows(tmp_path / "emulator.csv", rows)
    on_gpu = {"device": "a GPU", "op": "fwd", "dtype": "bfloat16", "headdim": 64, "causal": 1}
    on_gpu |= {"peer": "flash_attn", "tflops": 9.5}
    rows = [{**on_gpu, "seqlen": seqlen} for seqlen in (512, 1024)]
    write_rows(tmp_path / "cuda.csv", rows)
    assert report.main(["pictures", str(tmp_path)]) == 0
    drawn |= {"roofline.png", "emulator.png", "cuda.png"}
    assert drawn <= {path.name for path in tmp_path.iterdir()}
    assert report.main(["roofline", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 0
    assert "decode, bfloat16" in (tmp_path / "page.md").read_text()
    capsys.readouterr()
    assert report.main(["summary", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "faster than without the window" in text
    assert "of a plain read" in text


@needs_emulator
def test_cases_of_a_gpu_run_on_the_emulated_one(tmp_path, benchmark_modules):
    """Shrunk; results that differ from torch's would be left out."""
    import benchmark_cuda
    from cases import gpu

    options = ["--device", "cpu", "--shrink", "64", "--samples", "1", "--out", str(tmp_path)]
    with flash_attn.emulator(checks="memory") as emulated:
        assert benchmark_cuda.main(options) == 0
    rows = read_rows(tmp_path / "cuda.csv")
    count = {op: len(cases()) for op, cases in gpu.CASES.items()}
    for op in count:
        peers = [row["peer"] for row in rows if row["op"] == op]
        rivals = {
            "fwd": ["sdpa_flash"],
            "fwd_bwd": ["sdpa_flash"],
            "decode": ["sdpa", "sdpa_flash", "copy"],
        }.get(op, [])
        for peer in ("flash_attn", *rivals):
            assert peers.count(peer) == count[op], (op, peer)
    assert {name.split("_")[1] for name in emulated.counters} == {"fwd", "bwd", "decode"}
    assert all(float(row["share_of_copy"]) == 1 for row in rows if row["peer"] == "copy")


@needs_emulator
def test_a_grid_is_measured_if_it_is_asked_for(tmp_path, benchmark_modules, monkeypatch):
    import benchmark_cuda
    from cases import gpu

    grid = gpu.decode_grid()
    assert len({(c.batch, c.seqlen_k, c.nheads_k, c.page_size) for c in grid}) == len(grid)
    monkeypatch.setitem(gpu.GRIDS, "decode_grid", lambda: grid[-2:])
    options = ["--device", "cpu", "--shrink", "64", "--samples", "1", "--out", str(tmp_path)]
    with flash_attn.emulator(checks="memory"):
        assert benchmark_cuda.main([*options, "--op", "decode_grid"]) == 0
    rows = read_rows(tmp_path / "cuda.csv")
    assert [row["page_size"] for row in rows if row["peer"] == "flash_attn"] == ["64", "256"]


def test_a_peer_that_differs_is_not_measured(benchmark_modules, monkeypatch, capsys):
    import benchmark_cuda
    from cases import gpu

    def wrong(case, inputs):
        return lambda: (torch.ones_like(inputs.q),)

    (case, *_) = gpu.latency()
    monkeypatch.setitem(benchmark_cuda.PEERS["latency"], "sdpa", wrong)
    runs = benchmark_cuda.working_peers("latency", gpu.shrunk(case, 64), "cpu")
    assert list(runs) == ["flash_attn"]
    assert "sdpa is left out: its result differs" in capsys.readouterr().out


def test_bounds_of_a_kernel(benchmark_modules):
    from reports.roofline import Limits, bound_of

    row = {"dtype": "float32", "gflops": 50.0, "gexps": 1.0, "gbytes": 2.0, "median_ms": 10.0}
    vector = Limits(fma=100.0, dot=0.0, amx=0.0, exps=5.0, read=20.0)
    bound = bound_of(row, vector)
    assert (bound.products, bound.exps, bound.bytes) == pytest.approx((5.0, 2.0, 1.0))
    assert bound.total == pytest.approx(7.0)
    assert bound.cause == "FMA and exp throughput"
    tiles = Limits(fma=100.0, dot=0.0, amx=1200.0, exps=1.25, read=20.0)
    assert tiles.multiply("float32") == (200.0, "AMX")
    bound = bound_of(row, tiles)
    assert (bound.total, bound.cause) == (pytest.approx(8.0), "exp throughput")
    slow_memory = Limits(fma=100.0, dot=0.0, amx=0.0, exps=5.0, read=2.5)
    assert bound_of(row, slow_memory).cause == "memory bandwidth"


def test_real_lengths(benchmark_modules):
    from cases import text_lengths

    documents, paragraphs = text_lengths.documents(), text_lengths.paragraphs()
    assert 12288 < sum(documents) <= 16384
    assert min(documents) < max(documents) <= 4096
    assert sum(paragraphs) <= 4096
    assert len(paragraphs) > 3 * len(documents)
