"""Filters of logits and the draw: against plain formulas and transformers' own processors."""

from __future__ import annotations

import math

import pytest
import torch

from flash_attn.utils._sampling import Sampling, penalize_repetition
from flash_attn.utils.generation import (
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)

VOCAB = 50


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_squared(seen, expected):
    """The probability of counts at least as far from the expected ones, fp64 both."""
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, VOCAB, VOCAB + 3])
def test_top_k(top_k):
    logits = random_logits(4, VOCAB)
    expected = torch.full_like(logits, float("-inf"))
    kept = logits.argsort(-1, descending=True)[:, : top_k or VOCAB]
    expected.scatter_(1, kept, logits.gather(1, kept))
    modify_logits_for_top_k_filtering(logits, top_k)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("top_p", [0.0, 1e-4, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p(top_p):
    """The smallest set of likeliest tokens whose probability is at least top_p."""
    logits = random_logits(6, VOCAB)
    expected = logits.clone()
    for row in expected if 0.0 < top_p < 1.0 else ():
        p, order = row.double().softmax(-1).sort(descending=True)
        count = int((p.cumsum(0) < top_p).sum()) + 1
        row[order[count:]] = float("-inf")
    modify_logits_for_top_p_filtering(logits, top_p)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(min_p):
    logits = random_logits(6, VOCAB)
    p = logits.double().softmax(-1)
    is_rest = p < min_p * p.amax(-1, keepdim=True)
    expected = logits.masked_fill(is_rest, float("-inf"))
    modify_logits_for_min_p_filtering(logits, min_p)
    assert torch.equal(logits, expected)


def test_filters_of_equal_logits():
    """Equal tokens: top-p keeps one at least, top-k all that equal the last."""
    logits = torch.zeros(1, 4)
    modify_logits_for_top_p_filtering(logits, 0.01)
    assert int(logits.isfinite().sum()) == 1
    logits = torch.zeros(1, 4)
    modify_logits_for_top_k_filtering(logits, 2)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0, "temperature": 0.7},
        {"top_k": 9, "top_p": 0.8, "temperature": 1.5},
        {"top_k": 0, "top_p": 0.6},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "temperature": 0.8},
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers(options):
    """Transformers' processors, in the order in which its generate applies them."""
    generation = pytest.importorskip("transformers.generation")
    options = dict(options)
    logits, ids = random_logits(5, VOCAB), torch.randint(VOCAB, (5, 8), generator=seeded(1))
    made = {
        "repetition_penalty": generation.RepetitionPenaltyLogitsProcessor,
        "temperature": generation.TemperatureLogitsWarper,
        "top_k": generation.TopKLogitsWarper,
        "top_p": generation.TopPLogitsWarper,
        "min_p": generation.MinPLogitsWarper,
    }
    expected = logits.clone()
    for name, processor in made.items():
        if options.get(name):
            expected = processor(options[name])(ids, expected)
    is_seen = torch.zeros(5, VOCAB, dtype=torch.bool).scatter_(1, ids, True)
    actual = Sampling(**options).probabilities(logits, is_seen)
    torch.testing.assert_close(actual, expected.softmax(-1))


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    is_seen = torch.tensor([[True, True, False, False]])
    expected = torch.tensor([[1.0, -4.0, 3.0, -3.0]])
    assert torch.equal(penalize_repetition(logits, is_seen, 2.0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 0, "temperature": 0.0}, {"top_k": 5, "temperature": 0}], ids=str
)
def test_greedy(options, dtype):
    logits = random_logits(3, 2, VOCAB).to(dtype)
    held = logits.clone()
    tokens = sample(logits, **options)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(logits, held)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 4, "temperature": 1.7},
        {"top_k": 0, "top_p": 0.7, "temperature": 3.0},
        {"top_k": 0, "min_p": 0.2, "temperature": 2.0},
    ],
    ids=str,
)
def test_draws_have_the_distribution(options):
    """Chi-squared test of 20,000 draws with a fixed seed."""
    count, logits = 20000, random_logits(12)
    p = Sampling(**options).probabilities(logits)
    tokens = sample(logits.expand(count, -1), **options, generator=seeded())
    seen = torch.bincount(tokens, minlength=12).double()
    assert float(seen[p == 0].sum()) == 0
    expected = p[p > 0].double() * count
    assert chi_squared(seen[p > 0], expected) > 0.01
    again = sample(logits.expand(count, -1), **options, generator=seeded())
    assert torch.equal(tokens, again)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_k": 1.5}, "top_k must be an int"),
        ({"top_p": 1.5}, r"top_p must be from 0 to 1, got 1\.5"),
        ({"min_p": -0.1}, r"min_p must be from 0 to 1, got -0\.1"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": float("inf")}, "temperature must be finite"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sample(torch.zeros(2, 4), **options)


def test_bad_repetition_penalty():
    with pytest.raises(ValueError, match="repetition_penalty must be finite and positive, got 0"):
        Sampling(repetition_penalty=0.0)
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor"):
        sample([1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-320, 1e-60, 1e-40, 1e-30, 0.3, 1.0, 1e30, 1e60, 1e300])
def test_temperature_of_any_size(temperature, dtype):
    """By exact differences in Python's floats, in which no temperature is 0 or inf."""
    logits = torch.tensor([[60.0, 50.0, -3.0, float("-inf")], [-7.0, 1e3, 1e3, 999.0]], dtype=dtype)
    p = Sampling(top_k=0, temperature=temperature).probabilities(logits)
    for row, given in zip(p, logits.tolist()):
        weights = [math.exp(max((x - max(given)) / temperature, -800.0)) for x in given]
        weights = [w if x > -math.inf else 0.0 for w, x in zip(weights, given)]
        expected = torch.tensor([w / sum(weights) for w in weights], dtype=dtype)
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_without_a_distribution_are_named(value):
    logits = random_logits(3, VOCAB)
    logits[1] = value
    with pytest.raises(ValueError, match=f"logits must have a finite maximum .*, got {value}"):
        sample(logits, top_k=0)
    logits[1, 1:] = 0.0  # one alone
    if value < 0:
        assert sample(logits, top_k=0)[1] != 0
    else:
        with pytest.raises(ValueError, match=f"logits must have a finite maximum .*, got {value}"):
            sample(logits, top_k=5, temperature=0.5)
