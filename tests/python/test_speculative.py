"""Speculative decoding: greedy tokens are the model's own; drawn ones have its distribution."""

from __future__ import annotations

import pytest
import torch
from tiny_decoder import POSITIONS, VOCAB, TinyDecoder, greedy, prompts

from flash_attn.utils._sampling import Sampling
from flash_attn.utils.generation import decode, decode_speculative, sample, sample_speculative


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def near(amount=0.03, **options):
    """Return a model that often says what the same one without noise does."""
    other = TinyDecoder(**options)
    for parameter in other.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=seeded(1)) * amount)
    return other


@pytest.fixture(scope="module", params=["rotary", "positions", "torch-attention"])
def trio(request):
    options = {"rotary": 8} if request.param != "positions" else {}
    options["use_flash_attn"] = request.param != "torch-attention"
    return TinyDecoder(**options), near(**options), near(0.0, **options)


def equal(actual, expected):
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 9, 1)], ids=str)
def test_greedy(trio, lengths, lookahead):
    model, rows = trio[0], prompts(*lengths)
    expected = [greedy(model, row, 28) for row in rows]
    ids = torch.stack(rows) if len(set(lengths)) == 1 else rows
    for draft in (*trio[1:], TinyDecoder(5, rotary=8)):
        model.calls.clear()
        out = decode_speculative(ids, model, draft, 28, lookahead)
        assert equal(out.sequences, [tokens for tokens, _ in expected])
        assert all(seqlen <= lookahead + 1 for _, seqlen in model.calls[1:])
        for i, (_, scores) in enumerate(expected):
            actual = torch.stack([score[i] for score in out.scores])
            torch.testing.assert_close(actual[: len(scores)], scores, rtol=1e-4, atol=1e-4)
            assert not actual[len(scores) :].any()
    assert equal(out.sequences, decode(ids, model, 28).sequences)
    assert not any(row.is_inference() for row in out.sequences)


def test_a_perfect_draft_saves_calls(trio):
    model, _, perfect = trio
    model.calls.clear()
    decode_speculative(torch.stack(prompts(5)), model, perfect, 45, 4)
    # The prompt's token, then five tokens a call for 39 more.
    assert model.calls == [(1, 5), *[(1, 5)] * 7, (1, 4)]


@pytest.mark.parametrize("lookahead", [2, 5])
def test_stop_tokens_and_limits(trio, lookahead):
    model, draft, _ = trio
    rows = prompts(5, 2, 7, 5)
    free = [greedy(model, row, 30)[0] for row in rows]
    stop = [int(free[0][8]), int(free[1][14])]
    expected = [greedy(model, row, 30, stop)[0] for row in rows]
    out = decode_speculative(rows, model, draft, 30, lookahead, eos_token_id=stop)
    assert equal(out.sequences, expected)
    padded = decode_speculative(
        torch.stack(prompts(5, 5)), model, draft, 30, lookahead, eos_token_id=stop, pad_token_id=7
    ).sequences
    plain = decode(
        torch.stack(prompts(5, 5)), model, 30, eos_token_id=stop, pad_token_id=7
    ).sequences
    assert torch.equal(padded, plain)
    out = decode_speculative(rows, model, draft, None, lookahead, max_new_tokens=6)
    assert equal(out.sequences, [tokens[: len(row) + 6] for tokens, row in zip(free, rows)])


def test_greedy_with_repetition_penalty(trio):
    model, draft, _ = trio
    rows = prompts(3, 9, 1)
    options = {"repetition_penalty": 1.4}
    out = decode_speculative(rows, model, draft, 40, 4, **options)
    assert equal(out.sequences, decode(rows, model, 40, **options).sequences)


def test_up_to_the_last_position():
    model = TinyDecoder()
    ids = torch.stack(prompts(4))
    out = decode_speculative(ids, model, near(), POSITIONS, 6)
    assert torch.equal(out.sequences[0], greedy(model, ids[0], POSITIONS)[0])
    with pytest.raises(ValueError, match=f"exceed the {POSITIONS} positions"):
        decode_speculative(ids, TinyDecoder(rotary=8), model, POSITIONS + 1)


FILTERS = [
    {"top_k": 0},
    {"top_k": 3, "temperature": 1.4},
    {"top_k": 0, "top_p": 0.8, "temperature": 2.0},
    {"top_k": 0, "min_p": 0.1, "temperature": 3.0},
]


def chi_squared(seen, expected):
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_rejection_sampling_keeps_the_distribution(options):
    """First and second tokens of 40,000 drafts, against the model's distributions.

    Logits of the second place do not depend on the first token, so that both are known.
    """
    count, vocab = 40000, 7
    logits = torch.randn(3, vocab, generator=seeded(2)) * 2
    logits_draft = logits[:2] + torch.randn(2, vocab, generator=seeded(3)) * 1.5
    generator = seeded(4)
    drafted = sample(logits_draft.expand(count, -1, -1), **options, generator=generator)
    tokens, numbers = sample_speculative(
        logits.expand(count, -1, -1),
        logits_draft.expand(count, -1, -1),
        drafted,
        **options,
        generator=generator,
    )
    assert tokens.shape == (count, 3) and set(numbers.unique().tolist()) == {1, 2, 3}
    p = Sampling(**options).probabilities(logits).double()
    q = Sampling(**options).probabilities(logits_draft).double()
    for place in range(3):
        got = tokens[numbers > place, place]
        seen, expected = torch.bincount(got, minlength=vocab).double(), p[place] * len(got)
        assert float(seen[p[place] == 0].sum()) == 0
        assert chi_squared(seen[p[place] > 0], expected[p[place] > 0]) > 0.01
    kept = float((numbers > 1).double().mean())
    assert abs(kept - float(torch.minimum(p[0], q[0]).sum())) < 0.01


def test_rejection_sampling_without_doubt():
    """Greedy: drafted tokens stay as long as they are the likeliest, then comes the likeliest."""
    logits = torch.randn(64, 4, 9, generator=seeded(5))
    best = logits.argmax(-1)
    drafted = best[:, :3].clone()
    drafted[:32, 1] = (drafted[:32, 1] + 1) % 9
    draft_logits = torch.nn.functional.one_hot(drafted, 9).float()
    tokens, numbers = sample_speculative(logits, draft_logits, drafted)
    assert numbers.tolist() == [2] * 32 + [4] * 32
    assert torch.equal(tokens[:32, :2], best[:32, :2]) and torch.equal(tokens[32:], best[32:])


@pytest.mark.parametrize("options", FILTERS[:2], ids=str)
def test_sampled_sequences_have_the_models_distribution(options):
    """Two tokens after one prompt: pairs of 4,000 rows against products of the model's own."""
    model = TinyDecoder(rotary=8)
    prompt, count, size = prompts(4)[0], 4000, 6
    draft = near(0.1, rotary=8)
    args = (prompt.expand(count, -1), model, draft, None, 3)
    out = decode_speculative(
        *args, **options, vocab_size=size, max_new_tokens=2, generator=seeded(6)
    )
    pairs = out.sequences[:, 4] * size + out.sequences[:, 5]
    sampling = Sampling(**options)
    first = sampling.probabilities(model(prompt[None]).logits[0, -1, :size])
    after = torch.cat((prompt.expand(size, -1), torch.arange(size)[:, None]), 1)
    second = sampling.probabilities(model(after).logits[:, -1, :size])
    p = (first[:, None] * second).flatten().double()
    seen = torch.bincount(pairs, minlength=size * size).double()
    assert float(seen[p == 0].sum()) == 0
    is_common = p * count > 5  # the chi-squared test is for counts that are not tiny
    rare = (seen[~is_common].sum()[None], p[~is_common].sum()[None] * count)
    seen, expected = (
        torch.cat((seen[is_common], rare[0])),
        torch.cat((p[is_common] * count, rare[1])),
    )
    has_any = expected > 0
    assert chi_squared(seen[has_any], expected[has_any]) > 0.01


def test_is_reproducible(trio):
    model, draft, _ = trio
    rows, options = prompts(3, 5), {"top_k": 0, "temperature": 2.0}
    outs = [
        decode_speculative(rows, model, draft, 30, **options, generator=seeded(seed)).sequences
        for seed in (1, 1, 2)
    ]
    assert equal(outs[0], outs[1]) and not equal(outs[0], outs[2])


def test_debug_and_timing(trio, capsys):
    model, draft, _ = trio
    ids = torch.stack(prompts(3))
    out = decode_speculative(
        ids, model, draft, 9, debug=True, enable_timing=True, output_scores=False
    )
    assert out.scores is None
    printed = capsys.readouterr().out
    assert "drafted tokens kept" in printed and "decoding time" in printed


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((0,), {}, "speculative_lookahead must be at least 1, got 0"),
        ((3,), {"vocab_size": VOCAB + 5}, None),
        ((3,), {"lengths": [9]}, "lengths must be from 1"),
    ],
    ids=str,
)
def test_bad_arguments(args, options, message):
    model, ids = TinyDecoder(), torch.stack(prompts(3))
    if message is None:
        small = TinyDecoder()
        small.lm_head = torch.nn.Linear(32, VOCAB - 1)
        message, options = "model has 61 logits and model_draft 60", {}
    else:
        small = TinyDecoder()
    with pytest.raises(ValueError, match=message):
        decode_speculative(ids, model, small, 9, *args, **options)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"do not fit: \(1, 3, 5\), \(1, 3, 5\), \(1, 3\)"):
        sample_speculative(torch.zeros(1, 3, 5), torch.zeros(1, 3, 5), torch.zeros(1, 3).long())
