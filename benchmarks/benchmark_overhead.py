"""Time of a call whose arithmetic is nothing: what Python, torch and the binding cost.

Attention of one query over one key, one head of dimension 8. The calls are measured in turns, so
that whatever else the machine does meets all of them alike; printed are the median and the fastest
batch, in microseconds a call. "Overhead" is what a call costs beyond the bare call of the library,
which contains the kernel. PyTorch's own attention and an addition stand beside as a scale.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn._functions import FORWARD


def make_calls():
    """Return the calls to measure, by name; the first is the bare call of the library."""
    q, k, v = (torch.randn(1, 1, 1, 8) for _ in range(3))
    q_grad, k_grad, v_grad = (x.clone().requires_grad_() for x in (q, k, v))
    out, softmax_lse = torch.empty_like(q), torch.empty(1, 1, 1)
    k_cache, v_cache = torch.zeros(1, 16, 1, 8), torch.zeros(1, 16, 1, 8)
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
    cache_seqlens = torch.tensor([3], dtype=torch.int32)
    dout = torch.ones_like(q)
    operator = torch.ops.flash_attn._flash_attn_forward.default

    def bare():
        results = (out, softmax_lse, None, None)
        numbers = (0.0, 0.35, False, -1, -1, 0.0)
        FORWARD.function(q, k, v, *numbers, None, False, None, None, *results)

    def forward_backward(function):
        return torch.autograd.grad(function(q_grad, k_grad, v_grad), (q_grad, k_grad, v_grad), dout)

    return {
        "bare call of the library": bare,
        "flash_attn_func, no grad": lambda: flash_attn_func(q, k, v),
        "flash_attn_func, recording": lambda: flash_attn_func(q_grad, k_grad, v_grad),
        "flash_attn_func, forward + backward": lambda: forward_backward(flash_attn_func),
        "flash_attn_varlen_func, no grad": lambda: flash_attn_varlen_func(
            q[0], k[0], v[0], cu_seqlens, cu_seqlens, 1, 1
        ),
        "flash_attn_with_kvcache, appending": lambda: flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens
        ),
        "operator, no grad": lambda: operator(q, k, v, 0.0, 0.35, False, -1, -1, 0.0, None, False),
        "torch: scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch: its forward + backward": lambda: forward_backward(F.scaled_dot_product_attention),
        "torch: q + k": lambda: q + k,
    }


def measure(calls, rounds, batch):
    """Return the times of each call, in microseconds, one entry a round."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(batch):
                call()
            times[name].append((time.perf_counter() - begin) / batch * 1e6)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=10, help="calls a round")
    args = parser.parse_args()
    calls = make_calls()
    measure(calls, 3, args.batch)
    times = measure(calls, args.rounds, args.batch)
    floor, *_ = times.values()
    print(f"{'microseconds a call':38}{'median':>9}{'fastest':>9}{'overhead':>10}")
    for name, values in times.items():
        overhead = statistics.median(v - f for v, f in zip(values, floor))
        text = f"{overhead:10.1f}" if name.startswith(("flash", "operator")) else ""
        print(f"{name:38}{statistics.median(values):9.1f}{min(values):9.1f}{text}")


if __name__ == "__main__":
    main()
