"""Train on a sequence that no process has whole: ring attention over processes of one machine.

A small transformer makes one training step on a long sequence twice: on one process, and on several
that share the tokens, with the same weights. Loss and gradients are the same; each process' memory
is its share.

    python examples/long_context_ring.py                  # 1 process, then 4
    python examples/long_context_ring.py --method ulysses --layout contiguous
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from flash_attn.distributed import ContextParallel
from flash_attn.modules.mha import MHA, HeadOptions

WIDTH, HEADS, HEADS_KV, LAYERS, VOCABULARY = 64, 4, 2, 2, 256


class Layer(nn.Module):
    def __init__(self, context: ContextParallel):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = MHA(
            WIDTH,
            HEADS,
            num_heads_kv=HEADS_KV,
            rotary_emb_dim=WIDTH // HEADS,
            causal=True,
            use_flash_attn=True,
            head_options=HeadOptions(context_parallel=context),
        )
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Everything but attention goes token by token, and needs no word about the other processes."""

    def __init__(self, context: ContextParallel):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(*(Layer(context) for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.layers(self.embedding(tokens)))


def whole_sequence(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (1, tokens): each label is the token after."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (1, tokens + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def step(model: nn.Module, context: ContextParallel, tokens: int) -> torch.Tensor:
    """One forward and backward: the loss of the whole sequence, whose gradients are left behind."""
    inputs, labels = (context.shard(x) for x in whole_sequence(tokens))
    logits = model(inputs)
    # Each process has some of the tokens: the parts of the mean, and of its gradients, are added.
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / tokens
    loss.backward()
    loss = loss.detach()
    for x in (loss, *(p.grad for p in model.parameters())):
        dist.all_reduce(x)
    return loss


def peak_rss(reset: bool = False) -> int:
    """The largest resident memory of this process since the last reset, in bytes."""
    if reset:
        with contextlib.suppress(OSError):  # else since the start
            Path("/proc/self/clear_refs").write_text("5")
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(rank: int, size: int, port: int, options: dict, folder: str) -> None:
    """What each process does."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    context = ContextParallel(dist.group.WORLD, options["method"], options["layout"])
    torch.manual_seed(0)
    model = Model(context)
    step(model, context, 16 * size)  # connects the processes, starts threads
    model.zero_grad()
    before, start = peak_rss(reset=True), time.perf_counter()
    loss = step(model, context, options["tokens"])
    result = {
        "loss": loss.item(),
        "seconds": time.perf_counter() - start,
        "peak": peak_rss() - before,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
    }
    torch.save(result, Path(folder) / f"{size}-{rank}.pt")
    dist.destroy_process_group()


def results_of(size: int, options: dict) -> list[dict]:
    """Run a step on ``size`` processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (size, port, options, folder), size)
        return [torch.load(Path(folder) / f"{size}-{rank}.pt") for rank in range(size)]


def difference(actual: dict, expected: dict) -> float:
    """The largest error of a gradient, relative to its largest element."""
    errors = [(actual[n] - g).abs().max() / g.abs().max() for n, g in expected.items()]
    return max(errors).item()


def compare(processes: int, options: dict) -> dict:
    """Make a step on one process and on several; print and return what is alike and what is not."""
    report = {**options, "processes": processes}
    (alone,), shared = results_of(1, options), results_of(processes, options)
    report["loss"] = [alone["loss"], shared[0]["loss"]]
    report["gradients"] = max(difference(r["gradients"], alone["gradients"]) for r in shared)
    report["peak_mib"] = [max(r["peak"] for r in rs) / 2**20 for rs in ([alone], shared)]
    report["seconds"] = [max(r["seconds"] for r in rs) for rs in ([alone], shared)]
    print(f"{options['tokens']} tokens, {options['method']}, {options['layout']}")
    for i, size in enumerate((1, processes)):
        print(
            f"{size:2} process{'' if size == 1 else 'es'}: loss {report['loss'][i]:.7f}, "
            f"{report['peak_mib'][i]:7.1f} MiB a process, {report['seconds'][i]:.1f} s"
        )
    print(f"largest difference of a gradient, relative to its largest element: "
          f"{report['gradients']:.1e}")  # fmt: skip
    print(f"memory per process: 1/{report['peak_mib'][0] / report['peak_mib'][1]:.1f}")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--method", choices=("ring", "ulysses"), default="ring")
    parser.add_argument("--layout", choices=("contiguous", "zigzag"), default="zigzag")
    parser.add_argument("--json", type=Path, help="where to write the report")
    arguments = parser.parse_args()
    options = {n: getattr(arguments, n) for n in ("tokens", "method", "layout")}
    report = compare(arguments.processes, options)
    if arguments.json:
        arguments.json.write_text(json.dumps(report))
    alike = abs(report["loss"][0] - report["loss"][1]) < 1e-5 and report["gradients"] < 1e-3
    print("equal to one process" if alike else "NOT equal to one process")
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
