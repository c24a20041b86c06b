"""What the bits of decoding on the emulated H100 do not depend on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attention_cases import BF16, cuda_case, make_tensors
from backends import needs_emulator
from test_cuda_hopper_decode import DIMS, MLA, decode_emulator

from flash_attn import flash_attn_func, flash_attn_with_kvcache

pytestmark = needs_emulator


def latent_case(**fields):
    """A dense problem; run() makes V of it a part of K where the head dims are MLA's."""
    return cuda_case(**{"heads": (20, 1), "seqlens": (1, 1600), **fields})


def run(case, count=None, **options):
    """``(out, lse, counters)`` of the first ``count`` entries of a case's batch."""
    tensors, arguments, *_ = make_tensors(case)
    tensors = {name: x[:count] for name, x in tensors.items()}
    if case.dims == MLA:
        tensors["v"] = tensors["k"][..., : MLA[1]]
    with decode_emulator(**options) as gpu:
        out, lse, _ = flash_attn_func(**tensors, **arguments, return_attn_probs=True)
    (counters,) = gpu.counters.values()
    return out, lse, counters


@pytest.mark.parametrize("dims", [*DIMS, MLA])
def test_batch_and_sharing_change_no_bit(dims):
    """In a small batch several CTAs share a tile, in a large one none does."""
    case = latent_case(dims=dims, batch=200, window_size=(1300, -1))
    out, lse, together = run(case, checks="memory")
    first, first_lse, alone = run(case, count=1)
    assert together["ctas"] == 200
    assert together["classes"]["atomic"] == 0
    assert alone["ctas"] > 2
    assert alone["classes"]["atomic"] > 0
    assert torch.equal(out[:1], first)
    assert torch.equal(lse[:1], first_lse)


@pytest.mark.parametrize("dims", [(128, 128), (256, 256), MLA])
@pytest.mark.parametrize(("mode", "seed"), [("late", 0), ("random", 1), ("random", 2)])
def test_schedules_change_no_bit(dims, mode, seed):
    case = latent_case(dims=dims, seqlens=(2, 1200), causal=True)
    out, lse, _ = run(case)
    other, other_lse, _ = run(case, mode=mode, seed=seed)
    assert torch.equal(out, other)
    assert torch.equal(lse, other_lse)


SM_COUNTS = """
import ctypes, hashlib, sys, torch, flash_attn
from flash_attn import _library
library = str(_library.library_path().parent / "libgpu_emulator.so")
assert ctypes.CDLL(library).gpuEmulatorSetOption(1, b"sms", sys.argv[1].encode()) == 0
gen = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
ctas = []
for d, dv in ((128, 128), (576, 512)):
    q = torch.randn(2, 1, 24, d, generator=gen).bfloat16()
    k = torch.randn(2, 2000, 1, d, generator=gen).bfloat16()
    with flash_attn.emulator("sm_90a", library=library, checks="memory") as gpu:
        out, lse, _ = flash_attn.flash_attn_func(q, k, k[..., :dv], return_attn_probs=True)
    ((name, counters),) = gpu.counters.items()
    assert name.startswith("flash_decode_sm90_"), name
    ctas.append(counters["ctas"])
    digest.update(out.view(torch.int16).numpy().tobytes() + lse.numpy().tobytes())
print(ctas, digest.hexdigest())
"""


def test_devices_change_no_bit():
    """Of one multiprocessor, a few and many: as many CTAs share a tile."""
    results = []
    for sms in ("1", "5", "132"):
        command = [sys.executable, "-c", SM_COUNTS, sms]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        results.append(result.stdout.split("]"))
    assert len({ctas for ctas, _ in results}) == 3
    assert len({digest for _, digest in results}) == 1


@pytest.mark.parametrize("page_size", [1, 8, 48])
@pytest.mark.parametrize("dims", [(64, 64), MLA])
def test_pages_change_no_bit(dims, page_size):
    """However they are copied."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 30, dims[0], generator=gen).to(BF16)
    k = torch.randn(1, 720, 1, dims[0], generator=gen).to(BF16)
    used = torch.tensor([701], dtype=torch.int32)
    order = torch.randperm(720 // page_size, generator=gen)
    pages = torch.empty(len(order), page_size, 1, dims[0], dtype=BF16)
    pages[order] = k.view(pages.shape)
    results = []
    for cache, table in ((k, None), (pages, order.view(1, -1).to(torch.int32))):
        with decode_emulator(mode="random", seed=page_size):
            results.append(
                flash_attn_with_kvcache(
                    q,
                    cache,
                    cache[..., : dims[1]],
                    cache_seqlens=used,
                    block_table=table,
                    causal=True,
                    return_softmax_lse=True,
                )
            )
    for x, y in zip(*results):
        assert torch.equal(x, y)
