"""Continuous batching: every sequence as if it were alone, and every block given back."""

from __future__ import annotations

import math

import pytest
import torch
from serving_cases import (
    VOCAB,
    StopText,
    TokenText,
    generation,
    make_scheduler,
    reference,
    run,
    tiny_model,
    tiny_tokenizer,
)
from tokenizers import Tokenizer, decoders, models


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def prompt(length, seed=0):
    return torch.randint(
        1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


class Recorder(torch.nn.Module):
    """A model that notes the shapes of its calls, and can fail."""

    takes_packed_tokens = True

    def __init__(self, model):
        super().__init__()
        self.model, self.calls, self.fails_at = model, [], None

    def forward(self, input_ids, **options):
        self.calls.append(tuple(input_ids.shape))
        if len(self.calls) == self.fails_at:
            raise RuntimeError("out of memory")
        return self.model(input_ids, **options)


def test_prompts_join_steps_of_others(model, tokenizer):
    recorder = Recorder(model)
    scheduler = make_scheduler(recorder)
    first, second = (
        generation(tokenizer, prompt(5), 6, top_k=1),
        generation(tokenizer, prompt(9, 1), 3),
    )
    scheduler.submit(first)
    scheduler.step()
    scheduler.submit(second)
    run(scheduler)
    assert recorder.calls == [(1, 5), (1, 10), (2, 1), (2, 1), (1, 1), (1, 1)]
    assert first.new_tokens == reference(model, first.prompt, 6)
    assert second.new_tokens == reference(model, second.prompt, 3)
    assert scheduler.cache.num_free_blocks == 64


def test_long_prompts_go_in_parts(model, tokenizer):
    """Nobody waits for a long prompt longer than a step's tokens take."""
    recorder = Recorder(model)
    scheduler = make_scheduler(recorder, max_running=4, max_step_tokens=8)
    short, long = generation(tokenizer, prompt(3), 9), generation(tokenizer, prompt(20, 1), 2)
    scheduler.submit(short)
    scheduler.step()
    scheduler.submit(long)
    run(scheduler)
    assert recorder.calls[:5] == [(1, 3), (1, 8), (1, 8), (1, 7), (2, 1)]
    assert short.new_tokens == reference(model, short.prompt, 9)
    assert long.new_tokens == reference(model, long.prompt, 2)


def test_sequences_give_way_when_blocks_run_out(model, tokenizer):
    """Ten blocks for five sequences of up to five: some start over, none notices."""
    scheduler = make_scheduler(model, num_blocks=10)
    made = [generation(tokenizer, prompt(3 + i, i), 14) for i in range(5)]
    for each in made:
        scheduler.submit(each)
    run(scheduler)
    assert scheduler.counts.preemptions > 0
    assert [g.new_tokens for g in made] == [reference(model, g.prompt, 14) for g in made]
    assert scheduler.cache.num_free_blocks == 10


def test_sequence_of_all_blocks(model, tokenizer):
    scheduler = make_scheduler(model, num_blocks=4)
    whole = generation(tokenizer, prompt(10), 7)  # 16 tokens go through the model
    scheduler.submit(whole)
    with pytest.raises(ValueError, match=r"10 tokens .* 8 new ones .* exceed the 17"):
        scheduler.submit(generation(tokenizer, prompt(10), 8))
    run(scheduler)
    assert whole.new_tokens == reference(model, whole.prompt, 7)


def test_shared_prefixes(model, tokenizer):
    recorder = Recorder(model)
    scheduler = make_scheduler(recorder)
    common = prompt(16)
    made = [generation(tokenizer, [*common, *prompt(3, i)], 4) for i in range(1, 4)]
    for each in made:
        scheduler.submit(each)
        run(scheduler)
    assert [g.num_reused for g in made] == [0, 16, 16]
    assert recorder.calls[4] == (1, 3)
    assert [g.new_tokens for g in made] == [reference(model, g.prompt, 4) for g in made]
    assert scheduler.counts.reused_tokens == 32 and scheduler.counts.prompt_tokens == 3 * 19


@pytest.mark.parametrize("max_running", [8, 2])
def test_choices_of_one_prompt(model, tokenizer, max_running):
    """The prompt goes through the model once; each choice is that of its own seed."""

    def choices():
        return [
            generation(
                *(tokenizer, prompt(6), 8),
                index=i,
                top_k=0,
                generator=torch.Generator().manual_seed(i),
            )
            for i in range(3)
        ]

    alone = choices()
    for each in alone:
        scheduler = make_scheduler(model)
        scheduler.submit(each)
        run(scheduler)
    recorder = Recorder(model)
    scheduler = make_scheduler(recorder, max_running=max_running)
    first, *siblings = together = choices()
    first.siblings = siblings
    scheduler.submit(first)
    events = run(scheduler)
    assert recorder.calls[0] == (1, 6)
    if max_running == 8:
        assert recorder.calls[1:] == [(3, 1)] * 7
    assert [g.new_tokens for g in together] == [g.new_tokens for g in alone]
    assert len({tuple(g.new_tokens) for g in together}) == 3
    assert len(events) == 24 and sum(e.finish_reason == "length" for e in events) == 3
    assert scheduler.cache.num_free_blocks == 64


def test_repetition_penalty(model, tokenizer):
    """Against ``generate``, which is tested by itself."""
    scheduler = make_scheduler(model)
    made = generation(tokenizer, prompt(6), 30, repetition_penalty=3.0)
    plain = generation(tokenizer, prompt(6), 30)
    for each in (made, plain):
        scheduler.submit(each)
    run(scheduler)
    ids = torch.tensor([made.prompt])
    expected = model.generate(ids, None, max_new_tokens=30, repetition_penalty=3.0)[0, 6:]
    assert made.new_tokens == expected.tolist() != plain.new_tokens


def test_cancelled_sequences(model, tokenizer):
    """One runs, one has siblings, one waits; their blocks are free after the next step."""
    scheduler = make_scheduler(model, max_running=3)
    made = [generation(tokenizer, prompt(5, i), 30) for i in range(4)]
    made[1].siblings = [generation(tokenizer, made[1].prompt, 30, index=1)]
    for each in made:
        scheduler.submit(each)
    for _ in range(3):
        scheduler.step()
    gone = [made[0], made[1], made[3]]
    for each in gone:
        each.is_cancelled = True
    counts = [len(each.new_tokens) for each in gone]
    run(scheduler)
    assert [len(each.new_tokens) for each in gone] == counts
    assert made[2].new_tokens == reference(model, made[2].prompt, 30)
    assert scheduler.counts.cancelled == 3 and scheduler.cache.num_free_blocks == 64


def test_failed_step(model, tokenizer):
    """Those in the step hear of it; the next ones are served."""
    recorder = Recorder(model)
    recorder.fails_at = 3
    scheduler = make_scheduler(recorder)
    failing = [generation(tokenizer, prompt(5, i), 9) for i in range(2)]
    failing[0].siblings = [generation(tokenizer, failing[0].prompt, 9, index=1)]
    for each in failing:
        scheduler.submit(each)
    events = run(scheduler)
    assert [str(e.error) for e in events[-3:]] == ["out of memory"] * 3
    assert scheduler.cache.num_free_blocks == 64 and scheduler.counts.failed == 3
    after = generation(tokenizer, prompt(5), 4)
    scheduler.submit(after)
    run(scheduler)
    assert after.new_tokens == reference(model, after.prompt, 4)


def test_stop_tokens(model, tokenizer):
    scheduler = make_scheduler(model)
    free = reference(model, prompt(5), 12)
    made = generation(tokenizer, prompt(5), 12, stop_tokens=[free[6]])
    scheduler.submit(made)
    events = run(scheduler)
    end = free.index(free[6])
    assert made.new_tokens == free[: end + 1] and events[-1].finish_reason == "stop"
    assert "".join(e.text for e in events) == tokenizer.decode(free[:end])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running": 0}, "max_running must be at least 1, got 0"),
        ({"max_step_tokens": 7}, r"max_step_tokens must be at least max_running \(8\), got 7"),
    ],
)
def test_bad_sizes(model, options, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(model, **options)


def test_text_of_parts_of_characters(tokenizer):
    """No part of a character is given out, and all text is."""
    text = "a €uro, 日本 and 🙂!"
    stream = TokenText(tokenizer)
    parts = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(parts) == text and "\ufffd" not in "".join(parts)
    assert len(parts) > len(list(filter(None, parts)))
    cut = tokenizer.encode("x🙂").ids[:-1]
    stream = TokenText(tokenizer)
    assert "".join(map(stream.push, cut)) == "x"
    assert stream.rest() == "\ufffd"


def metaspace_tokenizer():
    """As Llama's: a word brings its space, which the decoder drops at the beginning of a text."""
    words = ["▁Hello", "▁world", "!", *(f"<0x{byte:02X}>" for byte in "é€".encode())]
    bpe = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    made = Tokenizer(bpe)
    made.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="first")]
    )
    return made, {word: i for i, word in enumerate(words)}


def test_text_goes_on_after_the_prompt():
    made, ids = metaspace_tokenizer()
    prompt = [ids["▁Hello"]] * 12
    stream = TokenText(made, prompt)
    tokens = [ids["▁world"], ids["!"], ids["▁Hello"]]
    assert "".join(map(stream.push, tokens)) + stream.rest() == " world! Hello"
    assert made.decode(prompt + tokens) == made.decode(prompt) + " world! Hello"


@pytest.mark.parametrize(("text", "cut"), [("é", 1), ("€", 1), ("€", 2)])
def test_character_that_a_prompt_begins(text, cut, tokenizer):
    """It comes whole, whatever the decoder shows in place of its parts."""
    made, ids = metaspace_tokenizer()
    parts = [ids[f"<0x{byte:02X}>"] for byte in text.encode()]
    stream = TokenText(made, [ids["▁Hello"], *parts[:cut]])
    assert "".join(map(stream.push, [*parts[cut:], ids["!"]])) == f"{text}!"
    parts = tokenizer.encode(f"the {text}!").ids
    place = len(tokenizer.encode("the ").ids) + cut
    stream = TokenText(tokenizer, parts[:place])
    assert "".join(map(stream.push, parts[place:])) == f"{text}!"


class NaNFor(torch.nn.Module):
    """A model whose logits after a token are as a test says."""

    takes_packed_tokens = True

    def __init__(self, model, token, value):
        super().__init__()
        self.model, self.token, self.value = model, token, value

    def forward(self, input_ids, **options):
        out, packing = self.model(input_ids, **options), options["inference_params"].packing
        last = input_ids[:, -1] if packing is None else input_ids[0, packing.cu_seqlens_q[1:] - 1]
        out.logits[last == self.token] = self.value
        return out


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 0, "repetition_penalty": 1.1}])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_of_one_sequence_that_are_not_finite_end_that_one(model, tokenizer, value, options):
    wrong, sound = 7, prompt(5, 3)
    assert wrong not in sound + (expected := reference(model, sound, 6))
    scheduler = make_scheduler(NaNFor(model, wrong, value))
    others = [generation(tokenizer, sound, 6) for _ in range(2)]
    bad = generation(tokenizer, [3, wrong], 6, **options)
    bad.siblings = [generation(tokenizer, [3, wrong], 6, index=1, **options)]
    choices = [bad, *bad.siblings]
    for each in (others[0], bad, others[1]):
        scheduler.submit(each)
    events = run(scheduler)
    failed = [event for event in events if event.error is not None]
    assert [event.generation for event in failed] == choices
    assert all(isinstance(event.error, ValueError) for event in failed)
    assert [g.new_tokens for g in others] == [expected] * 2 and bad.new_tokens == []
    assert scheduler.counts.failed == 2 and scheduler.counts.finished == 2
    assert scheduler.cache.num_free_blocks == 64


def test_stop_strings_cost_what_they_can_match():
    """Time follows the text that is held back, not the length of the stop string."""
    looked_at = []

    class Noted(str):
        def __getitem__(self, key):
            looked_at.append(key)
            return str.__getitem__(self, key)

    stop = StopText([Noted("b" * 100_000)])
    assert stop.push("abbb") == "a" and len(looked_at) <= 4
    assert stop.push("bb") == "" and stop.push("a") == "bbbbba"
    assert len(looked_at) < 20


@pytest.mark.parametrize(
    ("stops", "parts", "text"),
    [
        (["end"], ["the e", "n", "d of"], "the "),
        (["end"], ["the e", "n", "emy"], "the enemy"),
        (["zz", "b"], ["aab", "zz"], "aa"),
        (["ab", "ba"], ["xb", "ab"], "x"),
        ([], ["a", "b"], "ab"),
        (["aab"], ["aa", "ab"], "a"),
        (["end"], ["the en"], "the en"),
    ],
)
def test_stop_strings(stops, parts, text):
    stop = StopText(stops)
    out = ""
    for part in parts:
        out += stop.push(part)
        if stop.is_over:
            break
    assert out + ("" if stop.is_over else stop.rest()) == text
