"""Speed of the CUDA kernels beside torch's scaled_dot_product_attention, flash and cuDNN.

    python benchmarks/benchmark_cuda.py --out build/bench
    python benchmarks/benchmark_cuda.py --device cpu --seqlen 128   # tries the script without a GPU

Forward only. Every case has ``--tokens`` tokens in all: batch * seqlen. Peers take turns, each call
is timed by events on the device after the L2 cache has been overwritten, and medians are compared.
Writes cuda.csv and, with matplotlib, cuda.png into --out.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from reports import cuda_figure
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_func

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = ("device", "dtype", "headdim", "causal", "batch", "seqlen", "nheads", "nheads_k")
RESULTS = ("peer", "median_ms", "min_ms", "samples", "tflops", "ratio_to_best_sdpa")
FLUSH_BYTES = 256 << 20  # more than any L2 cache


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["bf16"])
    add("--headdim", nargs="+", type=int, default=[64, 128])
    add("--causal", nargs="+", type=int, choices=(0, 1), default=[0, 1])
    add("--seqlen", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192, 16384])
    add("--tokens", type=int, default=16384, help="batch * seqlen")
    add("--hidden", type=int, default=2048, help="nheads * headdim")
    add("--group", type=int, default=1, help="query heads for each key-value head")
    add("--samples", type=int, default=20)
    add("--out", type=Path, default=Path("build/bench"))
    return parser.parse_args(argv)


def sdpa(backend: SDPBackend):
    """torch's attention by one of its backends, tensors (batch, nheads, seqlen, headdim)."""

    def make(q, k, v, causal):
        def run():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        gqa = q.shape[1] != k.shape[1]
        return run

    return make


def own(q, k, v, causal):
    """This package, on the same memory: its tensors are (batch, seqlen, nheads, headdim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: flash_attn_func(q, k, v, causal=causal)


PEERS = {
    "flash_attn": own,
    "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
}


class Timer:
    """Milliseconds of a call: between two events on a GPU, by the clock elsewhere."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        self.flush = torch.empty(
            FLUSH_BYTES if self.on_gpu else 1, dtype=torch.uint8, device=device
        )

    def __call__(self, run) -> float:
        self.flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def working_peers(q, k, v, causal) -> dict:
    """Those that run this case here; a line for each that does not."""
    runs = {}
    for name, make in PEERS.items():
        run = make(q, k, v, causal)
        try:
            for _ in range(3):
                run()
        except RuntimeError as error:
            print(f"  {name} does not run: {str(error).splitlines()[0]}")
            continue
        runs[name] = run
    return runs


def measure(
    timer: Timer, options, dtype: str, headdim: int, causal: int, seqlen: int
) -> list[dict]:
    """Rows of one case, one a peer."""
    nheads = max(1, options.hidden // headdim)
    batch, nheads_k = max(1, options.tokens // seqlen), max(1, nheads // options.group)

    def tensor(heads):
        shape = (batch, seqlen, heads, headdim)
        return torch.randn(shape, device=options.device, dtype=DTYPES[dtype]).transpose(1, 2)

    runs = working_peers(tensor(nheads), tensor(nheads_k), tensor(nheads_k), bool(causal))
    samples = {name: [] for name in runs}
    for _ in range(options.samples):
        for name, run in runs.items():
            samples[name].append(timer(run))
    flops = 4 * batch * nheads * seqlen**2 * headdim * (0.5 if causal else 1)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    others = [ms for name, ms in medians.items() if name != "flash_attn"]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    case = dict(zip(COLUMNS, (name, dtype, headdim, causal, batch, seqlen, nheads, nheads_k)))
    return [
        case
        | {
            "peer": peer,
            "median_ms": round(ms, 4),
            "min_ms": round(min(samples[peer]), 4),
            "samples": options.samples,
            "tflops": round(flops / ms / 1e9, 2),
            "ratio_to_best_sdpa": round(min(others) / ms, 3) if others else "",
        }
        for peer, ms in medians.items()
    ]


def main(argv=None) -> int:
    """Measure, print, write."""
    options = parse_arguments(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    timer = Timer(options.device)
    table = options.out / "cuda.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *RESULTS))
        writer.writeheader()
        for case in itertools.product(
            options.dtype, options.headdim, options.causal, options.seqlen
        ):
            rows = measure(timer, options, *case)
            writer.writerows(rows)
            file.flush()  # a run that is cut off leaves what it has measured
            cells = [f"{r['peer']} {r['median_ms']:.3f} ms {r['tflops']:.1f}" for r in rows]
            print(*case, "|", " | ".join(cells), flush=True)
    if (picture := cuda_figure.save(table)) is not None:
        print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
