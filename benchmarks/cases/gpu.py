"""The cases of benchmark_cuda.py, by operation."""

from __future__ import annotations

import dataclasses
import itertools

from cases.case import Case

TOKENS, HIDDEN = 16384, 2048  # of a dense batch: batch * seqlen, nheads * headdim
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)


def _dense(op: str, headdim: int, seqlen: int, causal: bool, group: int = 1) -> Case:
    nheads = HIDDEN // headdim
    batch = TOKENS // seqlen
    heads = (nheads, nheads // group)
    return Case(op, "bfloat16", batch, seqlen, seqlen, *heads, headdim, headdim, causal)


def forward() -> list[Case]:
    """As many tokens in all in each; other head dims, grouped heads at one length."""
    masks = (False, True)
    cases = [_dense("fwd", d, s, c) for d, c, s in itertools.product((64, 128), masks, SEQLENS)]
    cases += [_dense("fwd", d, 4096, c) for d, c in itertools.product((32, 96, 192, 256), masks)]
    return [*cases, _dense("fwd", 128, 4096, True, group=4)]


def forward_backward() -> list[Case]:
    """As many tokens in all in each; grouped heads at one length."""
    shapes = itertools.product((64, 128, 256), (False, True), (1024, 4096, 16384))
    cases = [_dense("fwd_bwd", d, s, c) for d, c, s in shapes]
    return [*cases, _dense("fwd_bwd", 128, 4096, True, group=4)]


def varlen() -> list[Case]:
    """Eight sequences from 4096 tokens down to an eighth of that."""
    return [
        Case("varlen", "bfloat16", 8, 4096, 4096, HIDDEN // d, HIDDEN // d, d, d, causal)
        for d, causal in itertools.product((64, 128), (False, True))
    ]


def _decode(
    batch: int, seqlen: int, headdim: int = 128, page_size: int = 0, heads: tuple = (32, 8)
) -> Case:
    return Case(
        "decode", "bfloat16", batch, 1, seqlen, *heads, headdim, headdim, False, page_size=page_size
    )


def decode() -> list[Case]:
    """Small and large batches, short and long; pages; other head dims."""
    shapes = [(1, 8192), (1, 131072), (16, 8192), (64, 4096)]
    cases = [_decode(*shape) for shape in shapes]
    cases += [_decode(16, 8192, page_size=size) for size in (16, 64, 256)]
    return [*cases, _decode(16, 8192, 64), _decode(16, 8192, 256)]


def decode_grid() -> list[Case]:
    """Batches of 1 to 128, 1k to 64k keys, at most 2M in all; three numbers of heads; pages."""
    batches, seqlens = (1, 4, 16, 64, 128), (1024, 4096, 16384, 65536)
    shapes = [(b, n) for b, n in itertools.product(batches, seqlens) if b * n <= 1 << 21]
    heads = ((32, 8), (32, 4), (32, 1))
    cases = [_decode(*shape, heads=pair) for shape, pair in itertools.product(shapes, heads)]
    pages = itertools.product(((1, 16384), (64, 4096)), (1, 16, 64, 256))
    return [*cases, *(_decode(*shape, page_size=size) for shape, size in pages)]


def latency() -> list[Case]:
    """One sequence of 1024 keys."""
    return [_decode(1, 1024), _decode(1, 1024, page_size=16)]


CASES = {
    "fwd": forward,
    "fwd_bwd": forward_backward,
    "varlen": varlen,
    "decode": decode,
    "latency": latency,
}
GRIDS = {"decode_grid": decode_grid}  # measured if they are asked for


def shrunk(case: Case, factor: int) -> Case:
    """The same with fewer heads and shorter sequences, to try a machine without a GPU."""
    group = case.nheads // case.nheads_k
    nheads_k = max(1, case.nheads_k // factor)
    seqlen = max(case.seqlen_k // factor, case.page_size, 1)
    return dataclasses.replace(
        case,
        batch=min(case.batch, 4),
        nheads=nheads_k * group,
        nheads_k=nheads_k,
        seqlen_q=seqlen if case.seqlen_q > 1 else 1,
        seqlen_k=seqlen,
    )
