"""Dropout: which probabilities it drops, that forward and backward agree, and S_dmask."""

from __future__ import annotations

import dataclasses
import math

import attention_cases
import numpy as np
import pytest
import torch
from attention_cases import BF16, FP16, FP32, Case, make_tensors
from reference import alibi_bias, attention_and_gradients, gradient_slack, visible

from flash_attn import _library, flash_attn_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import _flash_attn_forward, _get_block_size_n

pytestmark = pytest.mark.usefixtures("isa")


def philox_4x32_7(key, counter):
    """Philox-4x32 with 7 rounds on arrays of uint64 that hold 32-bit words."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    c0, c1, c2, c3 = counter
    low = np.uint64(0xFFFFFFFF)
    for _ in range(7):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), p1 & low, high0 ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


def documented_mask(seed, offset, p, b, h, sq, sk):
    """The keep mask ``(b, h, sq, sk)`` as common/dropout.h describes it."""
    head = np.arange(b * h, dtype=np.uint64).reshape(b, h, 1, 1)
    row = np.arange(sq, dtype=np.uint64)[:, None]
    col = np.arange(sk, dtype=np.uint64)
    row_pair = row // np.uint64(16) * np.uint64(8) + row % np.uint64(8)
    column = col // np.uint64(32) * np.uint64(4) + col % np.uint64(8) // np.uint64(2)
    key = seed ^ (offset >> 32 << 32)
    low_offset = np.uint64(offset & 0xFFFFFFFF)
    words = philox_4x32_7(key, np.broadcast_arrays(column, row_pair, head, low_offset))
    word = col % np.uint64(32) // np.uint64(8)
    byte = row % np.uint64(16) // np.uint64(8) * np.uint64(2) + col % np.uint64(2)
    chosen = np.take_along_axis(words, np.broadcast_to(word, (1, b, h, sq, sk)).astype(int), 0)[0]
    random = chosen >> (byte * np.uint64(8)) & np.uint64(255)
    return torch.from_numpy(random <= np.uint64(math.floor((1 - p) * 255)))


def run(case, p, seed=0):
    """``(out, lse, S_dmask, keep)``."""
    tensors, options, *_ = make_tensors(case)
    torch.manual_seed(seed)
    out, lse, s_dmask = flash_attn_func(**tensors, **options, dropout_p=p, return_attn_probs=True)
    keep = ~torch.signbit(s_dmask[:, :, : case.seqlens[0], : case.seqlens[1]])
    return out, lse, s_dmask, keep


@pytest.mark.parametrize("p", [0.1, 0.17, 0.2, 0.5, 0.9])
def test_mask_is_the_documented_function(p):
    case = Case(batch=2, seqlens=(113, 203), heads=(3, 3), dims=(40, 40))
    tensors, *_ = make_tensors(case)
    *_, s_dmask, rng_state = _flash_attn_forward(
        *tensors.values(), p, 40**-0.5, False, -1, -1, 0.0, None, True
    )
    seed, offset = (int(x) % 2**64 for x in rng_state)
    expected = documented_mask(seed, offset, p, 2, 3, 113, 203)
    assert torch.equal(~torch.signbit(s_dmask[:, :, :113, :203]), expected)


@pytest.mark.parametrize("p", [0.1, 0.17, 0.2, 0.5, 0.9])
def test_keep_rate(p):
    """Bytes are kept up to floor((1 - p) 255); over 1.3e6 of them the rate is within 5 standard
    deviations, over rows, columns and heads alone within 6 of their own."""
    case = Case(batch=2, seqlens=(400, 400), heads=(4, 4), dims=(8, 8))
    keep = run(case, p)[3].double()
    rate = (math.floor((1 - p) * 255) + 1) / 256
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(keep.mean().item() - rate) < 5 * deviation / math.sqrt(keep.numel())
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3)):
        means = keep.mean(dims)
        allowed = 6 * deviation / math.sqrt(keep.numel() / means.numel())
        assert (means - rate).abs().max().item() < allowed, dims


def test_heads_and_batch_entries_differ():
    keep = run(Case(batch=2, seqlens=(64, 64), heads=(2, 2)), 0.5)[3].flatten(0, 1)
    for i in range(4):
        for j in range(i):
            assert 0.4 < (keep[i] == keep[j]).double().mean() < 0.6


def test_seed():
    case = Case(batch=2, seqlens=(65, 129), heads=(4, 2))
    first, again, other = run(case, 0.2, 1), run(case, 0.2, 1), run(case, 0.2, 2)
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert not torch.equal(first[3], other[3])
    tensors, options, *_ = make_tensors(case)
    torch.manual_seed(1)
    calls = [flash_attn_func(**tensors, **options, dropout_p=0.2) for _ in range(2)]
    assert torch.equal(calls[0], first[0])
    assert not torch.equal(calls[1], first[0])


def test_rng_state_makes_calls_reproducible():
    tensors, *_ = make_tensors(Case())
    arguments = (*tensors.values(), 0.2, 0.125, False, -1, -1, 0.0, None, False)
    torch.manual_seed(3)
    first = _flash_attn_forward(*arguments)
    torch.manual_seed(3)
    second = _flash_attn_forward(*arguments)
    third = _flash_attn_forward(*arguments)
    assert torch.equal(first[3], second[3])
    assert not torch.equal(second[3], third[3])
    assert first[3].dtype == torch.int64
    assert first[3].shape == (2,)


def test_no_dropout_draws_no_random_number():
    tensors, *_ = make_tensors(Case(seqlens=(3, 3)))
    state = torch.get_rng_state()
    flash_attn_func(**tensors)
    assert torch.equal(torch.get_rng_state(), state)


def test_mask_depends_on_the_place_alone(isa, restore_threads):
    """Not on the instruction set, threads, heads' grouping, head dim, dtype, mask or the
    extents."""
    base = run(Case(batch=2, seqlens=(129, 257), heads=(4, 4), dims=(64, 64)), 0.3)[3]
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(run(Case(batch=2, heads=(4, 4)), 0.3)[3], base)
    variants = [
        Case(batch=2, heads=(4, 1)),
        Case(batch=2, heads=(4, 2), dims=(256, 40)),
        Case(batch=2, heads=(4, 4), dtype=BF16),
        Case(batch=2, heads=(4, 4), seqlens=(113, 200)),
    ]
    for case in variants:
        sq, sk = case.seqlens
        assert torch.equal(run(case, 0.3)[3], base[:, :, :sq, :sk]), case
    causal = Case(batch=2, heads=(4, 4), causal=True)
    seen = visible(129, 257, causal=True)
    assert torch.equal(run(causal, 0.3)[3][..., seen], base[..., seen])
    _library.set_cpu_isa(_library.cpu_isas()[0])
    assert torch.equal(run(Case(batch=2, heads=(4, 4)), 0.3)[3], base)


GRADIENT_CASES = [
    Case(batch=2, seqlens=(129, 257), heads=(4, 2), dims=(40, 24)),
    Case(batch=2, seqlens=(113, 300), heads=(4, 1), causal=True, softcap=5.0),
    Case(seqlens=(257, 129), heads=(2, 2), dims=(128, 128), causal=True, dlse=True),
    Case(seqlens=(200, 200), heads=(4, 2), window_size=(50, 20), alibi="bh", sinks=FP32),
    Case(seqlens=(65, 129), heads=(2, 1), bias="bhqk", sinks=FP32, dlse=True, softcap=2.0),
    Case(seqlens=(33, 70), heads=(2, 1), dims=(576, 512)),
    Case(seqlens=(1, 129), heads=(8, 1)),
]


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("p", [0.17, 0.6])
@pytest.mark.parametrize("index", range(len(GRADIENT_CASES)))
def test_forward_and_backward(index, p, dtype):
    """Against the reference with the mask that S_dmask shows: the backward must use the same one.
    The rate that probabilities are divided by is the nominal 1 - p."""
    case = GRADIENT_CASES[index]
    case = dataclasses.replace(case, dtype=dtype, seed=index)
    tensors, options, dout, dlse = make_tensors(case)
    keep = run(case, p, seed=5)[3]
    torch.manual_seed(5)
    actual = attention_cases.flash_forward_backward(tensors, options, dout, dlse, dropout_p=p)
    options = {**options, "keep": keep, "dropout_p": p}
    exact = attention_and_gradients(tensors, options, dout, dlse)
    plain = attention_and_gradients(tensors, options, dout, dlse, dtype=dtype)
    if dtype != FP32:
        plain["lse"] = attention_and_gradients(tensors, options, dout, dlse, dtype=FP32)["lse"]
    slack = gradient_slack(tensors, options, dout, exact["out"])
    attention_cases.assert_results_close(actual, exact, plain, slack)


def decode_s_dmask(s_dmask, scores, lse, block):
    """The probabilities that S_dmask holds relative to running maxima of blocks of keys, last block
    first.

    ``scores`` ``(b, h, sq, sk)`` are those before the softmax, -inf where hidden.
    """
    block_max = [part.amax(-1) for part in scores.split(block, dim=-1)]
    running = torch.stack(block_max[::-1]).cummax(0).values.flip(0)
    factor = torch.exp(running - lse)
    decoded = torch.zeros_like(scores)
    for n, part in enumerate(s_dmask.abs().to(scores.dtype).split(block, dim=-1)):
        decoded[..., n * block : (n + 1) * block] = part * factor[n][..., None]
    return torch.where(scores == -math.inf, 0.0, decoded)


DECODE_CASES = [
    Case(batch=2, seqlens=(113, 400), heads=(4, 2), dims=(32, 32)),
    Case(batch=2, seqlens=(129, 257), heads=(2, 2), dims=(64, 64), causal=True),
    Case(seqlens=(257, 129), heads=(2, 1), dims=(96, 96), window_size=(70, 20), softcap=5.0),
    Case(seqlens=(200, 300), heads=(2, 1), dims=(128, 128), alibi="h"),
    Case(seqlens=(70, 300), heads=(2, 1), dims=(256, 256), causal=True, softmax_scale=0.5),
]


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("index", range(len(DECODE_CASES)))
def test_s_dmask_holds_the_probabilities(index, dtype):
    case = dataclasses.replace(DECODE_CASES[index], dtype=dtype)
    (sq, sk), (h, hk), (d, _) = case.seqlens, case.heads, case.dims
    _, lse, s_dmask, _ = run(case, 0.17)
    rounded = [(n + 127) // 128 * 128 for n in (sq, sk)]
    assert s_dmask.shape == (case.batch, h, *rounded)
    assert s_dmask.dtype == dtype

    tensors, options, *_ = make_tensors(case)
    q, k = tensors["q"].double(), tensors["k"].double().repeat_interleave(h // hk, 2)
    scale = case.softmax_scale or d**-0.5
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if case.alibi:
        scores = scores + alibi_bias(options["alibi_slopes"].double(), sq, sk)
    seen = visible(sq, sk, case.causal, case.window_size)
    scores = scores.masked_fill(~seen, -math.inf)
    block = _get_block_size_n(torch.device("cpu"), d, True, case.causal)
    decoded = decode_s_dmask(s_dmask[:, :, :sq, :sk], scores, lse.double(), block)
    probs = scores.softmax(-1).nan_to_num(0.0)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-4)  # scores reach 40, with errors of 1e-5
    torch.testing.assert_close(decoded, probs, rtol=tolerance, atol=1e-7)
    assert (s_dmask[:, :, :sq, :sk].abs()[..., ~seen] == 0).all()
    assert (s_dmask.abs() <= 1).all()


def test_s_dmask_of_a_packed_batch():
    """Every sequence's own mask and probabilities, at its index of the batch."""
    lengths_q, lengths_k = [113, 0, 40], [129, 20, 200]
    q = torch.randn(sum(lengths_q), 4, 40)
    k = torch.randn(sum(lengths_k), 2, 40)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    torch.manual_seed(0)
    _, _, s_dmask = flash_attn_varlen_func(
        q, k, k, cu_q, cu_k, 113, 200, dropout_p=0.3, return_attn_probs=True
    )
    assert s_dmask.shape == (3, 4, 128, 256)
    padded_q, padded_k = torch.zeros(3, 113, 4, 40), torch.zeros(3, 200, 2, 40)
    for i in range(3):
        padded_q[i, : lengths_q[i]] = q[cu_q[i] : cu_q[i + 1]]
        padded_k[i, : lengths_k[i]] = k[cu_k[i] : cu_k[i + 1]]
    for i, (sq, sk) in enumerate(zip(lengths_q, lengths_k)):
        torch.manual_seed(0)
        _, _, dense = flash_attn_func(
            padded_q[:, :sq],
            padded_k[:, :sk],
            padded_k[:, :sk],
            dropout_p=0.3,
            return_attn_probs=True,
        )
        assert torch.equal(s_dmask[i, :, :sq, :sk], dense[i, :, :sq, :sk])


def test_s_dmask_is_empty_without_dropout():
    tensors, *_ = make_tensors(Case(seqlens=(3, 3)))
    assert flash_attn_func(**tensors, return_attn_probs=True)[2].shape == (0,)


def test_packed_batch_uses_the_mask_of_its_sequences():
    """Forward and backward of a packed batch equal those of the dense batch with the same
    lengths."""
    q, k, v = torch.randn(3, 2, 65, 2, 40).unbind(0)
    dout = torch.randn(2, 65, 2, 40)
    cu = torch.tensor([0, 65, 130], dtype=torch.int32)

    def run_and_differentiate(fn, *tensors, dout):
        leaves = [x.detach().requires_grad_() for x in tensors]
        torch.manual_seed(0)
        out = fn(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    dense = run_and_differentiate(
        lambda *x: flash_attn_func(*x, dropout_p=0.3, causal=True), q, k, v, dout=dout
    )
    packed = run_and_differentiate(
        lambda *x: flash_attn_varlen_func(*x, cu, cu, 65, 65, dropout_p=0.3, causal=True),
        *(x.flatten(0, 1) for x in (q, k, v)),
        dout=dout.flatten(0, 1),
    )
    assert all(torch.equal(x.flatten(0, 1), y) for x, y in zip(dense, packed))
