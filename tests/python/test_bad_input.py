"""Malformed calls raise before anything is written, and never crash the process.

First the sentences of single errors, then fuzz tests of every entry point: FLASH_ATTN_FUZZ_EXAMPLES
calls (default 60) of each of the 28, fewer on the emulated GPU.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from backends import CPU, on_each_backend
from call_checks import EXAMPLES, Memory, check_call, for_random_calls
from malformed_calls import ENTRIES, break_argument

import flash_attn
import flash_attn_2_cuda
from flash_attn._library import bind, set_cpu_isa

# ------------------------------------------------------------------------------------------------
# Sentences that name the argument

X = torch.ones(1, 4, 2, 8)
CU_SEQLENS = torch.tensor([0, 4], dtype=torch.int32)
TWO = torch.ones(2)


def attend(**changes):
    return flash_attn.flash_attn_func(**{"q": X, "k": X, "v": X, **changes})


def attend_recorded(**changes):
    return attend(**{"q": X.clone().requires_grad_(), **changes})


def attend_packed(**changes):
    given = {"cu_seqlens_q": CU_SEQLENS, "cu_seqlens_k": CU_SEQLENS}
    given.update(max_seqlen_q=4, max_seqlen_k=4)
    return flash_attn.flash_attn_varlen_func(
        **{"q": X[0], "k": X[0], "v": X[0], **given, **changes}
    )


def attend_cache(**changes):
    return flash_attn.flash_attn_with_kvcache(**{"q": X, "k_cache": X, "v_cache": X, **changes})


NUMBERS = [
    (attend, "window_size", 5, TypeError),
    (attend, "window_size", None, TypeError),
    (attend, "window_size", (1, 2, 3), TypeError),
    (attend, "window_size", torch.tensor(1), TypeError),
    (attend, "window_size", (2**70, 0), ValueError),
    (attend_recorded, "window_size", (0, -(2**70)), ValueError),
    (attend_cache, "window_size", (2**70, 0), ValueError),
    (attend_packed, "max_seqlen_q", 2**70, ValueError),
    (attend_packed, "max_seqlen_k", TWO, TypeError),
    (attend_packed, "max_seqlen_q", torch.tensor(float("nan")), TypeError),
    (attend_packed, "max_seqlen_q", torch.tensor(float("inf")), TypeError),
    (attend_packed, "max_seqlen_q", torch.tensor(5.7), TypeError),
    (attend_packed, "max_seqlen_k", torch.tensor(4, device="meta"), TypeError),
    (attend, "window_size", (torch.tensor(1.5), 0), TypeError),
    (attend, "softmax_scale", TWO, TypeError),
    (attend, "softmax_scale", 10**400, ValueError),
    (attend, "softcap", np.ones(2), TypeError),
    (attend, "dropout_p", torch.tensor(0.0, device="meta"), TypeError),
    (attend, "causal", TWO, TypeError),
    (attend, "causal", np.array([1, 2]), TypeError),
    (attend, "return_attn_probs", TWO, TypeError),
    (attend_cache, "cache_seqlens", 2**40, ValueError),
    (attend_cache, "cache_seqlens", 2**70, ValueError),
    (attend_cache, "num_splits", 2**70, ValueError),
]


@pytest.mark.parametrize(("function", "name", "value", "error"), NUMBERS)
def test_numbers_at_fault_are_named(function, name, value, error):
    with pytest.raises(error, match=rf"^{name}\S* must be .*, got|^{name} must be a number that"):
        function(**{name: value})


def test_whole_numbers_in_tensors_of_floats():
    window = (torch.tensor(1.0), torch.tensor(0.0))
    assert torch.equal(attend(window_size=window), attend(window_size=(1, 0)))


NOT_DENSE = {
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x]),
}
TENSORS = [
    *((attend, name) for name in ("q", "k", "v", "alibi_slopes", "s_aux", "attn_bias")),
    *((attend_recorded, name) for name in ("k", "v", "alibi_slopes", "s_aux", "attn_bias")),
    *((attend_packed, name) for name in ("q", "k", "v", "s_aux", "attn_bias", "cu_seqlens_q")),
    *((attend_cache, name) for name in ("q", "k_cache", "v_cache", "k", "s_aux", "cache_seqlens")),
]


def is_possible(name, kind):
    """A call whose q is on meta has a result there."""
    return (name, kind) != ("q", "meta")


@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize(("function", "name"), TENSORS)
def test_tensors_that_no_backend_reads_are_named(function, name, kind):
    if not is_possible(name, kind):
        pytest.skip("shapes alone")
    x = X[0] if function is attend_packed and name in "qkv" else X
    if name in ("alibi_slopes", "s_aux"):
        x = torch.ones(2)
    elif name.endswith("_bias"):
        x = torch.ones(1, 2, 4, 4)
    more = {}
    if name in ("k", "cache_seqlens") and function is attend_cache:
        more = {"k": X[:, :1], "v": X[:, :1], "cache_seqlens": 0}
        x = X[:, :1] if name == "k" else torch.zeros(1)
    sentence = f"^{name} must (be a dense|have contiguous)"
    with pytest.raises((RuntimeError, AssertionError), match=sentence):
        function(**{**more, name: NOT_DENSE[kind](x)})


def test_ragged_q_is_named():
    ragged = torch.nested.nested_tensor([X[0]], layout=torch.jagged)
    with pytest.raises(RuntimeError, match=r"^q must be a dense .*nested"):
        attend(q=ragged)


def test_architecture_of_the_emulator_is_named():
    with pytest.raises(TypeError, match=r"^arch must be a str"):
        flash_attn.emulator(arch=None)


# ------------------------------------------------------------------------------------------------
# Calls that are right but for one argument


def replace(defaults, changes):
    """``defaults`` with ``changes``; a callable change is applied to the default."""
    unknown = set(changes) - set(defaults)
    assert not unknown, unknown
    values = {
        n: change(defaults[n]) if callable(change) else change for n, change in changes.items()
    }
    return {**defaults, **values}


def dense(**changes):
    q = torch.zeros(2, 3, 4, 16)
    options = dict.fromkeys(("dropout_p", "softcap"), 0.0)
    options.update(softmax_scale=0.5, alibi_slopes=None, s_aux=None, attn_bias=None)
    options.update(return_attn_probs=False, window_size=(-1, -1))
    kv = torch.zeros(2, 5, 2, 16)
    return replace({"q": q, "k": kv, "v": kv.clone(), **options}, changes)


def varlen(**changes):
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, kv = torch.zeros(5, 4, 16), torch.zeros(5, 2, 16)
    lengths = {"max_seqlen_q": 3, "max_seqlen_k": 3, "block_table": None}
    cu_seqlens = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens.clone()}
    return replace({"q": q, "k": kv, "v": kv.clone(), **cu_seqlens, **lengths}, changes)


def paged(**changes):
    pages = torch.zeros(4, 2, 2, 16)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    return replace(varlen(k=pages, v=pages.clone(), block_table=table), changes)


def cache(**changes):
    q, cache, new = torch.zeros(2, 1, 4, 16), torch.zeros(3, 6, 2, 16), torch.zeros(2, 2, 2, 16)
    arguments = {"q": q, "k_cache": cache, "v_cache": cache.clone(), "k": new, "v": new.clone()}
    names = "rotary_cos rotary_sin cache_batch_idx cache_leftpad block_table alibi_slopes"
    arguments.update(dict.fromkeys(names.split()), num_splits=0)
    arguments["cache_seqlens"] = torch.tensor([3, 4], dtype=torch.int32)
    return replace(arguments, changes)


def paged_cache(**changes):
    pages = torch.zeros(6, 2, 2, 16)
    table = torch.tensor([[3, 1, 5], [0, 2, 4]], dtype=torch.int32)
    return replace(cache(k_cache=pages, v_cache=pages.clone(), block_table=table), changes)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def strided(x):
    """The same numbers with a last stride of 2."""
    return torch.stack([x, x], dim=-1)[..., 0]


FUNCTIONS = {
    dense: flash_attn.flash_attn_func,
    varlen: flash_attn.flash_attn_varlen_func,
    paged: flash_attn.flash_attn_varlen_func,
    cache: flash_attn.flash_attn_with_kvcache,
    paged_cache: flash_attn.flash_attn_with_kvcache,
}
SENTENCES = [
    (
        dense,
        {"q": torch.Tensor.double},
        "FlashAttention only support fp16, bf16 and fp32 data type: q has torch.float64",
    ),
    (
        dense,
        {"q": torch.Tensor.int},
        "FlashAttention only support fp16, bf16 and fp32 data type: q has int32",
    ),
    (
        dense,
        {"k": torch.Tensor.half},
        "query and key must have the same dtype: q has fp32, k has fp16",
    ),
    (
        dense,
        {"k": torch.Tensor.double},
        "query and key must have the same dtype: q has fp32, k has torch.float64",
    ),
    (
        dense,
        {"v": torch.Tensor.half},
        "query and value must have the same dtype: q has fp32, v has fp16",
    ),
    (
        dense,
        {"q": lambda q: q[0]},
        "q must have shape (batch_size, seqlen_q, num_heads, head_size)",
    ),
    (
        dense,
        {"k": lambda k: k[:1]},
        "k must have shape (batch_size, seqlen_k, num_heads_k, head_size)",
    ),
    (dense, {"k": lambda k: k[..., :8]}, "= (2, 5, 2, 16), got (2, 5, 2, 8)"),
    (dense, {"v": lambda v: v[:, 1:]}, "v must have shape"),
    (dense, {x: lambda t: t[..., :0] for x in "qkv"}, "head dimension must be positive"),
    (
        dense,
        {x: lambda t: t.repeat(1, 1, 1, 37) for x in "qkv"},
        "FlashAttention forward only supports head dimension at most 576, got 592",
    ),
    (
        dense,
        {"q": lambda q: q[:, :, :3]},
        "Number of heads in key/value must divide number of heads in query: 2 does not divide 3",
    ),
    (dense, {"dropout_p": 1.0}, "dropout_p (p_dropout) must be at least 0 and below 1, got 1"),
    (dense, {"dropout_p": -0.5}, "dropout_p (p_dropout) must be at least 0 and below 1, got -0.5"),
    (dense, {"softmax_scale": float("nan")}, "softmax_scale must be finite"),
    (dense, {"softcap": float("inf")}, "softcap must be finite"),
    (
        dense,
        {"return_attn_probs": True, "alibi_slopes": torch.zeros(4).half()},
        "ALiBi slopes must have dtype fp32: alibi_slopes has fp16",
    ),
    (dense, {"alibi_slopes": torch.zeros(2)}, "alibi_slopes must have shape (num_heads) = (4)"),
    (
        dense,
        {"alibi_slopes": torch.zeros(3, 4)},
        "alibi_slopes must have shape (batch_size, num_heads)",
    ),
    (
        dense,
        {"alibi_slopes": torch.zeros(2, 1).expand(2, 4)},
        "ALiBi slopes tensor must have contiguous last dimension",
    ),
    (dense, {"s_aux": torch.zeros(3)}, "s_aux must have shape (num_heads) = (4), got (3)"),
    (dense, {"attn_bias": torch.zeros(2, 4, 3, 4)}, "attn_bias must be broadcastable"),
    (
        dense,
        {"attn_bias": torch.zeros(1).half()},
        "attn_bias must have the dtype of query or fp32: q has fp32, attn_bias has fp16",
    ),
    (
        dense,
        {"attn_bias": torch.ones(3, 5, dtype=torch.bool)},
        "attn_bias must have the dtype of query or fp32: attn_bias has torch.bool; it is added to "
        "the scores: torch.where(mask, 0.0, -torch.inf)",
    ),
    (varlen, {"cu_seqlens_q": torch.Tensor.long}, "cu_seqlens_q must have dtype int32, got int64"),
    (
        varlen,
        {"cu_seqlens_k": torch.Tensor.double},
        "cu_seqlens_k must have dtype int32, got torch.float64",
    ),
    (varlen, {"cu_seqlens_k": int32(0, 5)}, "cu_seqlens_k must have shape (batch_size + 1) = (3)"),
    (varlen, {"cu_seqlens_q": strided}, "cu_seqlens_q must be contiguous"),
    (varlen, {"cu_seqlens_q": int32(0)}, "cu_seqlens_k must have shape (batch_size + 1) = (1)"),
    (varlen, {"cu_seqlens_q": int32()}, "cu_seqlens_q must have shape (batch_size + 1) = (1)"),
    (varlen, {"cu_seqlens_q": int32(1, 2, 5)}, "cu_seqlens_q must start at 0, got 1"),
    (varlen, {"cu_seqlens_k": int32(0, 3, 2)}, "cu_seqlens_k must not decrease"),
    (varlen, {"cu_seqlens_k": int32(0, 3, 6)}, "cu_seqlens_k ends at 6, beyond the 5 rows of k"),
    (varlen, {"cu_seqlens_q": int32(0, 1, 5)}, "longer than the max_seqlen of 3"),
    (varlen, {"max_seqlen_k": -1}, "max_seqlen_k must not be negative"),
    (varlen, {"max_seqlen_q": 2**31}, "max_seqlen_q is too large"),
    (varlen, {"q": lambda q: q[None]}, "q must have shape (total_q, num_heads, head_size)"),
    (
        paged,
        {"block_table": torch.Tensor.long},
        "block_table must have dtype torch.int32: block_table has int64",
    ),
    (
        paged,
        {"block_table": strided},
        "block_table must have contiguous last dimension: block_table has stride 2",
    ),
    (paged, {"block_table": lambda t: t[:1]}, "block_table must have shape (batch_size, "),
    (paged, {"block_table": lambda t: t[:, :1]}, "the capacity addressable by block_table"),
    (
        paged,
        {"block_table": lambda t: t + 1},
        "block_table[0][0] = 4 is outside the cache's 4 pages",
    ),
    (paged, {"block_table": lambda t: t - 1}, "block_table[1][0] = -1 is outside"),
    (cache, {"v": None}, "If key is supplied, value must also be passed in"),
    (
        cache,
        {"cache_seqlens": None},
        "If key is supplied, seqlens_k must also be passed in (cache_seqlens)",
    ),
    (
        cache,
        {x: lambda t: t.repeat(1, 4, 1, 1) for x in "kv"},
        "If key is supplied, it must have seqlen <= the seqlen of the KV cache: k has 8 rows, "
        "the cache 6",
    ),
    (
        cache,
        {"k_cache": torch.Tensor.half},
        "query and key must have the same dtype: q has fp32, k_cache has fp16",
    ),
    (
        cache,
        {"v_cache": torch.Tensor.bfloat16},
        "query and value must have the same dtype: q has fp32, v_cache has bf16",
    ),
    (
        cache,
        {"k": torch.Tensor.half},
        "Key must have the same dtype as query: q has fp32, k has fp16",
    ),
    (
        cache,
        {"v": torch.Tensor.half},
        "Value must have the same dtype as query: q has fp32, v has fp16",
    ),
    (
        cache,
        {"cache_seqlens": torch.Tensor.long},
        "seqlens_k must have dtype int32: cache_seqlens has int64",
    ),
    (
        cache,
        {"cache_seqlens": int32(3, 3, 3)},
        "cache_seqlens must have shape (batch_size) = (2), got (3)",
    ),
    (
        cache,
        {"cache_leftpad": torch.zeros(2)},
        "leftpad_k must have dtype int32: cache_leftpad has fp32",
    ),
    (cache, {"cache_seqlens": int32(3, 5)}, "exceeds the 6 rows of the KV cache"),
    (cache, {"cache_seqlens": int32(-1, 0)}, "cache_seqlens[0] must not be negative"),
    (cache, {"cache_leftpad": int32(0, 5)}, "cache_leftpad[1] = 5 is outside"),
    (
        cache,
        {"cache_batch_idx": int32(0, 3)},
        "cache_batch_idx[1] = 3 is outside the cache's 3 rows",
    ),
    (cache, {"cache_batch_idx": int32(1, 1)}, "cache_batch_idx appends twice to row 1"),
    (cache, {"cache_batch_idx": torch.zeros(2)}, "cache_batch_idx must have dtype int32"),
    (cache, {"k_cache": lambda t: t[:1].expand(3, -1, -1, -1)}, "k_cache must not overlap itself"),
    (cache, {"num_splits": 129}, "num_splits > 128 not supported, got 129"),
    (cache, {"num_splits": -1}, "num_splits must not be negative, got -1"),
    (
        cache,
        {"rotary_cos": torch.zeros(9, 8)},
        "If rotary cos is provided, rotary sin must also be provided",
    ),
    (
        cache,
        {"rotary_cos": torch.zeros(9, 8), "rotary_sin": torch.zeros(9, 8), "k": None, "v": None},
        "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be",
    ),
    (
        cache,
        {"rotary_cos": torch.zeros(9, 4), "rotary_sin": torch.zeros(9, 3)},
        "rotary_sin must have shape (seqlen_ro, rotary_dim / 2) = (9, 4), got (9, 3)",
    ),
    (
        cache,
        {"rotary_cos": torch.zeros(9, 16), "rotary_sin": torch.zeros(9, 16)},
        "rotary_dim must be <= headdim: 2 * 16 > 16",
    ),
    (
        cache,
        {"rotary_cos": torch.zeros(5, 8), "rotary_sin": torch.zeros(5, 8)},
        "cos/sin seqlen must be at least the seqlen of KV cache: rotary_cos has 5 rows, the "
        "cache 6",
    ),
    (
        cache,
        {"rotary_cos": torch.zeros(9, 8).half(), "rotary_sin": torch.zeros(9, 8)},
        "rotary_cos must have the same dtype as query: q has fp32, rotary_cos has fp16",
    ),
    (
        paged_cache,
        {"cache_batch_idx": int32(0, 1)},
        "Paged KVcache does not support cache_batch_idx",
    ),
    (paged_cache, {"cache_seqlens": int32(3, 5)}, "Paged KV cache: max(seqlens_k) + seqlen_knew"),
    (paged_cache, {"block_table": lambda t: t * 0 + 1}, "block_table appends twice to page 1"),
]


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    SENTENCES,
    ids=[f"{f.__name__}-{s}" for f, _, s in SENTENCES],
)
@on_each_backend
def test_sentence(arguments, changes, sentence, backend):
    if backend is CPU:  # others lack fp32, which is found after every fault
        FUNCTIONS[arguments](**arguments())
    broken = arguments(**changes)
    memory = Memory(broken)
    with backend.calls(), pytest.raises(RuntimeError) as error:
        FUNCTIONS[arguments](**broken)
    assert sentence in str(error.value)
    memory.assert_unchanged()


def test_autocast_casts_nothing():
    arguments = dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attn.flash_attn_func(**arguments).dtype == torch.float32
        with pytest.raises(RuntimeError, match="q has fp32, k has bf16"):
            flash_attn.flash_attn_func(**{**arguments, "k": arguments["k"].bfloat16()})


@pytest.mark.parametrize("name", ["fwd", "varlen_fwd", "bwd", "varlen_bwd"])
def test_extension_takes_no_generator(name):
    entry = next(e for e in ENTRIES if e.name == f"flash_attn_2_cuda.{name}")
    arguments = entry.draw(random.Random(0))
    arguments["generator"] = torch.Generator()
    with pytest.raises(RuntimeError, match="the RNG `generator` argument is no longer supported"):
        entry.call(arguments)


@on_each_backend
@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "fwd",
            {"return_softmax": True, "p_dropout": 0.0},
            "return_softmax is only supported when",
        ),
        ("fwd", {"out": torch.Tensor.double}, "Output must have the same dtype as inputs"),
        ("fwd", {"out": lambda t: t[:, :, :, :0]}, "out must have shape"),
        ("bwd", {"dq": torch.Tensor.double}, "dq must have the same dtype as q"),
        ("bwd", {"dout": torch.Tensor.double}, "query and dout must have the same dtype"),
        ("bwd", {"softmax_lse": lambda t: t[..., None]}, "softmax_lse must have shape"),
        ("bwd", {"p_dropout": 0.5, "rng_state": None}, "rng_state must be given"),
        ("bwd", {"dk": lambda t: t.new_empty(*t.shape[:3], 9999)}, "dk must have shape"),
        ("varlen_fwd", {"num_splits": 1000}, "num_splits > 128 not supported"),
        (
            "varlen_fwd",
            {"seqused_k": torch.zeros(99).int()},
            "seqused_k must have shape (batch_size)",
        ),
        ("varlen_fwd", {"leftpad_k": torch.zeros(1)}, "leftpad_k must have dtype int32"),
        ("fwd_kvcache", {"out": torch.Tensor.double}, "Output must have the same dtype as inputs"),
    ],
)
def test_sentence_of_the_extension(name, change, sentence, backend):
    entry = next(e for e in ENTRIES if e.name == f"flash_attn_2_cuda.{name}")
    arguments = replace(entry.draw(random.Random(1)), change)
    memory = Memory(arguments)
    with backend.calls(), pytest.raises(RuntimeError) as error:
        entry.call(arguments)
    assert sentence in str(error.value)
    memory.assert_unchanged()


def test_output_must_not_be_an_input():
    q = torch.zeros(1, 2, 2, 8)
    with pytest.raises(RuntimeError, match="out must not share memory with q"):
        flash_attn_2_cuda.fwd(q, q, q, q, None, 0.0, 1.0, False, -1, -1, 0.0, False, None)


def test_unknown_instruction_set():
    with pytest.raises(RuntimeError, match='"sse9" is not available; this machine has: baseline'):
        set_cpu_isa("sse9")


def test_wrong_number_of_arguments():
    with pytest.raises(TypeError, match="expected 4 arguments, got 1"):
        bind("mha_fwd", "q k v out")(torch.zeros(1, 1, 1, 1))


def test_wrong_kinds_of_arguments():
    call = bind("mha_fwd", "q is_causal softcap")
    q = torch.zeros(1, 1, 1, 1)
    for arguments, sentence in (
        (("text", False, 0.0), "q must be a tensor or None, got"),
        ((q, None, 0.0), "is_causal must be an integer, got None"),
        ((q, False, q), "softcap must be a number, got"),
    ):
        with pytest.raises(TypeError, match=sentence):
            call(*arguments)


def test_unknown_names():
    with pytest.raises(ValueError, match="there is no argument temperature"):
        bind("mha_fwd", "q k v temperature")
    with pytest.raises(ValueError, match="there is no function mha_sideways"):
        bind("mha_sideways", "q")


@on_each_backend
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_unbroken_calls_succeed(entry, backend):
    """But for what the backend lacks, of which fp32 is a part."""

    def check(r):
        error = check_call(entry, entry.draw(r), backend)
        assert error is None or (backend is not CPU and "the CUDA backend lacks" in str(error))

    for_random_calls(check, min(EXAMPLES, 60 if backend is CPU else 10))


@on_each_backend
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_broken_calls_raise_or_succeed(entry, backend):
    def check(r):
        arguments = entry.draw(r)
        for _ in range(r.choice([1, 1, 1, 2, 4])):
            break_argument(r, arguments)
        check_call(entry, arguments, backend)

    for_random_calls(check, EXAMPLES if backend is CPU else EXAMPLES // 3)
