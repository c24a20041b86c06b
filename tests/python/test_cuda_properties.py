"""Any shape with any features on the emulated GPU, against the reference in fp64."""

from __future__ import annotations

import dataclasses

import attention_cases
import cache_cases
import pytest
import test_varlen
from attention_cases import SWEEP_FACTOR
from backends import BF16, EMULATOR, FP16, needs_emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import UP_TO_70, cases, windows

pytestmark = needs_emulator

FEW_QUERIES_OF_MANY_KEYS = st.tuples(st.integers(1, 9), st.integers(500, 900))
NO_KEYS = st.tuples(st.integers(1, 70), st.just(0))
ATTENTION = {
    "dtypes": (FP16, BF16),
    "seqlens": st.one_of(UP_TO_70, FEW_QUERIES_OF_MANY_KEYS, NO_KEYS),
    "largest_dim": 256,
    "dlse": st.just(False),
}


@st.composite
def packed_cases(draw):
    """Four sequences of up to this length, some of them empty: see ``sampled_lengths``."""
    case = draw(cases(**ATTENTION))
    return dataclasses.replace(case, batch=4, seqlens=tuple(max(n, 1) for n in case.seqlens))


@st.composite
def appends(draw, capacity, head_dim):
    """Fields of a case that appends rows, with rotary embedding or without."""
    even = head_dim // 2 * 2
    rotary = draw(st.sampled_from(["", "interleaved", "halves"])) if even else ""
    fields = {"seqlen_new": draw(st.integers(1, min(capacity, 40))), "rotary": rotary}
    if rotary:
        fields["rotary_dim"] = 2 * draw(st.integers(1, even // 2))
    return fields


@st.composite
def caches(draw):
    """Of up to 700 rows, dense, indexed or in pages, with few queries or many."""
    capacity, hk = draw(st.integers(1, 700)), draw(st.integers(1, 3))
    dims = draw(st.integers(1, 256)), draw(st.integers(1, 256))
    page_size = draw(st.sampled_from([0, 0, 1, 3, 16, 64, 256]))
    fields = draw(st.one_of(st.just({}), appends(capacity, dims[0])))
    lengths = ["tensor", "int"] if fields else ["tensor", "int", "none"]
    return cache_cases.Case(
        dtype=draw(st.sampled_from([FP16, BF16])),
        batch=draw(st.integers(1, 3)),
        seqlen_q=draw(st.one_of(st.integers(1, 9), st.integers(10, 80))),
        capacity=capacity,
        heads=(hk * draw(st.integers(1, 4)), hk),
        dims=dims,
        causal=draw(st.booleans()),
        window_size=(windows(draw, capacity), windows(draw, capacity)),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        alibi=draw(st.sampled_from(["", "h", "bh"])),
        sinks=draw(st.booleans()),
        lengths=draw(st.sampled_from(lengths)),
        batch_idx=not page_size and draw(st.booleans()),
        leftpad=draw(st.booleans()),
        page_size=page_size,
        num_splits=draw(st.sampled_from([0, 1, 2, 7])),
        seed=draw(st.integers(0, 10)),
        **fields,
    )


CHECKS = {  # cases, how to check one, and how many of them
    "dense": (cases(**ATTENTION), attention_cases.check, 20),
    "packed": (packed_cases(), test_varlen.check, 8),
    "cache": (caches(), cache_cases.check, 10),
}


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_any_shape_with_any_features(kind, times):
    strategy, check, examples = CHECKS[kind]
    factor = {"factor": SWEEP_FACTOR} if times > 1 and kind != "cache" else {}

    @settings(max_examples=examples * times)
    @given(case=strategy)
    def run(case):
        check(case, backend=EMULATOR, **factor)

    run()
