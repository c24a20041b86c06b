"""Attention with fp8 tensors: results, accuracy, NaN, what is refused, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from backends import BF16, EMULATOR, FP16, FP32, needs_emulator
from fp8_cases import FP8, NAN, Case, Problem, check, sampled_cases

import flash_attn
from flash_attn import v3

INT32 = torch.int32


@pytest.mark.parametrize("case", sampled_cases(45, seed=5), ids=str)
def test_feature_product(isa, case):
    check(case)


@pytest.mark.parametrize("layout", ["dense", "packed", "cache", "pages", "packed pages"])
@pytest.mark.parametrize("descale", ["", "head", "expanded", "block"])
@pytest.mark.parametrize("q_dtype", [FP8, BF16], ids=str)
def test_layouts_and_factors(layout, descale, q_dtype):
    rows = (150, 5, 33) if layout.startswith("packed") else (150,) * 3
    check(Case(layout, q_dtype, descale, tuple(zip(rows, (300, 129, 90))), causal=True))


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 3)])
@pytest.mark.parametrize("descale", ["head", "block"])
@pytest.mark.parametrize("dim", [1, 15, 16, 31, 64, 130])
def test_decoding(isa, heads, descale, dim):
    """Few queries: keys are read where they lie."""
    lengths = ((1, 700), (1, 3), (1, 200))
    check(Case("pages", FP8, descale, lengths, heads, (dim, dim), new=1, leftpad=True))


def test_all_numbers(isa):
    """Each of the 254 finite numbers, subnormal ones among them, is what it stands for."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8)
    numbers = numbers[numbers.float().isfinite()]
    assert numbers.numel() == 254
    v = numbers.expand(3, 1, 1, 254)  # one key: the weight is 1
    ones = torch.ones(3, 1, 1, 8).to(FP8)
    for seqlen_q in (1, 70):
        q = ones.expand(3, seqlen_q, 1, 8)
        out = v3.flash_attn_func(q, ones, v)
        assert torch.equal(out, v.to(BF16).expand_as(out))
    k = numbers.view(127, 1, 2, 1).expand(127, 1, 2, 16)
    for seqlen_q in (1, 70):
        q = torch.ones(127, seqlen_q, 2, 16).to(FP8)
        _, lse = v3.flash_attn_func(q, k, k, softmax_scale=1.0, return_attn_probs=True)
        expected = 16 * k[:, 0, :, 0].float()
        expected = expected[..., None].expand_as(lse)
        torch.testing.assert_close(lse, expected, rtol=1e-6, atol=0.0)


def worst(results, exact):
    errors = [(x.double() - y).abs().max().item() for (x, _), (y, _) in zip(results, exact)]
    return max(errors)


@pytest.mark.parametrize("layout", ["dense", "pages"])
@pytest.mark.parametrize("lengths", [((200, 300), (200, 129)), ((1, 900), (1, 300))])
def test_as_accurate_as_bf16(isa, layout, lengths):
    """With factors of powers of two bf16 holds the same numbers."""
    case = Case(layout, FP8, "head", lengths, causal=True, dims=(128, 128))
    problem = Problem(case)
    for factors in (problem.q_factors, problem.k_factors, problem.v_factors):
        factors.given.copy_(2.0 ** torch.randint(-3, 2, factors.given.shape))
    exact = problem.expected(torch.float64)
    fp8 = worst(problem.call(), exact)
    plain = worst(bf16_results(problem), exact)
    assert fp8 <= 1.1 * plain + 1e-6


def bf16_results(problem):
    results = []
    for i in range(len(problem.lengths)):
        q, k, v = (x[None].to(BF16) for x in problem.numbers(i))
        out, lse = v3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        results.append((out[0], lse[0]))
    return results


def quantized(x, is_by_block):
    """(fp8, factors) of x (b, s, h, d), each head's or block's largest number as fp8's."""
    b, s, h, d = x.shape
    blocks = -(-s // 128) if is_by_block else 1
    rows = -(-s // blocks) if not is_by_block else 128
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * rows - s))
    largest = padded.view(b, blocks, rows, h, d).abs().amax((2, 4)).transpose(1, 2)  # (b, h, n)
    factors = largest / 448
    of_rows = factors.repeat_interleave(rows, 2)[:, :, :s].transpose(1, 2)[..., None]
    return (x / of_rows).to(FP8), factors if is_by_block else factors[..., 0], of_rows


@pytest.mark.parametrize("is_by_block", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 256])
def test_error_beside_that_of_the_inputs(isa, seqlen_q, is_by_block):
    """What is computed from fp8 adds little to what rounding q, k and v to fp8 did."""
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(2, seqlen_q, 4, 64, generator=gen)
    k, v = torch.randn(2, 2, 600, 4, 64, generator=gen)
    k[:, 130:200] *= 9  # what factors of blocks are for
    v[:, 300:320] *= 9
    (q8, of_q, q_rows), (k8, of_k, k_rows), (v8, of_v, v_rows) = (
        quantized(x, is_by_block) for x in (q, k, v)
    )
    out = v3.flash_attn_func(q8, k8, v8, q_descale=of_q, k_descale=of_k, v_descale=of_v)

    def exact(q, k, v):
        q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    unrounded = exact(q, k, v)
    rounded = exact(*(x.double() * y for x, y in ((q8, q_rows), (k8, k_rows), (v8, v_rows))))
    of_inputs = (rounded - unrounded).square().mean().sqrt()
    assert (out.double() - unrounded).square().mean().sqrt() <= 1.5 * of_inputs
    assert (out.double() - unrounded).abs().max() <= 1.5 * (rounded - unrounded).abs().max()


# ------------------------------------------------------------------------------------------------
# NaN


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("descale", ["head", "block"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_of_what_is_used(isa, seqlen_q, which, descale):
    """Rows that see it have NaN where numbers meet it, and others are as they were."""
    case = Case("dense", FP8, descale, ((seqlen_q, 90),), (2, 2), (64, 64), causal=True)
    clean = Problem(case).call()
    problem = Problem(case)
    row = {"q": min(7, seqlen_q - 1), "k": 60, "v": 60}[which]
    getattr(problem, which)[1][row, 1, 5] = NAN
    for i, ((out, lse), (was, lse_was)) in enumerate(zip(problem.call(), clean)):
        sees = torch.zeros(seqlen_q, dtype=torch.bool)
        if i == 1:
            last = torch.arange(seqlen_q) + 90 - seqlen_q
            sees = torch.arange(seqlen_q) == row if which == "q" else last >= row
        column = slice(5, 6) if which == "v" else slice(None)
        assert out[sees, 1, column].isnan().all()
        assert lse[1, sees].isnan().all() == (which != "v" or not sees.any())
        rest = out.clone()
        rest[sees, 1, column] = was[sees, 1, column]
        torch.testing.assert_close(rest, was, rtol=0.02, atol=1e-3)
        torch.testing.assert_close(lse[:, ~sees], lse_was[:, ~sees])


@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("q_dtype", [FP8, BF16], ids=str)
@pytest.mark.parametrize("factor", [NAN, float("inf")])
def test_factors_of_what_is_not_seen(isa, seqlen_q, q_dtype, factor):
    """A sequence without keys gives 0, whatever its factors are; so do queries before all keys."""
    lengths, starts = torch.tensor([0, 3, 90], dtype=INT32), torch.arange(4, dtype=INT32) * seqlen_q
    q = fp8(3 * seqlen_q, 4, 64).to(q_dtype)
    k_cache, v_cache = fp8(2, 3, 96, 2, 64, seed=1)
    factors = torch.full((3, 2), 0.5)
    factors[:2] = factor
    out, lse, *_ = v3.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, cu_seqlens_q=starts, max_seqlen_q=seqlen_q,
        causal=True, v_descale=factors, return_softmax_lse=True,
    )  # fmt: skip
    without, first = max(seqlen_q - 3, 0), lse.unflatten(1, (3, seqlen_q))
    out = out.unflatten(0, (3, seqlen_q))
    for i, rows in ((0, seqlen_q), (1, without)):
        assert torch.equal(out[i, :rows], torch.zeros_like(out[i, :rows]))
        assert (first[:, i, :rows] == -torch.inf).all()
    assert not out[1, without:].isfinite().any()
    assert out[2].isfinite().all()


# ------------------------------------------------------------------------------------------------
# Ways to call


def fp8(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(FP8)


def test_as_a_serving_engine_calls():
    """Queries and a paged cache in fp8, factors of the whole layer expanded from one number."""
    q, cache = fp8(5, 8, 64), fp8(2, 10, 16, 2, 64, seed=1)
    k_cache, v_cache = cache.unbind(0)
    factors = [torch.tensor([x]).expand(2, 2) for x in (0.5, 0.25, 2.0)]
    table = torch.tensor([[3, 5], [1, 7]], dtype=INT32)
    lengths, starts = torch.tensor([20, 7], dtype=INT32), torch.tensor([0, 4, 5], dtype=INT32)
    out = v3.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, page_table=table, causal=True,
        cu_seqlens_q=starts, max_seqlen_q=4, q_descale=factors[0], k_descale=factors[1],
        v_descale=factors[2],
    )  # fmt: skip
    wide = v3.flash_attn_with_kvcache(
        q.float() * 0.5, k_cache.float() * 0.25, v_cache.float() * 2, cache_seqlens=lengths,
        page_table=table, causal=True, cu_seqlens_q=starts, max_seqlen_q=4,
    )  # fmt: skip
    assert out.dtype == BF16
    torch.testing.assert_close(out.float(), wide, rtol=0.01, atol=1e-3)


def test_packed_qkv():
    qkv = fp8(2, 50, 3, 4, 64)
    factors = [torch.rand(2, 4) + 0.5 for _ in range(3)]
    out = v3.flash_attn_qkvpacked_func(qkv, None, True, *factors)
    assert torch.equal(out, v3.flash_attn_func(*qkv.unbind(2), None, True, None, *factors))


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_dtype_of_a_given_out(isa, dtype):
    q, k, v = fp8(2, 9, 4, 64), fp8(2, 70, 2, 64, seed=1), fp8(2, 70, 2, 64, seed=2)
    out = torch.full((2, 9, 4, 64), NAN, dtype=dtype)
    returned, *_ = torch.ops.flash_attn_3.fwd(q, k, v, None, None, None, out)
    assert returned.data_ptr() == out.data_ptr()
    exact = v3.flash_attn_func(q.double().float(), k.float(), v.float())
    torch.testing.assert_close(out.float(), exact, rtol=torch.finfo(dtype).eps, atol=5e-3)
    if dtype == FP32:  # is not rounded on the way
        assert not torch.equal(out, out.to(BF16).float())


def test_queries_of_values():
    """k and v that lie side by side, of one factor."""
    latent = fp8(2, 40, 1, 96)
    k, v = latent[..., :32], latent[..., 32:]
    q, qv = fp8(2, 3, 4, 32, seed=1), fp8(2, 3, 4, 64, seed=2)
    of_q, of_kv = torch.full((2, 1), 0.5), torch.full((2, 1), 0.3)
    out = v3.flash_attn_func(
        q, k, v, qv=qv, q_descale=of_q, k_descale=of_kv, v_descale=of_kv.clone()
    )
    wide = v3.flash_attn_func(
        q.float() * 0.5, k.float() * 0.3, v.float() * 0.3, qv=qv.float() * 0.5
    )
    torch.testing.assert_close(out.float(), wide, rtol=0.01, atol=1e-3)
    with pytest.raises(NotImplementedError, match=r"^qv with k_descale and v_descale that differ"):
        v3.flash_attn_func(q, k, v, qv=qv, k_descale=of_kv, v_descale=of_q)


@pytest.mark.parametrize("causal", [False, True])
def test_compiled(causal):
    q, k, v = fp8(2, 9, 4, 64), fp8(2, 70, 2, 64, seed=1), fp8(2, 70, 2, 64, seed=2)
    factors = torch.rand(2, 2) + 0.5

    def call(q, k, v, factors):
        return v3.flash_attn_func(q, k, v, causal=causal, k_descale=factors, return_attn_probs=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(q, k, v, factors), call(q, k, v, factors)):
        assert torch.equal(x, y)


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 9, 4, 64, dtype=FP8), torch.empty(2, 70, 2, 64, dtype=FP8)
        out, lse = v3.flash_attn_func(q, k, k, return_attn_probs=True)
        assert (out.dtype, out.shape, lse.dtype) == (BF16, q.shape, FP32)
        out = v3.flash_attn_func(q.to(FP16), k, k)
        assert out.dtype == FP16
        cache = torch.empty(3, 8, 2, 64, dtype=FP8)
        out = v3.flash_attn_with_kvcache(q[:, :1], cache, cache, cache_seqlens=4)
        assert (out.dtype, out.shape) == (BF16, (2, 1, 4, 64))


def test_operators():
    """torch's own checks of fake kernels and registrations; that of schemas multiplies tensors,
    which torch cannot do in fp8."""
    q, k, factors = fp8(2, 9, 4, 64), fp8(2, 70, 2, 64, seed=1), torch.rand(2, 2)
    operators = torch.ops.flash_attn
    tests = ("test_faketensor", "test_autograd_registration")
    numbers = (0.125, True, -1, -1, 0.0)
    torch.library.opcheck(
        operators._flash_attn_fp8_forward, (q, k, k.clone(), *numbers),
        {"k_descale": factors, "out_dtype": FP32}, test_utils=tests,
    )  # fmt: skip
    new = (fp8(2, 1, 2, 64), fp8(2, 1, 2, 64, seed=3), torch.tensor([3, 9], dtype=INT32))
    torch.library.opcheck(
        operators._flash_attn_fp8_kvcache_append_forward,
        (q, k, k.clone(), *new, None, None, None, *numbers, 0),
        {"q_descale": factors}, test_utils=tests,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# What is refused

Q, K = fp8(2, 9, 4, 64), fp8(2, 300, 2, 64, seed=1)
FACTORS = torch.ones(2, 2)
LENGTHS = torch.tensor([40, 290], dtype=INT32)


def dense(**changes):
    return v3.flash_attn_func(**{"q": Q, "k": K, "v": K.clone(), **changes})


def cache(**changes):
    given = {"q": Q, "k_cache": K.clone(), "v_cache": K.clone(), "cache_seqlens": LENGTHS}
    return v3.flash_attn_with_kvcache(**{**given, **changes})


ONE_KEY = fp8(2, 1, 2, 64)
TABLE = torch.ones(300, 32, dtype=FP32).to(BF16)
REFUSED = [
    (dense, {"q_descale": FACTORS[:1]}, RuntimeError, r"q_descale must have shape \(batch_size, n"),
    (dense, {"k_descale": FACTORS[:, :1]}, RuntimeError, "k_descale must have shape"),
    (dense, {"v_descale": FACTORS.view(4)}, RuntimeError, "v_descale must have shape"),
    (dense, {"v_descale": FACTORS.double()}, ValueError, "v_descale must be fp32"),
    (dense, {"k_descale": 1.0}, TypeError, "k_descale must be a torch.Tensor"),
    (
        dense,
        {"k_descale": torch.ones(2, 2, 2)},
        RuntimeError,
        "k_descale must have a factor for each 128 of 300 rows of k: 3, got 2",
    ),
    (dense, {"q_descale": torch.ones(2, 2, 0)}, RuntimeError, "q_descale must have a factor"),
    (cache, {"v_descale": torch.ones(2, 2, 2)}, RuntimeError, "v_descale must have a factor for"),
    (dense, {"q": Q.to(BF16), "q_descale": 2 * FACTORS}, NotImplementedError, "q_descale belongs"),
    (dense, {"k": K.to(BF16)}, RuntimeError, "query and key must have the same dtype"),
    (dense, {"v": K.to(BF16)}, RuntimeError, "key and value must have the same dtype"),
    (dense, {"q": Q.to(FP16), "v": K.to(BF16)}, RuntimeError, "key and value must have the same"),
    (dense, {"q": Q.to(torch.float8_e5m2)}, NotImplementedError, "q has dtype torch.float8_e5m2"),
    (
        dense,
        {"q": Q.to(BF16).requires_grad_()},
        NotImplementedError,
        "q requires a gradient: attention with fp8 tensors has none",
    ),
    (cache, {"k": ONE_KEY.to(BF16), "v": ONE_KEY.to(BF16)}, RuntimeError, "Key must have the same"),
    (cache, {"k": ONE_KEY, "v": ONE_KEY.to(BF16)}, RuntimeError, "Value must have the same dtype"),
    (
        cache,
        {"k": ONE_KEY, "v": ONE_KEY, "rotary_cos": TABLE, "rotary_sin": TABLE},
        NotImplementedError,
        "rotary_cos and rotary_sin do not rotate fp8",
    ),
    (
        dense,
        {"attention_chunk": 7, "k_descale": torch.ones(2, 2, 3)},
        NotImplementedError,
        "attention_chunk with a k_descale for each 128 rows",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused(number):
    function, changes, error, text = REFUSED[number]
    with pytest.raises(error, match=f"^{text}"):
        function(**changes)


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_too_few_factors_are_refused_before_keys_are_appended(is_packed, name):
    """Of 150 queries and new keys."""
    q, new, caches = fp8(2, 150, 4, 64), fp8(2, 150, 2, 64, seed=1), torch.zeros(2, 2, 300, 2, 64)
    k_cache, v_cache = caches.to(FP8)
    options = {"cache_seqlens": torch.tensor([40, 150], dtype=INT32), name: torch.ones(2, 2, 1)}
    if is_packed:
        q, new = q.flatten(0, 1), new.flatten(0, 1)
        starts = torch.tensor([0, 150, 300], dtype=INT32)
        options |= {"cu_seqlens_q": starts, "cu_seqlens_k_new": starts, "max_seqlen_q": 150}
    with pytest.raises(RuntimeError, match=f"^{name} must have a factor for each 128"):
        v3.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, causal=True, **options)
    assert not k_cache.view(torch.uint8).any()
    assert not v_cache.view(torch.uint8).any()


def test_factors_are_not_read_beyond_their_end(isa):
    """Those of rows that no sequence has need not be there for the rows that there are."""
    case = Case("packed", FP8, "block", ((140, 300), (3, 20)), causal=True)
    check(case)


@pytest.mark.parametrize(
    "function", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
)
@pytest.mark.parametrize("q_dtype", [FP8, BF16], ids=str)
def test_functions_without_factors(function, q_dtype):
    q, k = Q.to(q_dtype), K
    more = ()
    if function == "flash_attn_varlen_func":
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        more = (*(torch.tensor([0, n, 2 * n], dtype=INT32) for n in (9, 300)), 9, 300)
    with pytest.raises(RuntimeError, match=r"^k\w* has dtype torch.float8_e4m3fn.*flash_attn\.v3"):
        getattr(flash_attn, function)(q, k, k.clone(), *more)


def test_backward():
    tensors = [x.to(FP8) for x in torch.randn(5, 1, 8, 2, 32)]
    lse = torch.zeros(1, 2, 8)
    with pytest.raises(
        NotImplementedError, match=r"^q has dtype torch.float8_e4m3fn: the backward"
    ):
        torch.ops.flash_attn_3.bwd(*tensors, lse)
    out, q, k, v, dout = (x.to(BF16) for x in tensors)
    for name, place in (("q", 1), ("k", 2)):
        given = [dout, q, k, v, out, lse, None, None, None]
        given[place] = given[place].to(FP8)
        if name == "k":
            given[3] = given[3].to(FP8)
        numbers = (0.0, 0.2, False, -1, -1, 0.0, None, True)
        with pytest.raises(RuntimeError, match=r"FlashAttention backward only support|same dtype"):
            flash_attn.flash_attn_interface._flash_attn_backward(*given, *numbers)


def test_equal_for_all_threads_and_batches(restore_threads):
    """Bitwise."""
    case = Case("pages", FP8, "block", ((3, 700), (3, 90), (3, 300)), causal=True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(Problem(case).call())
    for (x, _), (y, _) in zip(*results):
        assert torch.equal(x, y)


@needs_emulator
@pytest.mark.parametrize(
    ("q_dtype", "text"), [(FP8, "fp8"), (BF16, "keys and values in fp8 beside wider queries")]
)
def test_a_backend_without_fp8_says_so(q_dtype, text):
    with (
        EMULATOR.calls(),
        pytest.raises(RuntimeError, match=rf"^the CUDA backend lacks (.*, )?{text}.*CPU tensors"),
    ):
        dense(q=Q.to(q_dtype), k_descale=FACTORS)
