"""Packed ("varlen") batches: against the reference, and bitwise against each sequence run alone."""

from __future__ import annotations

import dataclasses
import random

import attention_cases
import pytest
import torch
from attention_cases import BF16, FP16, FP32, Case, make_tensors, sampled_cases
from backends import CPU
from reference import (
    INF,
    assert_attention_close,
    attention,
    attention_and_gradients,
    gradient_slack,
)

from flash_attn import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

pytestmark = pytest.mark.usefixtures("isa")

TAIL = 3  # rows of no sequence at the end of packed tensors; they hold NaN
NAN = float("nan")


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def pack(x, lengths):
    """The first ``lengths[i]`` rows of every ``x[i]``, one after another, then TAIL rows of NaN."""
    rows = [row[:n] for row, n in zip(x, lengths)]
    return torch.cat([*rows, x.new_full((TAIL, *x.shape[2:]), NAN)])


def pack_lse(x, lengths):
    """``(b, h, sq)`` to ``(h, total)``, in the manner of ``pack``."""
    return pack(x.transpose(1, 2), lengths).t().contiguous()


def sequence(i, lengths, tensors, options, dout, dlse):
    """Sequence i of a padded batch as a batch of one, in the form of ``make_tensors``."""
    sq, sk = lengths[i]

    def bias_entry(x):
        x = x[i : i + 1] if x.shape[0] > 1 else x
        x = x[:, :, :sq] if x.shape[2] > 1 else x
        return x[..., :sk] if x.shape[3] > 1 else x

    own = {"q": tensors["q"][i : i + 1, :sq]}
    own |= {n: tensors[n][i : i + 1, :sk] for n in "kv"}
    if "s_aux" in tensors:
        own["s_aux"] = tensors["s_aux"]
    if "attn_bias" in tensors:
        own["attn_bias"] = bias_entry(tensors["attn_bias"])
    own_options = dict(options)
    if options.get("alibi_slopes") is not None and options["alibi_slopes"].dim() == 2:
        own_options["alibi_slopes"] = options["alibi_slopes"][i : i + 1]
    own_dlse = None if dlse is None else dlse[i : i + 1, :, :sq]
    return own, own_options, dout[i : i + 1, :sq], own_dlse


def one_by_one(run, lengths, problem):
    """Packed results of running every sequence of a padded batch alone; rows of no sequence are 0.

    Gradients of s_aux and attn_bias, which the sequences share, are summed.
    """
    tensors = problem[0]
    results = [run(*sequence(i, lengths, *problem)) for i in range(len(lengths))]
    packed = {}
    for name in results[0]:
        parts = [r[name] for r in results]
        if name == "ds_aux":
            packed[name] = sum(parts)
        elif name == "dattn_bias":
            total = torch.zeros(tensors["attn_bias"].shape, dtype=parts[0].dtype)
            for i, part in enumerate(parts):
                row = slice(i, i + 1) if total.shape[0] > 1 else slice(None)
                total[row, :, : part.shape[2], : part.shape[3]] += part
            packed[name] = total
        elif name == "lse":
            packed[name] = torch.cat([p[0] for p in parts], dim=1)
        else:
            tail = parts[0].new_zeros((TAIL, *parts[0].shape[2:]))
            packed[name] = torch.cat([*(p[0] for p in parts), tail])
    return packed


def flash_varlen(lengths, tensors, options, dout, dlse, longest=None, backend=CPU):
    """Forward and, if the backend has it, backward of the packed batch."""
    lengths_q, lengths_k = zip(*lengths)
    leaves = {"q": pack(tensors["q"], lengths_q)}
    leaves |= {n: pack(tensors[n], lengths_k) for n in "kv"}
    leaves |= {n: tensors[n] for n in ("s_aux", "attn_bias") if n in tensors}
    here = backend.here
    has_backward = backend.has_backward([t.shape[-1] for t in (leaves["q"], leaves["v"])])
    leaves = {n: here(t).detach().requires_grad_(has_backward) for n, t in leaves.items()}
    longest = longest or (max(lengths_q), max(lengths_k))
    out, lse, _ = flash_attn_varlen_func(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        here(cumulative(lengths_q)),
        here(cumulative(lengths_k)),
        *longest,
        **{n: here(x) for n, x in options.items()},
        **{n: leaves[n] for n in ("s_aux", "attn_bias") if n in leaves},
        return_attn_probs=True,
    )
    results = {"out": out.detach().cpu(), "lse": lse.detach()[:, :-TAIL].cpu()}
    if not has_backward:
        return results
    outputs, grads = [out], [here(pack(dout, lengths_q))]
    if dlse is not None:
        outputs.append(lse)
        grads.append(here(pack_lse(dlse, lengths_q)))
    wanted = torch.autograd.grad(outputs, list(leaves.values()), grads)
    gradients = {f"d{n}": g.cpu() for n, g in zip(leaves, wanted)}
    return {**results, **gradients}


def sampled_lengths(case, seed):
    """Lengths up to case.seqlens of four sequences, an empty one on either side among them."""
    rng = random.Random(seed)
    sq, sk = case.seqlens
    lengths = [
        (sq, sk),
        (rng.randint(0, sq), rng.randint(0, sk)),
        rng.choice([(0, sk), (sq, 0), (0, 0), (1, sk)]),
        (rng.randint(1, sq), rng.randint(1, sk)),
    ]
    rng.shuffle(lengths)
    return lengths


def varlen_cases(count, seed, backend=CPU):
    """Cases of four sequences. Large ones are halved to keep the cost of a single batch entry's
    reference."""
    cases = sampled_cases(count, seed, backend)
    return [
        dataclasses.replace(c, batch=4, seqlens=tuple(max(n, 1) for n in c.seqlens)) for c in cases
    ]


def check(case, factor=2, backend=CPU):
    lengths = sampled_lengths(case, case.seed)
    problem = make_tensors(case)
    with backend.calls(case.seed):
        actual = flash_varlen(lengths, *problem, backend=backend)
    assert actual["out"].dtype == case.dtype

    def reference_in(dtype):
        return lambda *args: attention_and_gradients(*args, dtype=dtype)

    exact = one_by_one(reference_in(torch.float64), lengths, problem)
    plain = one_by_one(reference_in(case.dtype), lengths, problem)
    exact, plain = ({name: x[name] for name in actual} for x in (exact, plain))
    if case.dtype != FP32:
        plain["lse"] = one_by_one(reference_in(FP32), lengths, problem)["lse"]
    dense_out = attention_and_gradients(*problem)["out"]
    slack = gradient_slack(*problem[:3], dense_out)
    slack["lse"] = backend.lse_slack * attention_cases.largest_lse(exact["lse"])
    attention_cases.assert_results_close(actual, exact, plain, slack, factor)


@pytest.mark.parametrize("case", varlen_cases(20, seed=4), ids=str)
def test_feature_product(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", varlen_cases(300, seed=5), ids=str)
def test_feature_product_at_length(case):
    check(case, attention_cases.SWEEP_FACTOR)


@pytest.mark.parametrize("case", varlen_cases(20, seed=6), ids=str)
def test_equals_each_sequence_alone(case):
    """Bitwise, forward and backward; what sequences share (sinks, broadcast bias) is summed over
    the batch."""
    lengths = sampled_lengths(case, case.seed)
    problem = make_tensors(case)
    together = flash_varlen(lengths, *problem)
    alone = one_by_one(attention_cases.flash_forward_backward, lengths, problem)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(together[name], alone[name]), name
    if "b" in case.bias and "h" in case.bias and "q" in case.bias and "k" in case.bias:
        assert torch.equal(together["dattn_bias"], alone["dattn_bias"])


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_rows_of_no_sequence_are_zero(dtype):
    case = Case(dtype=dtype, batch=2, seqlens=(40, 70), heads=(4, 2))
    actual = flash_varlen([(40, 70), (5, 9)], *make_tensors(case))
    for name in ("out", "dq", "dk", "dv"):
        assert (actual[name][-TAIL:] == 0).all(), name
        assert actual[name].isfinite().all(), name


def test_no_tokens_at_all():
    case = Case(batch=2, seqlens=(4, 4), heads=(2, 1))
    actual = flash_varlen([(0, 0), (0, 0)], *make_tensors(case))
    for name in ("out", "dq", "dk", "dv"):
        assert (actual[name] == 0).all(), name
    actual = flash_varlen([(4, 0), (3, 0)], *make_tensors(case))
    assert (actual["lse"] == INF).all()
    assert (actual["dq"] == 0).all()


def test_single_queries_beside_empty_sequences():
    """max_seqlen_q == 1 with sequences of no query: they must not shift the others."""
    case = Case(batch=4, seqlens=(1, 70), heads=(4, 2))
    lengths = [(1, 70), (0, 20), (1, 33), (0, 0)]
    problem = make_tensors(case)
    together = flash_varlen(lengths, *problem)
    alone = one_by_one(attention_cases.flash_forward_backward, lengths, problem)
    assert all(torch.equal(together[n], alone[n]) for n in together)


def test_max_seqlens_are_bounds():
    """Tensors of no dimension are taken for ints; larger values than needed change nothing."""
    case = Case(batch=2, seqlens=(40, 70), heads=(4, 2), causal=True)
    lengths = [(40, 70), (5, 9)]
    problem = make_tensors(case)
    expected = flash_varlen(lengths, *problem)
    for longest in ((torch.tensor(40), torch.tensor(70)), (1000, 2000)):
        actual = flash_varlen(lengths, *problem, longest=longest)
        assert all(torch.equal(actual[n], expected[n]) for n in expected)


def test_packed_functions_equal_the_separate_one():
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(60, 3, 4, 40, generator=gen)
    cu = cumulative([33, 0, 27])
    dout = torch.randn(60, 4, 40, generator=gen)
    options = {"causal": True, "softcap": 5.0}

    def run(fn, leaves, *args):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, lse, _ = fn(*leaves, *args, **options, return_attn_probs=True)
        return out, lse, torch.autograd.grad(out, leaves, dout)

    separate = run(flash_attn_varlen_func, qkv.unbind(1), cu, cu, 33, 33)
    q, kv = qkv[:, 0], qkv[:, 1:]
    packed_kv = run(flash_attn_varlen_kvpacked_func, (q, kv), cu, cu, 33, 33)
    packed = run(flash_attn_varlen_qkvpacked_func, (qkv,), cu, 33)
    for out, lse, _ in (packed_kv, packed):
        assert torch.equal(out, separate[0])
        assert torch.equal(lse, separate[1])
    dq, dk, dv = separate[2]
    assert torch.equal(packed_kv[2][0], dq)
    assert torch.equal(packed_kv[2][1], torch.stack([dk, dv], 1))
    assert torch.equal(packed[2][0], torch.stack([dq, dk, dv], 1))


# ------------------------------------------------------------------------------------------------
# Forward only: seqused_k, leftpad_k, paged k and v.


def check_forward(out, lse, lengths_q, keys, values, q, options, backend):
    """``out`` and ``lse`` against the reference on each sequence's own keys and values, (1, sk, hk,
    d) each."""
    start = 0
    for i, (sq, k, v) in enumerate(zip(lengths_q, keys, values)):
        own = dict(options)
        if options.get("alibi_slopes") is not None and options["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = options["alibi_slopes"][i : i + 1]
        rows = (q[None, start : start + sq], k, v)
        exact = attention(*(x.double() for x in rows), **own)
        plain = attention(*rows, **own)
        plain_lse = attention(*(x.float() for x in rows), **own)[1]
        if sq > 0:
            end = start + sq
            assert_attention_close(out[start:end], exact[0][0], plain[0][0], f"out of {i}")
            slack = backend.lse_slack * attention_cases.largest_lse(exact[1])
            assert_attention_close(
                lse[:, start:end], exact[1][0], plain_lse[0], f"lse of {i}", slack
            )
        start += sq
    assert (out[start:] == 0).all()


FORWARD_OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (20, 3), "softcap": 2.0},
    {"causal": True, "alibi": True, "s_aux": True},
]


def forward_options(index, batch, h):
    """One of FORWARD_OPTIONS as (options of the reference, arguments of the library's forward)."""
    gen = torch.Generator().manual_seed(index)
    chosen = dict(FORWARD_OPTIONS[index])
    if chosen.pop("alibi", False):
        chosen["alibi_slopes"] = torch.rand(batch, h, generator=gen) * 0.3
    if chosen.pop("s_aux", False):
        chosen["s_aux"] = torch.randn(h, generator=gen)
    arguments = dict(chosen)
    left, right = arguments.pop("window_size", (-1, -1))
    arguments |= {"window_size_left": left, "window_size_right": right}
    arguments |= {
        "dropout_p": 0.0,
        "softmax_scale": 40**-0.5,
        "causal": chosen.get("causal", False),
    }
    return chosen, arguments


@pytest.mark.parametrize("index", range(len(FORWARD_OPTIONS)))
@pytest.mark.parametrize("leftpad", [None, [0, 7, 33, 0, 150]])
@pytest.mark.parametrize("seqused", [None, [257, 8, 33, 0, 290]])
@pytest.mark.parametrize("num_splits", [0, 1, 3])
def test_used_keys_and_left_padding(index, leftpad, seqused, num_splits):
    check_used_keys(index, leftpad, seqused, num_splits)


def check_used_keys(index, leftpad, seqused, num_splits, dtype=FP32, backend=CPU):
    """Keys outside [leftpad_k, seqused_k) hold NaN and must not be read."""
    lengths_q, lengths_k = [129, 3, 40, 5, 1], [257, 20, 64, 0, 300]
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths_q) + TAIL, 4, 40, generator=gen).to(dtype)
    k, v = torch.randn(2, sum(lengths_k) + TAIL, 2, 40, generator=gen).to(dtype).unbind(0)
    options, arguments = forward_options(index, 5, 4)
    starts = cumulative(lengths_k).tolist()
    first = leftpad or [0] * 5
    last = seqused or lengths_k
    ranges = [slice(s + a, s + b) for s, a, b in zip(starts, first, last)]
    keys = [k[None, r].clone() for r in ranges]
    values = [v[None, r].clone() for r in ranges]
    unused = torch.ones(len(k), dtype=torch.bool)
    for r in ranges:
        unused[r] = False
    k[unused] = NAN
    v[unused] = NAN

    def as_tensor(x):
        return None if x is None else torch.tensor(x, dtype=torch.int32)

    with backend.calls(index):
        out, lse, s_dmask, _ = _flash_attn_varlen_forward(
            q,
            k,
            v,
            cumulative(lengths_q),
            cumulative(lengths_k),
            max(lengths_q),
            max(lengths_k),
            leftpad_k=as_tensor(leftpad),
            seqused_k=as_tensor(seqused),
            num_splits=num_splits,
            **arguments,
        )
    assert s_dmask.numel() == 0
    check_forward(out, lse, lengths_q, keys, values, q, options, backend)


def make_pages(sequences, page_size, gen):
    """Scatters ``[(sk, hk, d)]`` over pages in random order; everything else in them is NaN.

    Returns:
        ``(pages, block_table)``; entries of the table that no key needs are out of range.
    """
    counts = [-(-len(s) // page_size) for s in sequences]
    num_pages = sum(counts) + 2
    order = torch.randperm(num_pages, generator=gen).tolist()
    pages = sequences[0].new_full((num_pages, page_size, *sequences[0].shape[1:]), NAN)
    table = torch.full((len(sequences), max(counts) + 1), 2**30, dtype=torch.int32)
    for i, rows in enumerate(sequences):
        for j, part in enumerate(rows.split(page_size)):
            if len(part):
                page = order.pop()
                pages[page, : len(part)] = part
                table[i, j] = page
    return pages, table


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("index", range(len(FORWARD_OPTIONS)))
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("num_splits", [0, 3])
def test_paged(page_size, index, dtype, num_splits):
    check_paged(page_size, index, dtype, num_splits)


def check_paged(page_size, index, dtype, num_splits, backend=CPU):
    """Keys in pages in random order; table entries that no key needs are out of range."""
    lengths_q, lengths_k = [129, 3, 40, 5, 1], [257, 20, 64, 0, 300]
    gen = torch.Generator().manual_seed(page_size)
    q = torch.randn(sum(lengths_q), 4, 40, generator=gen).to(dtype)
    keys = [torch.randn(n, 2, 40, generator=gen).to(dtype) for n in lengths_k]
    values = [torch.randn(n, 2, 40, generator=gen).to(dtype) for n in lengths_k]
    state = gen.get_state()
    k_pages, table = make_pages(keys, page_size, gen)
    v_pages, _ = make_pages(values, page_size, gen.set_state(state))
    options, arguments = forward_options(index, 5, 4)
    with backend.calls(page_size + index):
        out, lse, *_ = _flash_attn_varlen_forward(
            q,
            k_pages,
            v_pages,
            cumulative(lengths_q),
            cumulative(lengths_k),
            max(lengths_q),
            max(lengths_k),
            block_table=table,
            num_splits=num_splits,
            **arguments,
        )
    keys, values = [k[None] for k in keys], [v[None] for v in values]
    check_forward(out, lse, lengths_q, keys, values, q, options, backend)


def test_paged_through_the_public_function():
    """The same numbers as with contiguous keys, bitwise."""
    gen = torch.Generator().manual_seed(0)
    lengths_q, lengths_k = [9, 40], [300, 64]
    q = torch.randn(49, 4, 40, generator=gen)
    keys = [torch.randn(n, 2, 40, generator=gen) for n in lengths_k]
    pages, table = make_pages(keys, 16, gen)
    lengths = (cumulative(lengths_q), cumulative(lengths_k), 40, 300)
    k = torch.cat(keys)
    expected = flash_attn_varlen_func(q, k, k, *lengths, causal=True)
    actual = flash_attn_varlen_func(q, pages, pages, *lengths, causal=True, block_table=table)
    assert torch.equal(actual, expected)


def test_paged_has_no_backward():
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(4, 2, 8, generator=gen, requires_grad=True)
    pages, table = make_pages([torch.randn(9, 2, 8, generator=gen)], 4, gen)
    lengths = (cumulative([4]), cumulative([9]), 4, 9)
    out = flash_attn_varlen_func(q, pages, pages, *lengths, block_table=table)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()


@pytest.mark.parametrize("zero_tensors", [False, True])
def test_zero_tensors(zero_tensors):
    q = torch.randn(9, 2, 8)
    k = torch.randn(12, 2, 8)
    out, lse, *_ = _flash_attn_varlen_forward(
        q,
        k,
        k,
        cumulative([4, 3]),
        cumulative([5, 6]),
        4,
        6,
        0.0,
        0.3,
        False,
        zero_tensors=zero_tensors,
    )
    assert (out[7:] == 0).all()
    assert lse[:, :7].isfinite().all()
    if zero_tensors:
        assert (lse[:, 7:] == -INF).all()
