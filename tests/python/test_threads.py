"""Torch's number of threads is honoured, forked workers and concurrent callers work."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from flash_attn import flash_attn_func, flash_attn_with_kvcache

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and fork")


def qkv(seqlen, seed=0, nheads=4, headdim=64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, seqlen, nheads, headdim, generator=generator) for _ in range(3)]


_COUNT_THREADS = """
import os, sys, torch
from flash_attn import flash_attn_func
if sys.argv[1] != "0":
    torch.set_num_threads(int(sys.argv[1]))
q = torch.randn(1, 512, 4, 64, requires_grad=True)
before = len(os.listdir("/proc/self/task"))
flash_attn_func(q.detach(), q.detach(), q.detach())
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
"""


@linux_only
@pytest.mark.parametrize(("omp_num_threads", "set_num_threads"), [(1, 0), (2, 0), (1, 3), (3, 1)])
def test_number_of_threads_is_torchs(omp_num_threads, set_num_threads):
    environment = {**os.environ, "OMP_NUM_THREADS": str(omp_num_threads)}
    command = [sys.executable, "-c", _COUNT_THREADS, str(set_num_threads)]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    started, torch_threads = map(int, run.stdout.split())
    assert started == torch_threads - 1
    if set_num_threads:
        assert torch_threads == set_num_threads


class _Attention(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return flash_attn_func(*qkv(256, seed=i))


@linux_only
def test_forked_workers_compute_what_their_parent_does():
    dataset = _Attention()
    expected = [dataset[i] for i in range(len(dataset))]  # the parent's threads now exist
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for actual, wanted in zip(loader, expected):
        assert torch.equal(actual, wanted)


def _decode(seed):
    q, k, v = qkv(700 + 64 * seed, seed=seed)
    return flash_attn_with_kvcache(q[:, :1], k, v)


def _forward_and_backward(seed):
    q, k, v = (x.requires_grad_() for x in qkv(150 + 31 * seed, seed=seed))
    out = flash_attn_func(q, k, v, causal=True)
    return torch.cat([x.flatten() for x in torch.autograd.grad(out.sum(), (q, k, v))])


@pytest.mark.parametrize("function", [_decode, _forward_and_backward])
def test_python_threads_may_call_at_once(function):
    seeds = list(range(4)) * 3
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(function, seeds))
    for seed, actual in zip(seeds, at_once):
        assert torch.equal(actual, function(seed))


def test_other_python_threads_run_during_a_call():
    q, k, v = qkv(4096)
    done = threading.Event()
    times = []

    def call():
        times.append(time.perf_counter())
        flash_attn_func(q, k, v)
        times.append(time.perf_counter())
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    turns = []
    while not done.wait(0.001):
        turns.append(time.perf_counter())
    thread.join()
    start, end = times
    during = [t for t in turns if start + 0.1 * (end - start) < t < end - 0.1 * (end - start)]
    assert len(during) >= 3, f"{len(during)} turns in {end - start:.3f} s"
