"""An argument's name is the same in the C interface, the operators and the public functions."""

from __future__ import annotations

import inspect
import runpy
import sys
from pathlib import Path

import pytest

import flash_attn
from flash_attn import _functions as functions
from flash_attn._library import arguments

CSRC = Path(__file__).parents[2] / "csrc"
LIBRARY_NAMES = {
    "dropout_p": "p_dropout",
    "causal": "is_causal",
    "window_size_left": "window_left",
    "window_size_right": "window_right",
    "rotary_interleaved": "is_rotary_interleaved",
}
FORWARD_RESULTS = {"out", "softmax_lse", "s_dmask", "rng_state"}
PACKED_FORWARD_ONLY = {
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "zero_tensors"),
    *("seqused_k", "leftpad_k", "block_table", "num_splits"),
}
PACKED_BACKWARD_ONLY = {
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "zero_tensors")
}
FACTORS = {"q_descale", "k_descale", "v_descale"}
WITHOUT_FACTORS = {"p_dropout", "rng_state", "s_dmask", "alibi_slopes", "attn_bias"}
CACHE_WITHOUT_FACTORS = {
    *("alibi_slopes", "attn_bias", "rotary_cos", "rotary_sin", "is_rotary_interleaved")
}
RESULTS = {"out", "softmax_lse"}
# operator, function of the library, buffers of results, and what the function knows besides
LISTS = [
    (functions.FORWARD, "mha_fwd", FORWARD_RESULTS, PACKED_FORWARD_ONLY | FACTORS),
    (functions.VARLEN_FORWARD, "mha_varlen_fwd", FORWARD_RESULTS, FACTORS),
    (functions.BACKWARD, "mha_bwd", {"softmax_d"}, PACKED_BACKWARD_ONLY),
    (functions.VARLEN_BACKWARD, "mha_varlen_bwd", {"softmax_d"}, set()),
    (functions.KVCACHE, "mha_fwd_kvcache", RESULTS, {"k", "v", "attn_bias", *FACTORS}),
    (functions.KVCACHE_APPEND, "mha_fwd_kvcache", RESULTS, {"attn_bias", *FACTORS}),
    (functions.FP8_FORWARD, "mha_fwd", RESULTS, PACKED_FORWARD_ONLY | WITHOUT_FACTORS),
    (functions.FP8_VARLEN_FORWARD, "mha_varlen_fwd", RESULTS, {"zero_tensors", *WITHOUT_FACTORS}),
    (functions.FP8_KVCACHE, "mha_fwd_kvcache", RESULTS, {"k", "v", *CACHE_WITHOUT_FACTORS}),
    (functions.FP8_KVCACHE_APPEND, "mha_fwd_kvcache", RESULTS, CACHE_WITHOUT_FACTORS),
]
# public function, operator, parameters of one without counterpart in the other
PUBLIC = [
    (flash_attn.flash_attn_func, functions.FORWARD, {"deterministic"}, set()),
    (
        flash_attn.flash_attn_varlen_func,
        functions.VARLEN_FORWARD,
        {"deterministic"},
        {"seqused_k", "leftpad_k", "zero_tensors", "num_splits"},
    ),
    (
        flash_attn.flash_attn_with_kvcache,
        functions.KVCACHE_APPEND,
        {"return_softmax_lse"},
        set(),
    ),
]


@pytest.mark.parametrize(
    ("operator", "function", "results", "besides"), LISTS, ids=lambda x: getattr(x, "name", "")
)
def test_library_has_the_operators_arguments(operator, function, results, besides):
    names = {LIBRARY_NAMES.get(name, name) for name in operator.names}
    names -= {"return_softmax", "out_dtype"}
    known = arguments(function)
    assert len(known) == len(set(known))
    assert names | results == set(known) - besides


@pytest.mark.parametrize(("function", "operator", "own", "missing"), PUBLIC)
def test_operators_have_the_public_arguments(function, operator, own, missing):
    names = set(inspect.signature(function).parameters) - own
    if "window_size" in names:
        names = names - {"window_size"} | {"window_size_left", "window_size_right"}
    if "return_attn_probs" in names:
        names = names - {"return_attn_probs"} | {"return_softmax"}
    assert names == set(operator.names) - missing


@pytest.mark.parametrize("operator", functions.OPERATORS, ids=lambda operator: operator.name)
def test_schema_is_the_declarations(operator):
    declared = operator.overload._schema.arguments
    assert tuple(argument.name for argument in declared) == operator.names
    written = [a.name for a in declared if a.alias_info is not None and a.alias_info.is_write]
    assert written == [operator.names[place] for place in operator.written]


def test_new_member_of_the_c_struct_is_an_argument(tmp_path, monkeypatch):
    """Nothing else has to be told of it: the library learns its arguments from the header."""
    header = (CSRC / "flash_attn" / "include" / "flash_attn" / "flash_attn.h").read_text()
    member = "double softcap;"
    assert header.count(member) == 1
    changed, output = tmp_path / "flash_attn.h", tmp_path / "arguments.inc"
    changed.write_text(header.replace(member, f"{member} double temperature; /* of the scores */"))
    script = str(CSRC / "ffi" / "generate_arguments.py")
    monkeypatch.setattr(sys, "argv", [script, str(output), str(changed)])
    runpy.run_path(script, run_name="__main__")
    rows = [line for line in output.read_text().splitlines() if '"temperature"' in line]
    calls = ("fwd", "bwd", "kvcache")
    assert len(rows) == len(calls)
    for row, call in zip(rows, calls):
        assert f"flash_attn_{call}_args& args" in row
        assert "args.score.temperature = x" in row
