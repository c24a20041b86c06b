"""How arguments enter: every parameter of every entry point, in every form that callers give it.

What is not a tensor or number is a TypeError with the parameter's name; numpy's numbers and
negative views of tensors give what plain ones give; nothing is written over what is still read.
"""

from __future__ import annotations

import functools
import inspect
import random

import numpy as np
import pytest
import torch
from malformed_calls import ENTRIES
from reference import attention
from test_bad_input import Memory

import flash_attn
import flash_attn_2_cuda
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

# lib is the package's own; its callers have made the tensors plain.
PUBLIC = [entry for entry in ENTRIES if not entry.name.startswith("lib.")]
OWN_ERRORS = [entry for entry in PUBLIC if not entry.name.startswith("torch.ops.")]
SEEDS = range(10)


def by_name(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def tensors_of(x):
    """The tensors among the results of a call."""
    return [x] if isinstance(x, torch.Tensor) else [t for t in x if isinstance(t, torch.Tensor)]


def written_by(entry, arguments):
    """The names of the arguments that this call writes to."""
    names = [name for name in entry.written if arguments[name] is not None]
    if "k_new" in arguments and arguments["k_new"] is None:
        names = [name for name in names if not name.endswith("_cache")]
    return names


def outcome(entry, arguments):
    """All that a call returns and writes; dropout draws the same numbers in each."""
    torch.manual_seed(0)
    results = tensors_of(entry.call(arguments))
    return results + [arguments[name] for name in written_by(entry, arguments)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def drawn(entry, seed):
    return entry.draw(random.Random(seed))


@functools.cache
def tensors_given(entry_name):
    """Of each argument that some call gives a tensor with elements for: the seed of such a call."""
    entry = next(entry for entry in ENTRIES if entry.name == entry_name)
    seeds = {}
    for seed in range(24):
        for name, x in drawn(entry, seed).items():
            if torch.is_tensor(x) and x.numel() > 0:
                seeds.setdefault(name, seed)
    return seeds


# ------------------------------------------------------------------------------------------------
# What is written to


@by_name(PUBLIC)
def test_what_is_written_to_has_a_new_version(entry):
    """Autograd then knows that it is no longer what was recorded; nothing else has one."""
    for seed in {*SEEDS, *tensors_given(entry.name).values()}:
        arguments = drawn(entry, seed)
        tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        versions = {name: x._version for name, x in tensors.items()}
        entry.call(arguments)
        written = {arguments[name]._base for name in written_by(entry, arguments)} - {None}
        for name, x in tensors.items():
            is_written = name in written_by(entry, arguments) or x._base in written
            assert (x._version > versions[name]) == is_written, name


@by_name(PUBLIC)
def test_inference_tensors_are_written_to(entry):
    """They have no version."""
    for seed in SEEDS:
        expected = outcome(entry, drawn(entry, seed))
        with torch.inference_mode():
            assert_same(outcome(entry, drawn(entry, seed)), expected)


def test_backward_of_what_a_gradient_was_written_over():
    q, k, v = torch.randn(3, 1, 4, 2, 8).unbind(0)
    numbers = (0.0, 0.25, False, -1, -1, 0.0, None, False)
    out, lse, _, _ = _flash_attn_forward(q, k, v, *numbers)
    dq, weight = torch.zeros_like(q), torch.randn_like(q).requires_grad_()
    y = (dq * weight).sum()
    _flash_attn_backward(out, q, k, v, out, lse, dq, None, None, *numbers)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ------------------------------------------------------------------------------------------------
# Negative views


def negative_view(x):
    """The same elements: the memory holds their negatives."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


@by_name(PUBLIC)
def test_negative_views(entry):
    """One tensor is a negative view: the results are the same, or it is one that is written to."""
    seeds = {*SEEDS, *tensors_given(entry.name).values()}
    for seed in seeds:
        expected = outcome(entry, drawn(entry, seed))
        for name, x in drawn(entry, seed).items():
            if not isinstance(x, torch.Tensor):
                continue
            arguments = drawn(entry, seed)
            arguments[name] = negative_view(x)
            if name in written_by(entry, arguments):
                memory = Memory(arguments)
                sentence = f"^{entry.own_name(name)} must not be a negative view"
                with pytest.raises(RuntimeError, match=sentence):
                    entry.call(arguments)
                memory.assert_unchanged()
            else:
                assert_same(outcome(entry, arguments), expected)


def imaginary(x):
    """``x`` as the imaginary part of a conjugate: a negative view with a last stride of 2."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


def test_imaginary_parts_of_conjugates():
    q, k, v = torch.randn(3, 2, 5, 2, 16).unbind(0)
    slopes, sinks = torch.rand(2), torch.randn(2)
    options = {"causal": True, "alibi_slopes": slopes, "s_aux": sinks}
    expected = flash_attn_func(q, k, v, **options)
    options = {"causal": True, "alibi_slopes": imaginary(slopes), "s_aux": imaginary(sinks)}
    assert torch.equal(flash_attn_func(*map(imaginary, (q, k, v)), **options), expected)
    torch.testing.assert_close(
        expected, attention(q, k, v, causal=True, alibi_slopes=slopes, s_aux=sinks)[0]
    )


def test_gradients_of_negative_views():
    """Also those that autograd hands to the backward."""
    plain = [torch.randn(2, 5, 2, 16, requires_grad=True) for _ in range(3)]
    dout = torch.randn(2, 5, 2, 16)
    views = [torch._neg_view(-x) for x in plain]
    expected = torch.autograd.grad(flash_attn_func(*plain), plain, dout)
    actual = torch.autograd.grad(flash_attn_func(*views), plain, negative_view(dout))
    assert all(map(torch.equal, actual, expected))


# ------------------------------------------------------------------------------------------------
# What is not a tensor, or not a number

REQUIRED = {  # of the functions without annotations
    "fwd": "q k v",
    "varlen_fwd": "q k v cu_seqlens_q cu_seqlens_k",
    "bwd": "dout q k v out softmax_lse",
    "varlen_bwd": "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k",
    "fwd_kvcache": "q k_cache v_cache",
}


def tensor_parameters(entry):
    """The names of the pool of a function's tensor parameters, and whether None is one of their
    values: by their annotations, or by what valid calls give."""
    parameters = inspect.signature(entry.function).parameters
    for name in entry.arguments:
        annotation = str(getattr(parameters.get(entry.own_name(name)), "annotation", ""))
        if annotation in ("Tensor", "Optional[Tensor]"):
            yield name, annotation != "Tensor"
        elif annotation == "<class 'inspect._empty'>" and name in tensors_given(entry.name):
            yield name, name not in REQUIRED[entry.function.__name__].split()


TENSOR_PARAMETERS = [
    pytest.param(entry, name, optional, id=f"{entry.name}-{name}")
    for entry in OWN_ERRORS
    for name, optional in tensor_parameters(entry)
]


def test_tensor_parameters_are_found():
    assert len(TENSOR_PARAMETERS) >= 150


@pytest.mark.parametrize(("entry", "name", "optional"), TENSOR_PARAMETERS)
def test_not_a_tensor(entry, name, optional):
    """With and without the dispatcher's and autograd's ways through the package."""
    for seed in range(2):
        for value in ([3, 4], np.zeros(2, np.float32), "text", 5, *(() if optional else (None,))):
            arguments = drawn(entry, seed)
            if seed % 2 and entry.own_name("q") in arguments:
                arguments["q"].requires_grad_()
            arguments[name] = value
            memory = Memory(arguments)
            sentence = (
                f"^{entry.own_name(name)} must be a torch.Tensor, got {type(value).__name__}$"
            )
            with pytest.raises(TypeError, match=sentence):
                entry.call(arguments)
            memory.assert_unchanged()


@pytest.mark.parametrize("value", [[3, 4], np.zeros(2, np.int32), "text", 3.0])
def test_lengths_that_are_neither_numbers_nor_tensors(value):
    q, cache = torch.zeros(2, 1, 2, 16), torch.zeros(2, 6, 2, 16)
    kind = type(value).__name__
    with pytest.raises(
        TypeError, match=f"^cache_seqlens must be an int or a torch.Tensor, got {kind}$"
    ):
        flash_attn_with_kvcache(q, cache, cache, cache_seqlens=value)
    q, cu_seqlens = torch.zeros(4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(
        TypeError, match=f"^max_seqlen_k must be an int or a torch.Tensor, got {kind}$"
    ):
        flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 4, value)


def numbers_of(arguments):
    return [name for name, x in arguments.items() if type(x) in (int, float, bool)]


NOT_NUMBERS = ["1", [1], torch.zeros]
UNUSED = ("deterministic", "zero_tensors")  # any value does


@by_name([e for e in OWN_ERRORS if e.function.__module__ != flash_attn_2_cuda.__name__])
def test_not_a_number(entry):
    for name in numbers_of(drawn(entry, 0)):
        if name in UNUSED and entry.renamed:
            continue
        for value in NOT_NUMBERS:
            arguments = drawn(entry, 0)
            arguments[name] = value
            kind = r"(a number|a bool|an int or a torch\.Tensor)"
            sentence = f"^{entry.own_name(name)} must be {kind}, got {type(value).__name__}$"
            with pytest.raises(TypeError, match=sentence):
                entry.call(arguments)


NUMPY = {int: np.int64, float: np.float32, bool: np.bool_}


@by_name(PUBLIC)
def test_numbers_of_numpy(entry):
    """Also window_size as an array, and numbers of torch where torch does not check them."""
    for seed in SEEDS:
        for make in (lambda x: NUMPY[type(x)](x), torch.tensor):
            if make is torch.tensor and entry not in OWN_ERRORS:
                continue
            plain, other = drawn(entry, seed), drawn(entry, seed)
            for name in numbers_of(plain):
                other[name] = make(plain[name])
                plain[name] = type(plain[name])(other[name])
            if "window_size" in plain:
                other["window_size"] = np.array(plain["window_size"])
            assert_same(outcome(entry, other), outcome(entry, plain))


@pytest.mark.parametrize("length", [np.int64(3), np.uint8(3), np.array(3)])
def test_cache_length_of_numpy(length):
    q, cache = torch.randn(2, 1, 2, 16), torch.randn(2, 6, 2, 16)
    expected = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=3)
    assert torch.equal(flash_attn_with_kvcache(q, cache, cache, cache_seqlens=length), expected)


# ------------------------------------------------------------------------------------------------
# Tensors of other kinds


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


OTHER_KINDS = {
    "bool": lambda x: x > 0,
    "complex": lambda x: torch.complex(x, x),
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "double": torch.Tensor.double,
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "meta": lambda x: x.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "freed": freed,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", OTHER_KINDS)
@by_name(OWN_ERRORS)
def test_tensors_of_other_kinds(entry, kind):
    """Turned down, whichever they are."""
    for name, seed in tensors_given(entry.name).items():
        arguments = drawn(entry, seed)
        x = arguments[name]
        if kind == "meta" and (name in ("q", "qkv") or entry.function.__name__.startswith("_")):
            continue  # shapes alone, as torch's own operators give
        if x.dtype not in (torch.float32, torch.int32):
            continue
        arguments[name] = OTHER_KINDS[kind](x.float())
        memory = Memory({n: t for n, t in arguments.items() if n != name})
        with pytest.raises(RuntimeError):
            entry.call(arguments)
        memory.assert_unchanged()


def test_numbers_of_dimensions():
    q, cu_seqlens = torch.zeros(4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    for scalar in (torch.tensor(1.0), torch.tensor(1, dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="q must have shape"):
            flash_attn_func(scalar, q, q)
        with pytest.raises(RuntimeError, match="cu_seqlens_q must have shape"):
            flash_attn_varlen_func(q, q, q, scalar.int(), cu_seqlens, 4, 4)


def test_parameters_of_modules():
    q, k, v = torch.randn(3, 2, 5, 2, 16).unbind(0)
    expected = flash_attn_func(q, k, v)
    parameters = [torch.nn.Parameter(x) for x in (q, k, v)]
    assert torch.equal(flash_attn_func(*parameters), expected)
    with torch.no_grad():
        assert torch.equal(flash_attn_func(*parameters), expected)


def test_caches_that_require_grad():
    """They are written to as any other; nothing is recorded."""
    q, k = torch.randn(1, 1, 2, 16, requires_grad=True), torch.randn(1, 1, 2, 16)
    caches = [torch.zeros(1, 4, 2, 16, requires_grad=True) for _ in range(2)]
    out = flash_attn_with_kvcache(q, *caches, k, k, cache_seqlens=2)
    assert not out.requires_grad
    for cache in caches:
        assert torch.equal(cache[:, 2:3], k)


# ------------------------------------------------------------------------------------------------
# Shared memory


def cache_call(k_cache, v_cache, k, v, length=2, q=None, **options):
    if q is None:
        q = torch.randn(k.shape[0], 2, 4, k.shape[3], generator=torch.Generator().manual_seed(1))
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=length, causal=True, **options
    )


def test_appended_rows_that_lie_in_the_cache():
    """Fine where they are no row that is written, or are that row; else turned down."""
    memory = torch.randn(2, 9, 2, 16)
    v_cache, v = torch.randn(2, 9, 2, 16), torch.randn(2, 3, 2, 16)
    for length in range(7):
        expected_cache = memory.clone()
        expected = cache_call(expected_cache, v_cache.clone(), memory[:, 1:4].clone(), v, length)
        k_cache = memory.clone()
        if 0 < abs(length - 1) < 3:
            before = k_cache.clone()
            with pytest.raises(
                RuntimeError, match="k_cache must not share memory with k in the rows"
            ):
                cache_call(k_cache, v_cache.clone(), k_cache[:, 1:4], v, length)
            assert torch.equal(k_cache, before)
        else:
            assert torch.equal(
                cache_call(k_cache, v_cache.clone(), k_cache[:, 1:4], v, length), expected
            )
            assert torch.equal(k_cache, expected_cache)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_rotated_in_their_place(interleaved):
    rotary = {"rotary_interleaved": interleaved}
    rotary.update(rotary_cos=torch.rand(9, 5), rotary_sin=torch.rand(9, 5))
    k_cache, v_cache = torch.randn(2, 2, 9, 2, 16).unbind(0)
    expected_caches = k_cache.clone(), v_cache.clone()
    k, v = k_cache[:, 4:7].clone(), v_cache[:, 4:7].clone()
    expected = cache_call(*expected_caches, k, v, 4, **rotary)
    actual = cache_call(k_cache, v_cache, k_cache[:, 4:7], v_cache[:, 4:7], 4, **rotary)
    assert torch.equal(actual, expected)
    assert torch.equal(k_cache, expected_caches[0]) and torch.equal(v_cache, expected_caches[1])
    with pytest.raises(RuntimeError, match="k_cache must not share memory with k in the rows"):
        cache_call(
            k_cache[:1], v_cache[:1], k_cache[:1, 4:5].expand(1, 3, 2, 16), v[:1], 4, **rotary
        )


def test_queries_that_lie_in_appended_rows():
    k_cache, v_cache = torch.randn(2, 2, 9, 4, 16).unbind(0)
    k, v = torch.randn(2, 2, 3, 4, 16).unbind(0)
    expected = cache_call(k_cache.clone(), v_cache.clone(), k, v, 2, q=k_cache[:, 7:].clone())
    assert torch.equal(cache_call(k_cache, v_cache, k, v, 2, q=k_cache[:, 7:]), expected)
    before = k_cache.clone()
    for cache, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
        with pytest.raises(RuntimeError, match=f"{name} must not share memory with q in the rows"):
            cache_call(k_cache, v_cache, k, v, 2, q=cache[:, 4:6])
    assert torch.equal(k_cache, before)


def test_tables_that_lie_in_appended_rows():
    memory = torch.randn(1, 9, 1, 16)
    cos = memory.view(9, 16)[:, :4]
    k = torch.randn(1, 2, 1, 16)
    with pytest.raises(
        RuntimeError, match="k_cache must not share memory with rotary_cos in the rows"
    ):
        cache_call(
            memory, torch.zeros(1, 9, 1, 16), k, k, rotary_cos=cos, rotary_sin=torch.rand(9, 4)
        )


@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 8, 16])
def test_values_that_are_parts_of_the_keys(first, dtype, page_size):
    """Multi-head latent attention: one cache, whose rows hold the values; with rotary embedding
    where it leaves them alone."""
    table = {"block_table": torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)} if page_size else {}
    cache = torch.randn((4, 4, 1, 40) if page_size else (2, 8, 1, 40)).to(dtype)
    k = torch.randn(2, 3, 1, 40).to(dtype)
    part = (..., slice(first, first + 24))
    if first:
        table.update(rotary_cos=torch.rand(8, 4).to(dtype), rotary_sin=torch.rand(8, 4).to(dtype))
    lengths = torch.tensor([2, 5], dtype=torch.int32)
    q = torch.randn(2, 2, 4, 40).to(dtype)
    k_cache, v_cache = cache.clone(), cache[part].clone()
    expected = cache_call(k_cache, v_cache, k, k[part].clone(), lengths, q=q, **table)
    actual = cache_call(cache, cache[part], k, k[part], lengths, q=q, **table)
    assert torch.equal(actual, expected)
    assert torch.equal(cache, k_cache)
    assert torch.equal(cache[part], v_cache)


def test_values_that_disagree_with_the_keys():
    cache, k = torch.randn(2, 8, 1, 40), torch.randn(2, 3, 1, 40)
    before = cache.clone()
    rotary = {"rotary_cos": torch.rand(8, 4), "rotary_sin": torch.rand(8, 4)}
    for v_cache, v, options, sentence in (
        (cache[..., :24], k[..., :24].clone(), {}, "v must be the part of k that v_cache is"),
        (cache[..., :24], k[..., 1:25], {}, "v must be the part of k that v_cache is"),
        (cache[..., :24], k[..., :24], rotary, "rotary embedding must not change the part"),
        (cache.flip(0)[..., :24], k[..., :24], {}, None),
        (cache.view(1, 16, 1, 40)[:, 1:15].view(2, 7, 1, 40), k, {}, "unless the rows of one are"),
    ):
        k_cache = cache[:, : v_cache.shape[1]]
        if sentence is None:  # a copy: nothing is shared
            cache_call(cache.clone(), v_cache, k, v, **options)
            continue
        with pytest.raises(RuntimeError, match=sentence):
            cache_call(k_cache, v_cache, k, v, **options)
        assert torch.equal(cache, before)


def test_caches_in_one_tensor():
    k, v = torch.randn(2, 2, 3, 2, 16).unbind(0)
    for memory in (torch.randn(2, 9, 2, 2, 16), torch.randn(2, 9, 2, 32)):
        caches = memory.unbind(2) if memory.dim() == 5 else memory.split(16, dim=-1)
        separate = [x.clone() for x in caches]
        assert torch.equal(cache_call(*caches, k, v), cache_call(*separate, k, v))
        assert all(map(torch.equal, caches, separate))


def fwd(q, k, v, out):
    return flash_attn_2_cuda.fwd(q, k, v, out, None, 0.0, 0.3, True, -1, -1, 0.0, False, None)


def bwd(dout, q, k, v, out, lse, *gradients):
    args = (
        dout,
        q,
        k,
        v,
        out,
        lse,
        *gradients,
        None,
        0.0,
        0.3,
        True,
        -1,
        -1,
        0.0,
        False,
        None,
        None,
    )
    return flash_attn_2_cuda.bwd(*args)


def test_out_that_overlaps():
    memory = torch.randn(7, 2, 16)
    q, k, v = torch.randn(3, 1, 5, 2, 16).unbind(0)
    q.copy_(memory[:5])
    before = memory.clone()
    with pytest.raises(RuntimeError, match="out must not share memory with q"):
        fwd(memory[None, :5], k, v, memory[None, 2:])
    with pytest.raises(RuntimeError, match="out must not overlap itself"):
        fwd(q, k, v, memory[None, :1].expand(1, 5, 2, 16))
    with pytest.raises(RuntimeError, match="out must not overlap itself"):
        fwd(q, k, v, memory.as_strided((1, 5, 2, 16), (0, 16, 16, 1)))
    assert torch.equal(memory, before)
    interleaved = torch.randn(1, 5, 2, 2, 16)
    expected = fwd(q, k, v, None)[0]
    interleaved[:, :, 0] = q
    assert torch.equal(fwd(interleaved[:, :, 0], k, v, interleaved[:, :, 1])[0], expected)


def test_gradients_that_overlap():
    q, k, v, dout = torch.randn(4, 2, 5, 2, 16).unbind(0)
    out, lse, *_ = fwd(q, k, v, None)
    separate = [torch.empty_like(q) for _ in range(3)]
    expected = bwd(dout, q, k, v, out, lse, *separate)
    packed = torch.empty(2, 5, 3, 2, 16).unbind(2)
    assert_same(bwd(dout, q, k, v, out, lse, *packed), expected)
    memory = torch.zeros(2 * 5 * 2 * 16 + 1)
    near = [memory[i : i + q.numel()].view(q.shape) for i in (0, 1)]
    for gradients, sentence in (
        ((*near, separate[2]), "dq must not share memory with dk"),
        ((separate[0], *near), "dk must not share memory with dv"),
        ((near[0], separate[0], near[1]), "dq must not share memory with dv"),
        ((q, *separate[1:]), "dq must not share memory with q"),
        ((*separate[:2], dout.view(-1)[:].view(q.shape)), "dv must not share memory with dout"),
        ((separate[0][:, :1].expand(2, 5, 2, 16), *separate[1:]), "dq must not overlap itself"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            bwd(dout, q, k, v, out, lse, *gradients)
    assert not memory.any()


# ------------------------------------------------------------------------------------------------
# No sequences


def test_dense_batch_of_no_sequences():
    q = torch.randn(0, 3, 4, 16, requires_grad=True)
    k, v = (torch.randn(0, 5, 2, d, requires_grad=True) for d in (16, 8))
    sinks, bias = torch.randn(4, requires_grad=True), torch.randn(1, 4, 3, 5, requires_grad=True)
    for dropout_p in (0.0, 0.3):
        out, lse, s_dmask = flash_attn_func(
            q, k, v, dropout_p, return_attn_probs=True, s_aux=sinks, attn_bias=bias
        )
        assert out.shape == (0, 3, 4, 8) and lse.shape == (0, 4, 3)
        assert s_dmask.shape == ((0, 4, 128, 128) if dropout_p else (0,))
        gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, sinks, bias))
        for x, gradient in zip((q, k, v, sinks, bias), gradients):
            assert gradient.shape == x.shape and not gradient.any()
    assert flash_attn_func(q.detach(), k.detach(), v.detach(), causal=True).shape == (0, 3, 4, 8)
    assert flash_attn.flash_attn_qkvpacked_func(torch.zeros(0, 3, 3, 2, 8)).shape == (0, 3, 2, 8)


def test_packed_batch_of_no_sequences():
    """Tokens of no sequence: out 0, softmax_lse -inf, no gradient."""
    q, k, v = (torch.randn(n, h, 16, requires_grad=True) for n, h in ((5, 4), (7, 2), (7, 2)))
    sinks, bias = torch.randn(4, requires_grad=True), torch.randn(1, 1, 3, 4, requires_grad=True)
    offsets = torch.zeros(1, dtype=torch.int32)
    sequences = (offsets, offsets, 3, 4)
    for dropout_p in (0.0, 0.3):
        out, lse, s_dmask = flash_attn_varlen_func(
            q, k, v, *sequences, dropout_p, return_attn_probs=True, s_aux=sinks, attn_bias=bias
        )
        assert out.shape == (5, 4, 16) and not out.any()
        assert lse.shape == (4, 5) and (lse == -torch.inf).all()
        assert s_dmask.shape == ((0, 4, 128, 128) if dropout_p else (0,))
        gradients = torch.autograd.grad(out.sum(), (q, k, v, sinks, bias))
        for x, gradient in zip((q, k, v, sinks, bias), gradients):
            assert gradient.shape == x.shape and not gradient.any()
    pages = torch.randn(3, 2, 2, 16)
    table = torch.zeros(0, 2, dtype=torch.int32)
    out = flash_attn_varlen_func(q.detach(), pages, pages, *sequences, block_table=table)
    assert not out.any()


@pytest.mark.parametrize("paged", [False, True])
def test_cache_of_no_sequences(paged):
    cache = torch.randn(3, 6, 2, 16)
    before = cache.clone()
    q, k = torch.zeros(0, 2, 4, 16), torch.zeros(0, 1, 2, 16)
    options = {"return_softmax_lse": True}
    if paged:
        options["block_table"] = torch.zeros(0, 3, dtype=torch.int32)
    rotary = {"rotary_cos": torch.rand(20, 4), "rotary_sin": torch.rand(20, 4)}
    for lengths in (3, torch.zeros(0, dtype=torch.int32)):
        for new in ({}, {"k": k, "v": k}, {"k": k, "v": k, **rotary}):
            out, lse = flash_attn_with_kvcache(
                q, cache, before.clone(), cache_seqlens=lengths, **new, **options
            )
            assert out.shape == (0, 2, 4, 16) and lse.shape == (0, 4, 2)
    assert torch.equal(cache, before)
    assert flash_attn_with_kvcache(q, cache, cache).shape == (0, 2, 4, 16)


def test_operators_on_no_sequences():
    """Under torch's own checks."""
    q, k = torch.randn(0, 3, 2, 16, requires_grad=True), torch.randn(0, 5, 2, 16)
    score = (0.0, 0.3, True, -1, -1, 0.0, None, False)
    torch.library.opcheck(torch.ops.flash_attn._flash_attn_forward.default, (q, k, k, *score))
    tokens, offsets = torch.randn(4, 2, 16), torch.zeros(1, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.flash_attn._flash_attn_varlen_forward.default,
        (tokens, tokens, tokens, offsets, offsets, 0, 0, *score),
    )
