"""What a program pays before its first result: importing the package, and the first calls.

    python benchmarks/benchmark_startup.py

Each sample is a fresh process. Printed are the median and the least of "import torch", of "import
flash_attn" after it, and of the first forward and the first backward, with that call's later
median beside it: what is between is paid once. The targets (import under 300 ms, first call under
50 ms) are shown, and the exit status is 1 if a median misses one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

_TARGETS = {"import flash_attn": 300.0, "first forward": 50.0, "first backward": 50.0}

_PROGRAM = """
import json, sys, time
moments = {}
def clock(name, start):
    moments[name] = (time.perf_counter() - start) * 1e3
start = time.perf_counter()
import torch
clock("import torch", start)
q, k, v = (torch.randn(1, 64, 4, 64, requires_grad=True) for _ in range(3))
# What torch itself does once: start threads, import sympy in backward with a given gradient.
warm_up = torch.nn.functional.scaled_dot_product_attention(q, k, v)
warm_up.backward(torch.ones_like(warm_up))
start = time.perf_counter()
import flash_attn
clock("import flash_attn", start)
def forward():
    return flash_attn.flash_attn_func(q, k, v, causal=True)
start = time.perf_counter()
out = forward()
clock("first forward", start)
dout = torch.ones_like(out)
start = time.perf_counter()
out.backward(dout)
clock("first backward", start)
later = []
for _ in range(20):
    start = time.perf_counter()
    forward()
    later.append((time.perf_counter() - start) * 1e3)
moments["later forward"] = sorted(later)[10]
json.dump(moments, sys.stdout)
"""


def sample() -> dict[str, float]:
    """Milliseconds of each step in a fresh process."""
    command = [sys.executable, "-c", _PROGRAM]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout)


def main(argv: list[str] | None = None) -> int:
    """Measure and print. Returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=5)
    options = parser.parse_args(argv)
    sample()  # reads the files into memory
    samples = [sample() for _ in range(options.samples)]
    missed = False
    print(f"{'':20} {'median ms':>10} {'least ms':>10} {'target ms':>10}")
    for name in samples[0]:
        values = [one[name] for one in samples]
        middle, target = statistics.median(values), _TARGETS.get(name)
        missed |= target is not None and middle > target
        print(f"{name:20} {middle:10.1f} {min(values):10.1f} {target or '':>10}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
