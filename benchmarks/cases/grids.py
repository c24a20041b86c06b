"""The fixed selections of cases, the most telling first: a run that ends early misses the rest."""

from __future__ import annotations

import itertools

from cases import text_lengths
from cases.case import DTYPES, Case

PASSES = ("fwd", "bwd")
RIVALS = ("onednn", "openvino", "ggml")
PEAKS = ("fma_peak", "dot_peak", "amx_peak", "exp_peak")
# Batch and heads by sequence length: enough tasks for many cores, and a bounded time.
_BATCH_HEADS = {128: (8, 8), 512: (2, 8), 2048: (1, 8), 8192: (1, 2), 32768: (1, 2)}
_ALL_BACKENDS_AT, _LONGEST_MATH = 512, 2048
_PAGE_SIZES = (1, 16, 64, 256)


def case(
    op: str,
    dtype: str,
    batch: int,
    seqlen: int,
    nheads: int,
    nheads_k: int,
    headdim: int,
    causal: bool,
    **more,
) -> Case:
    """A case with as many queries as keys, one in decode."""
    seqlen_q = 1 if op == "decode" else seqlen
    headdim_v = more.pop("headdim_v", headdim)
    shape = (batch, seqlen_q, seqlen, nheads, nheads_k, headdim, headdim_v)
    return Case(op, dtype, *shape, causal, **more)


def peers_of(case: Case) -> tuple[str, ...]:
    """Who is measured in a case of a grid; those who cannot run it say so.

    torch's own choice is its flash backend wherever that can run: naming it is measured at one
    length. The math backend is slower everywhere but in backward of 16 bits.
    """
    if case.op == "decode":
        # The others know no pages: a large cache is measured once with them.
        others = ("sdpa", "ggml") if case.batch == 1 else ("sdpa",)
        once = case.batch > 1 and case.page_size
        return ("flash_attn", *(() if once else others), "read")
    if case.window:
        return ("flash_attn", "no_window", *PEAKS)
    peers = ["flash_attn", "sdpa"]
    if case.seqlen_k == _ALL_BACKENDS_AT:
        peers.append("sdpa_flash")
    if case.seqlen_k == _ALL_BACKENDS_AT or (case.op == "bwd" and case.seqlen_k <= _LONGEST_MATH):
        peers.append("sdpa_math")
    if case.op == "fwd" and (case.headdim == 128 or case.seqlen_k == _ALL_BACKENDS_AT):
        peers += RIVALS
    return (*peers, *PEAKS)


def _dense(seqlens, headdims, dtypes=tuple(DTYPES)) -> list[Case]:
    cases = []
    for s, d, op, dtype, causal in itertools.product(
        seqlens, headdims, PASSES, dtypes, (False, True)
    ):
        batch, nheads = _BATCH_HEADS[s]
        cases.append(case(op, dtype, batch, s, nheads, nheads, d, causal))
    return cases


def _decode(dtype: str, batch: int, page_sizes, seqlen: int = 8192) -> list[Case]:
    return [
        case("decode", dtype, batch, seqlen, 32, 8, 128, False, page_size=p) for p in page_sizes
    ]


def _varlen(dtype: str, name: str) -> Case:
    lengths = text_lengths.DISTRIBUTIONS[name]()
    ragged = {"lengths_of": name, "ragged": lengths}
    return case("varlen", dtype, len(lengths), max(lengths), 8, 8, 64, True, **ragged)


def _window(dtype: str, headdim: int = 64) -> Case:
    return case("fwd", dtype, 1, 32768, 2, 2, headdim, True, window=1024)


def _grouped(seqlens, dtypes=tuple(DTYPES)) -> list[Case]:
    """32 query heads, 8 KV heads."""
    return [
        case(op, dtype, 1, s, 32, 8, 128, True)
        for s, dtype, op in itertools.product(seqlens, dtypes, PASSES)
    ]


def quick() -> list[Case]:
    """What ``make bench`` runs: under three minutes."""
    cases = _dense((512, 2048), (128,))
    cases += [c for c in _dense((2048,), (64,)) if c.causal]
    for dtype in DTYPES:
        cases += _decode(dtype, 4, (0,), 4096)
        cases.append(_varlen(dtype, "paragraphs"))
    cases += _decode("bfloat16", 4, (16,), 4096)
    return cases


def full() -> list[Case]:
    """Everything: 15 minutes on two cores with AVX2, where the longest cases are left out."""
    cases = _dense((128, 512, 2048), (64, 128))
    for batch in (1, 64):
        cases += _decode("bfloat16", batch, (0, *_PAGE_SIZES))
    for dtype in ("float32", "float16"):
        cases += _decode(dtype, 1, (0, 16))
        cases += _decode(dtype, 16, (0, 16))
    for dtype, name in itertools.product(DTYPES, text_lengths.DISTRIBUTIONS):
        cases.append(_varlen(dtype, name))
    cases += _grouped((512, 2048))
    cases += _dense((8192,), (64, 128))
    cases += [_window(dtype) for dtype in DTYPES]
    cases += _dense((128, 512, 2048), (256,))
    cases += [c for c in _dense((32768,), (64, 128)) if c.causal]
    cases += _dense((8192,), (256,))
    cases += [c for c in _dense((32768,), (64, 128, 256)) if not c.causal or c.headdim == 256]
    return cases


GRIDS = {"quick": quick, "full": full}
