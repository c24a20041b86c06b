"""Small training runs: their texts, their settings, and processes of their own to run them in."""

from __future__ import annotations

import atexit
import csv
import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import processes
import torch
import torch.distributed as dist
from scripts import ROOT

if str(ROOT) not in sys.path:  # at its end: an installed flash_attn goes first
    sys.path.append(str(ROOT))

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_texts(folder: Path, documents: int = 24) -> str:
    """Write text files in which much can be foreseen; return the pattern that finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        words = [WORDS[(i + 3 * j) % len(WORDS)] for j in range(60)]
        if not (path := folder / f"{i:02}.txt").exists():  # a changed file is read anew
            path.write_text(" ".join(words))
    return f"{folder}/*.txt"


TINY = {
    "model.n_layer": 2,
    "model.n_embd": 32,
    "model.n_head": 2,
    "model.n_positions": 16,
    "model.rotary_emb_fraction": 0.0,
    "model.tie_word_embeddings": True,
    "data.tokenizer": "bytes",
    "data.seqlen": 16,
    "data.hold_out": 6,
    "optimizer.lr": 0.01,
    "scheduler.warmup_steps": 2,
    "trainer.max_steps": 6,
    "trainer.global_batch": 4,
    "trainer.micro_batch": 2,
    "trainer.log_every": 3,
    "trainer.evaluate_every": 0,
    "trainer.evaluate_batches": 2,
    "trainer.checkpoint_every": 0,
    "trainer.device": "cpu",
    "trainer.peak_tflops": 1.0,
}


def overrides(tmp_path: Path, **changes) -> list[str]:
    """Hydra's arguments of a tiny run in ``tmp_path``; changes name fields with __ for the dot."""
    values = {
        **TINY,
        "data.train": f"[{write_texts(tmp_path / 'texts')}]",
        "data.cache": str(tmp_path / "cache"),
        "out": str(tmp_path / "run"),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return ["callbacks=quiet", *(f"{k}={'null' if v is None else v}" for k, v in values.items())]


def run_here(tmp_path: Path, **changes):
    """Run in this process, on one thread; return the trainer at its end."""
    from training.run import compose_settings, train

    torch.set_num_threads(1)
    try:
        return train(compose_settings(overrides(tmp_path, **changes)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rows(folder: Path, *columns: str) -> list[tuple[str, ...]]:
    """Columns of a run's metrics.csv, as the characters they are."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


_LIMIT_SECONDS = 240  # of processes that wait for each other
COURSE = ("step", "loss", "lr", "grad_norm", "validation_loss")


@cache
def _folder_of_training() -> str:
    """A folder that has ``training`` alone: beside it in the repository is a flash_attn without its
    library, which PYTHONPATH would put before an installed one."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    (folder / "training").symlink_to(ROOT / "training", target_is_directory=True)
    return str(folder)


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports this package, its training and the tests' helpers."""
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent), _folder_of_training()]
    paths = [path for path in paths if path]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **more}


def command(tmp_path: Path, *more: str, limit: int = 120, **changes) -> subprocess.CompletedProcess:
    """Run ``python -m training.run`` in a process of its own."""
    line = [sys.executable, "-m", "training.run", *overrides(tmp_path, **changes), *more]
    return subprocess.run(
        line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=limit
    )


def torchrun(processes: int, arguments: list[str]) -> int:
    """The status of ``torchrun -m training.run`` with processes of one thread."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", "-m", "training.run", *arguments]  # fmt: skip
    return subprocess.run(line, env=environment(), timeout=_LIMIT_SECONDS).returncode


def _rank(rank: int, port: int, world_size: int, work, arguments: tuple) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )  # fmt: skip
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(_LIMIT_SECONDS, exit=True)
    try:
        work(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_processes(world_size: int, work, *arguments) -> None:
    """Call ``work(*arguments)`` in processes that have the environment of torchrun's."""
    processes.on_processes(world_size, _rank, world_size, work, arguments)
