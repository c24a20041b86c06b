"""The functions under torch.compile, dispatch modes and the profiler; dropout; the KV cache."""

from __future__ import annotations

import pytest
import torch
from backends import CPU, on_each_backend, on_each_backend_with
from reference import attention
from small_cases import (
    BATCH,
    DIM,
    HEADS,
    HEADS_K,
    SEQLEN_K,
    SEQLEN_Q,
    TOTAL_K,
    TOTAL_Q,
    assert_all_close,
    caches,
    dense,
    grads_of,
    int32,
    packed,
    randn,
    sequences,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn_2_cuda
from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_with_kvcache,
)

# ------------------------------------------------------------------------------------------------
# torch.compile, without a graph break


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def dense_extensions(**inputs):
    s_aux = randn(HEADS, **inputs)
    attn_bias = randn(1, HEADS, SEQLEN_Q, SEQLEN_K, **inputs)
    return [*dense(**inputs), s_aux, attn_bias]


COMPILED = {
    "dense": (
        lambda q, k, v, s, b: flash_attn_func(q, k, v, causal=True, s_aux=s, attn_bias=b),
        dense_extensions,
    ),
    "lse": (
        lambda q, k, v: flash_attn_func(q, k, v, window_size=(3, 0), return_attn_probs=True)[:2],
        dense,
    ),
    "dropout": (lambda q, k, v: flash_attn_func(q, k, v, 0.4), dense),
    "qkvpacked": (
        lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True),
        lambda **inputs: [randn(BATCH, SEQLEN_Q, 3, HEADS, DIM, **inputs)],
    ),
    "varlen": (
        lambda q, k, v: flash_attn_varlen_func(q, k, v, *sequences(), softcap=3.0),
        packed,
    ),
    "varlen kvpacked": (
        lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, *sequences()),
        lambda **inputs: [
            randn(TOTAL_Q, HEADS, DIM, **inputs),
            randn(TOTAL_K, 2, HEADS_K, DIM, **inputs),
        ],
    ),
}


def compare_compiled(name, compiler, backend=CPU, **options):
    function, make_inputs = COMPILED[name]

    def surrounded(*inputs):  # operations before and after, which the compiler may fuse
        results = function(*(x * 1.5 for x in inputs))
        return [x.sin() for x in (results if isinstance(results, tuple) else [results])]

    compiled = torch.compile(surrounded, fullgraph=True, backend=compiler, **options)
    results = []
    for run in (surrounded, compiled):
        inputs = list(make_inputs(**backend.inputs))
        torch.manual_seed(3)
        with backend.calls():
            outputs = run(*inputs)
            results.append((*outputs, *grads_of(outputs, inputs)))
    assert_all_close(results[1], results[0])


@pytest.mark.parametrize("name", COMPILED)
@on_each_backend_with("dynamic", True, False)
def test_compile(name, dynamic, backend):
    compare_compiled(name, "aot_eager", backend, dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compile_with_inductor(name):
    compare_compiled(name, "inductor")


def decode(q, k_cache, v_cache, k, v, cache_seqlens):
    out, lse = flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v),
        cache_seqlens=cache_seqlens,
        causal=True,
        return_softmax_lse=True,
    )
    return out + 1, lse


@on_each_backend
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("cache_seqlens", [5, int32([5, 3])], ids=["int", "tensor"])
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compile_kvcache(append, cache_seqlens, compiler, backend):
    compiled = torch.compile(decode, fullgraph=True, backend=compiler)
    results = []
    for run in (decode, compiled):
        q, k, v = dense(dtype=backend.dtype)
        k_cache, v_cache = caches(16, backend.dtype)
        new = (k, v) if append else (None, None)
        with backend.calls():
            outputs = run(q, k_cache, v_cache, *new, cache_seqlens)
        results.append((*outputs, k_cache, v_cache))
    assert_all_close(results[1], results[0])


def test_compiled_dropout_draws_anew():
    """Two equal calls with dropout are not merged into one."""
    q, k, v = dense()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def twice(q, k, v):
        return flash_attn_func(q, k, v, 0.5), flash_attn_func(q, k, v, 0.5)

    first, second = twice(q, k, v)
    assert not torch.equal(first, second)


# ------------------------------------------------------------------------------------------------
# Modes: what needs the dispatcher gets the operator, everything else the same result without it


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_dispatch_mode_sees_the_operator():
    for run, name in (
        (lambda: flash_attn_func(*dense()), "_flash_attn_forward"),
        (lambda: flash_attn_varlen_func(*packed(), *sequences()), "_flash_attn_varlen_forward"),
        (
            lambda: flash_attn_with_kvcache(dense()[0], *caches()),
            "_flash_attn_kvcache_forward",
        ),
    ):
        expected = run()
        with Recorder() as recorder:
            actual = run()
        assert f"flash_attn::{name}" in recorder.names
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("make_inputs", [dense, packed])
def test_operator_and_direct_call_agree(make_inputs):
    """Gradients with a mode, which goes through the operators, and without, which does not."""
    results = []
    for through_operator in (True, False):
        inputs = list(make_inputs(grad=True))
        arguments = () if make_inputs is dense else sequences()
        function = flash_attn_func if make_inputs is dense else flash_attn_varlen_func
        s_aux = randn(HEADS, grad=True)
        with Recorder() if through_operator else torch.enable_grad() as recorder:
            torch.manual_seed(1)
            out = function(*inputs, *arguments, 0.3, causal=True, s_aux=s_aux)
            results.append((out, *grads_of([out], [*inputs, s_aux])))
        if through_operator:
            assert sum("_forward" in name for name in recorder.names) == 1
            assert sum("_backward" in name for name in recorder.names) == 1
    assert all(map(torch.equal, *results))


def test_profiler_sees_the_operator():
    q, k, v = dense()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flash_attn_func(q, k, v)
    assert "flash_attn::_flash_attn_forward" in {event.name for event in profile.events()}


def test_fake_and_meta_tensors():
    with FakeTensorMode():
        q, k, v = torch.empty(2, 5, 4, 8), torch.empty(2, 7, 2, 8), torch.empty(2, 7, 2, 6)
        out = flash_attn_func(q, k, v)
        assert type(out) is not torch.Tensor
        assert out.shape == (2, 5, 4, 6)
    meta = [x.to("meta") for x in dense()]
    out, lse, _ = flash_attn_func(*meta, return_attn_probs=True)
    assert out.device.type == lse.device.type == "meta"


def test_negative_views():
    q, k, v = dense()
    out = flash_attn_func(*(torch._neg_view(x) for x in (q, k, v)))
    assert torch.equal(out, flash_attn_func(-q, -k, -v))


@pytest.mark.filterwarnings("ignore")
def test_traced_module_calls_the_operator():
    q, k, v = dense()
    traced = torch.jit.trace(lambda q, k, v: flash_attn_func(q, k, v), (q, k, v))
    assert torch.equal(traced(2 * q, k, v), flash_attn_func(2 * q, k, v))


# ------------------------------------------------------------------------------------------------
# Dropout


def test_dropout_follows_the_seed():
    q, k, v = dense()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(flash_attn_func(q, k, v, 0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[2], flash_attn_func(q, k, v, 0.5))  # the generator went on


def test_generator_is_left_alone_without_dropout():
    before = torch.get_rng_state()
    q, k, v = dense(grad=True)
    flash_attn_func(q, k, v).sum().backward()
    rng_state = torch.ops.flash_attn._flash_attn_forward(
        q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False
    )[3]
    assert torch.equal(torch.get_rng_state(), before)
    assert rng_state.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["dense", "varlen"])
def test_forward_and_backward_drop_the_same(kind):
    """S_dmask's signs are the mask: with it, the reference gives the same results and gradients."""
    q, k, v = (randn(1, rows, h, DIM, grad=True) for rows, h in ((40, 4), (70, 2), (70, 2)))
    torch.manual_seed(0)
    if kind == "dense":
        out, lse, s_dmask = flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    else:
        out, lse, s_dmask = flash_attn_varlen_func(
            *(q[0], k[0], v[0], int32([0, 40]), int32([0, 70]), 40, 70, 0.3),
            causal=True,
            return_attn_probs=True,
        )
        out, lse = out[None], lse[None]
    assert s_dmask.shape == (1, 4, 128, 128)
    keep = ~torch.signbit(s_dmask[:, :, :40, :70])
    expected = attention(q, k, v, causal=True, dropout_p=0.3, keep=keep)
    assert 0.2 < 1 - keep[0, 0].tril(30).sum() / torch.ones(40, 70).tril(30).sum() < 0.4
    torch.testing.assert_close((out, lse), expected)
    assert_all_close(grads_of([out], [q, k, v]), grads_of([expected[0]], [q, k, v]))


def test_activation_checkpointing_replays_the_mask():
    q, k, v = dense(grad=True)
    torch.manual_seed(5)
    out = torch.utils.checkpoint.checkpoint(flash_attn_func, q, k, v, 0.5, use_reentrant=False)
    actual = grads_of([out], [q, k, v])
    torch.manual_seed(5)
    expected_out = flash_attn_func(q, k, v, 0.5)
    assert torch.equal(out, expected_out)
    assert all(map(torch.equal, actual, grads_of([expected_out], [q, k, v])))


# ------------------------------------------------------------------------------------------------
# KV cache


def test_cache_seqlens_as_int():
    q, k, v = dense()
    results = []
    for cache_seqlens in (6, int32([6, 6])):
        k_cache, v_cache = caches(16)
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens)
        results.append((out, k_cache, v_cache))
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][1][:, 6 : 6 + SEQLEN_K], k)


def test_kvcache_has_no_gradient():
    q = dense(grad=True)[0]
    out, lse = flash_attn_with_kvcache(q, *caches(), return_softmax_lse=True)
    assert not out.requires_grad
    assert lse.shape == (BATCH, HEADS, SEQLEN_Q)
    torch.testing.assert_close((out, lse), attention(q.detach(), *caches()))


@pytest.mark.parametrize("through_operator", [False, True])
def test_append_counts_as_a_change_of_the_cache(through_operator):
    q, k, v = dense()
    k_cache, v_cache = caches(16)
    versions = k_cache._version, v_cache._version
    with Recorder() if through_operator else torch.no_grad():
        flash_attn_with_kvcache(q, k_cache, v_cache)
        assert (k_cache._version, v_cache._version) == versions
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=2)
    assert (k_cache._version, v_cache._version) == (versions[0] + 1, versions[1] + 1)


def test_append_in_inference_mode():
    with torch.inference_mode():
        q, k, v = dense()
        k_cache, v_cache = caches(16)
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=2)
        assert torch.equal(v_cache[:, 2 : 2 + SEQLEN_K], v)


def test_caches_need_a_contiguous_last_dimension():
    q = dense()[0]
    k_cache, v_cache = caches()
    with pytest.raises(AssertionError, match="k_cache must have contiguous last dimension"):
        flash_attn_with_kvcache(q, k_cache.transpose(2, 3).contiguous().transpose(2, 3), v_cache)


# ------------------------------------------------------------------------------------------------
# The extension module


def test_extension_module_dense():
    q, k, v = dense()
    score = (0.0, 0.3, True, 4, 0, 2.0)
    out, lse, s_dmask, rng_state = flash_attn_2_cuda.fwd(q, k, v, None, None, *score, False, None)
    expected = flash_attn_interface._flash_attn_forward(q, k, v, *score, None, False)
    assert all(map(torch.equal, (out, lse, s_dmask, rng_state), expected))
    given = torch.empty_like(out)
    assert flash_attn_2_cuda.fwd(q, k, v, given, None, *score, False, None)[0] is given
    assert torch.equal(given, out)

    dout = torch.randn_like(out)
    dq = torch.empty_like(q)
    results = flash_attn_2_cuda.bwd(
        dout, q, k, v, out, lse, dq, None, None, None, *score, True, None, rng_state
    )
    assert results[0] is dq
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = flash_attn_func(*leaves, 0.0, 0.3, True, (4, 0), 2.0)
    expected = torch.autograd.grad(expected, leaves, dout)
    assert all(map(torch.equal, results[:3], expected))
    assert results[3].shape == (BATCH, HEADS, 128)


def test_extension_module_varlen():
    q, k, v = packed()
    cu_seqlens_q, cu_seqlens_k, max_q, max_k = sequences()
    absent = (None, None, None, None)
    out, lse, _, rng_state = flash_attn_2_cuda.varlen_fwd(
        *(q, k, v, None, cu_seqlens_q, cu_seqlens_k, *absent, max_q, max_k),
        *(0.0, 0.3, False, True, 4, 0, 2.0, False, None),
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = flash_attn_varlen_func(*leaves, *sequences(), 0.0, 0.3, True, (4, 0), 2.0)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    results = flash_attn_2_cuda.varlen_bwd(
        *(dout, q, k, v, out, lse, None, None, None, cu_seqlens_q, cu_seqlens_k, None),
        *(max_q, max_k, 0.0, 0.3, False, True, 4, 0, 2.0, False, None, rng_state),
    )
    expected = torch.autograd.grad(expected, leaves, dout)
    assert all(map(torch.equal, results[:3], expected))


def test_extension_module_kvcache():
    q, k, v = dense()
    k_cache, v_cache = caches(16)
    out = torch.empty(BATCH, SEQLEN_Q, HEADS, v.shape[-1])
    results = flash_attn_2_cuda.fwd_kvcache(
        *(q, k_cache, v_cache, k, v, int32([6, 3]), None, None, None, None, None, None, out),
        *(0.3, True, -1, -1, 0.0, True, 0),
    )
    assert results[0] is out
    k_again, v_again = caches(16)
    expected = flash_attn_with_kvcache(
        *(q, k_again, v_again, k, v),
        cache_seqlens=int32([6, 3]),
        softmax_scale=0.3,
        causal=True,
        return_softmax_lse=True,
    )
    assert all(map(torch.equal, results, expected))
    assert torch.equal(k_cache, k_again)


@pytest.mark.parametrize(
    ("name", "count", "place"),
    [("fwd", 13, 12), ("varlen_fwd", 21, 20), ("bwd", 19, 17), ("varlen_bwd", 24, 22)],
)
def test_generator_is_rejected_first(name, count, place):
    arguments = [None] * count
    arguments[place] = torch.Generator()
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported"):
        getattr(flash_attn_2_cuda, name)(*arguments)


# ------------------------------------------------------------------------------------------------
# Malformed tensors reach the library's check, whatever their number of dimensions

SHAPES = [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 8), (2, 3, 4, 5, 8), (1, 1, 2, 3, 4, 8)]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wrong_number_of_dimensions(shape, place, requires_grad):
    tensors = [torch.zeros(2, 3, 4, 8, requires_grad=requires_grad) for _ in range(3)]
    tensors[place] = torch.zeros(shape, requires_grad=requires_grad)
    if len(shape) != 4:
        with pytest.raises(RuntimeError, match="must have shape"):
            flash_attn_func(*tensors)
    with pytest.raises(RuntimeError, match="must have shape"):
        flash_attn_varlen_func(*tensors, *sequences())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_tensor_without_its_dimension(shape):
    with pytest.raises(RuntimeError, match="must have shape"):
        flash_attn_qkvpacked_func(torch.zeros(shape))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_none_instead_of_a_tensor(place):
    tensors = list(dense())
    tensors[place] = None
    for run in (
        lambda: flash_attn_func(*tensors),
        lambda: flash_attn_varlen_func(*tensors, *sequences()),
        lambda: flash_attn_with_kvcache(*tensors, cache_seqlens=3),
    ):
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got NoneType"):
            run()
