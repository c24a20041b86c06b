"""Generation with a cache, compared with the same model without one, token by token."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from tiny_decoder import POSITIONS, VOCAB, TinyDecoder, greedy, prompts

from flash_attn.utils.generation import (
    InferenceParams,
    Packing,
    allocate_inference_cache,
    decode,
    decode_speculative,
)
from flash_attn.utils.paged_cache import PagedKVCache

LENGTHS = (3, 9, 1, 17)
MODELS = {
    "positions": {},
    "rotary": {"rotary": 8},
    "rotary-part-interleaved": {"rotary": 4, "rotary_emb_interleaved": True},
    "xpos": {"rotary": 8, "rotary_emb_scale_base": 64.0},
    "window": {"rotary": 8, "window_size": (4, 0)},
    "alibi": {"use_alibi": True},
    "torch-attention": {"rotary": 8, "use_flash_attn": False},
}
models = pytest.mark.parametrize("name", MODELS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return TinyDecoder(rotary=8)


def assert_sequences(actual, expected):
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected)):
        assert torch.equal(a, b), f"sequence {i}: {a.tolist()} instead of {b.tolist()}"


@models
def test_greedy_batch(name):
    model, ids = TinyDecoder(**MODELS[name]), torch.stack(prompts(5, 5, 5))
    expected = [greedy(model, row, 24) for row in ids]
    model.calls.clear()
    out = model.generate(ids, 24, return_dict_in_generate=True, output_scores=True)
    assert model.calls == [(3, 5), *[(3, 1)] * 18]
    assert out.sequences.dtype == torch.int64 and out.sequences.shape == (3, 24)
    assert_sequences(out.sequences, [tokens for tokens, _ in expected])
    scores = torch.stack([scores for _, scores in expected], 1)
    assert len(out.scores) == 19
    # The cache's products come in other orders: a few units in the last place.
    torch.testing.assert_close(torch.stack(out.scores), scores, rtol=1e-4, atol=1e-4)


@models
def test_greedy_prompts_of_different_lengths(name):
    model, rows = TinyDecoder(**MODELS[name]), prompts(*LENGTHS)
    expected = [greedy(model, row, 24) for row in rows]
    model.calls.clear()
    out = model.generate(rows, 24, return_dict_in_generate=True, output_scores=True)
    packed = [(1, sum(LENGTHS))] if name != "torch-attention" else [(4, max(LENGTHS))]
    assert model.calls == [*packed, *[(4, 1)] * 22]
    assert_sequences(out.sequences, [tokens for tokens, _ in expected])
    for i, (_, scores) in enumerate(expected):
        actual = torch.stack([score[i] for score in out.scores[: len(scores)]])
        torch.testing.assert_close(actual, scores, rtol=1e-4, atol=1e-4)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=VOCAB - 1)
    for lengths in (LENGTHS, torch.tensor(LENGTHS)):
        again = model.generate(padded, 24, lengths=lengths)
        assert_sequences(again, out.sequences)


def test_model_that_takes_no_packed_tokens(model, monkeypatch):
    monkeypatch.setattr(model, "takes_packed_tokens", False)
    rows = prompts(*LENGTHS)
    expected = [greedy(model, row, 24)[0] for row in rows]
    model.calls.clear()
    assert_sequences(model.generate(rows, 24), expected)
    assert model.calls[0] == (4, 17)


def test_max_new_tokens(model):
    rows = prompts(*LENGTHS)
    out = model.generate(rows, None, max_new_tokens=6)
    assert_sequences(out, [greedy(model, row, len(row) + 6)[0] for row in rows])
    ids = torch.stack(prompts(4, 4))
    assert torch.equal(model.generate(ids, None, max_new_tokens=5), model.generate(ids, 9))


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_tokens(model, as_list):
    """Each sequence ends with its first stop token; padding follows while others go on."""
    rows = prompts(5, 5, 5, 5)
    free = [greedy(model, row, 24)[0] for row in rows]
    stop = [int(free[0][8]), int(free[1][14])]
    expected = [greedy(model, row, 24, stop)[0] for row in rows]
    assert len({len(tokens) for tokens in expected}) > 1
    eos = stop if as_list else torch.tensor(stop)
    assert_sequences(model.generate(rows, 24, eos_token_id=eos), expected)
    for pad in (None, 7):
        out = model.generate(torch.stack(rows), 24, eos_token_id=eos, pad_token_id=pad)
        assert out.shape[1] == max(map(len, expected))
        for row, tokens in zip(out, expected):
            assert torch.equal(row[: len(tokens)], tokens)
            assert bool((row[len(tokens) :] == (stop[0] if pad is None else pad)).all())
    model.calls.clear()
    model.generate(rows[0][None], 24, eos_token_id=stop[0])
    assert len(model.calls) == 4  # the prompt's and those of three tokens before the stop


@pytest.mark.parametrize("is_ragged", [False, True])
def test_teacher_outputs(model, is_ragged):
    """Tokens are the teacher's where it has them; scores are those of the teacher's sequence."""
    rows = prompts(5, 9, 2) if is_ragged else prompts(5, 5, 5)
    teacher = torch.stack(prompts(14, 14, 14, seed=3))
    for row, prompt in zip(teacher, rows):
        row[: len(prompt)] = prompt
    ids = rows if is_ragged else torch.stack(rows)
    out = decode(ids, model, 18, teacher_outputs=teacher, top_k=0, generator=seeded())
    for i, sequence in enumerate(out.sequences):
        assert torch.equal(sequence[:14], teacher[i])
        logits = model(teacher[i][None]).logits[0]
        first = len(rows[i]) - 1
        actual = torch.stack([score[i] for score in out.scores[: 13 - first]])
        torch.testing.assert_close(actual, logits[first:13], rtol=1e-4, atol=1e-4)
    if not is_ragged:
        greedily = decode(ids, model, 18, teacher_outputs=teacher).sequences
        assert_sequences(greedily, [greedy(model, row, 18)[0] for row in teacher])


@pytest.mark.parametrize("paged", [False, True])
def test_sampling_is_reproducible_and_within_its_filters(model, paged):
    rows = prompts(3, 9, 6)
    options = {"top_k": 4, "top_p": 0.9, "temperature": 1.5, "repetition_penalty": 1.2}
    if paged:
        options["cache"] = PagedKVCache.for_model(model, 64, 4)
    outs = [model.generate(rows, 30, **options, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert_sequences(outs[0], outs[1])
    assert not all(torch.equal(a, b) for a, b in zip(outs[0], outs[2]))
    for tokens, prompt in zip(outs[0], rows):
        for i in range(len(prompt), 30):
            logits = model(tokens[None, :i]).logits[0, -1]
            seen = tokens[:i].unique()
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.2, logits[seen] * 1.2)
            assert int((logits > logits[tokens[i]]).sum()) < 4


def test_repetition_penalty_under_greedy_decoding(model):
    """Tokens of the prompt and generated ones are penalized, one sequence apart from another."""
    rows = prompts(3, 8, 1)
    for row, actual in zip(rows, model.generate(rows, 40, repetition_penalty=1.5)):
        tokens = row
        while len(tokens) < 40:
            logits = model(tokens[None]).logits[0, -1]
            for token in tokens.unique():
                logits[token] *= 1.5 if logits[token] < 0 else 1 / 1.5
            tokens = torch.cat((tokens, logits.argmax()[None]))
        assert torch.equal(actual, tokens)


def test_vocab_size(model):
    logits_of = model(prompts(4)[0][None]).logits[0, -1]
    size = int(logits_of.argmax())  # without the likeliest token
    out = decode(prompts(4)[0][None], model, 30, vocab_size=size)
    assert int(out.sequences.max()) < size and out.scores[0].shape == (1, size)


def test_padded_vocabulary_of_a_config(model, monkeypatch):
    config = types.SimpleNamespace(pad_vocab_size_multiple=8, vocab_size=20)
    monkeypatch.setattr(model, "config", config, raising=False)
    assert int(model.generate(torch.tensor([[1, 2, 3]]), 40).max()) < 20


class Streamer:
    def __init__(self):
        self.values, self.has_ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("paged", [False, True])
def test_streaming(model, paged):
    rows = prompts(3, 9)
    options = {"cache": PagedKVCache.for_model(model, 64, 4)} if paged else {}
    expected = model.generate(rows, None, max_new_tokens=5)
    new = torch.stack([row[-5:] for row in expected])
    steps = []
    model.generate(rows, None, max_new_tokens=5, streamer=steps.append, **options)
    assert torch.equal(torch.stack(steps, 1), new)
    stream = model.stream(rows, None, max_new_tokens=5, **options)
    assert torch.equal(torch.stack(list(stream), 1), new)
    streamer = Streamer()
    model.generate(torch.stack(prompts(4, 4)), 8, streamer=streamer, **options)
    assert [value.shape for value in streamer.values] == [(2, 4), *[(2,)] * 4]
    assert streamer.has_ended


def test_streamer_of_transformers(model):
    streamers = pytest.importorskip("transformers.generation.streamers")
    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: "".join(f"<{int(i)}>" for i in ids))
    streamer = streamers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=1)
    out = model.generate(prompts(4), 9, streamer=streamer)[0]
    assert "".join(streamer) == tokenizer.decode(out[4:])


def test_stream_checks_at_once_and_stops_early(model):
    with pytest.raises(ValueError, match="max_length"):
        model.stream(prompts(3), 2)
    cache = PagedKVCache.for_model(model, 16, 4)
    stream = model.stream(prompts(3), 30, cache=cache)
    next(stream)
    assert cache.num_free_blocks < 16
    stream.close()
    assert cache.num_free_blocks == 16
    del stream


def test_generation_keeps_gradients_out_and_the_mode(model):
    grown = TinyDecoder(rotary=8).train().requires_grad_(True)
    out = grown.generate(torch.stack(prompts(3, 3)), 8)
    assert not out.requires_grad and grown.training
    loss = grown(out).logits.float().logsumexp(-1).sum()
    loss.backward()  # tables of rotary embedding made while generating do not stand in the way
    assert all(p.grad is not None for p in grown.parameters())


def test_timing_is_printed(model, capsys):
    decode(torch.stack(prompts(3)), model, 5, enable_timing=True)
    assert capsys.readouterr().out.startswith("Prompt processing + decoding time: ")


def test_graphs_on_a_cpu_have_no_effect_but_a_warning(model):
    ids = torch.stack(prompts(3))
    with pytest.warns(UserWarning, match="cg=True has no effect on cpu"):
        out = model.generate(ids, 9, cg=True)
    assert torch.equal(out, model.generate(ids, 9))


def test_graphs_need_a_gpu(model):
    from flash_attn.utils.generation import update_graph_cache

    with pytest.raises(ValueError, match="CUDA graphs need the model on a GPU, it is on cpu"):
        update_graph_cache(model, None, 1, 4, 8)


def test_output_classes(model):
    ids = torch.stack(prompts(3))
    plain = model.generate(ids, 6)
    assert isinstance(plain, torch.Tensor)
    out = model.generate(ids, 6, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain) and out.scores is None
    generation = pytest.importorskip("transformers.generation")
    assert isinstance(out, generation.GenerateDecoderOnlyOutput)
    assert torch.equal(out["sequences"], plain)


def test_without_transformers():
    """Generation imports it only for the class of an output, and does without."""
    code = """
import sys, torch
from tiny_decoder import TinyDecoder, prompts
model, ids = TinyDecoder(), torch.stack(prompts(3))
tokens = model.generate(ids, 6)
assert not any(name.split(".")[0] == "transformers" for name in sys.modules)
sys.modules["transformers"] = sys.modules["transformers.generation"] = None
out = model.generate(ids, 6, return_dict_in_generate=True, output_scores=True)
assert torch.equal(out.sequences, tokens) and len(out.scores) == 3
"""
    folder = __file__.rsplit("/", 1)[0]
    code = f"import sys; sys.path.insert(0, {folder!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((IDS, 3), {}, r"max_length \(3\) must exceed the prompt's 3 tokens"),
        ((IDS, None), {}, "give either max_length or max_new_tokens"),
        ((IDS, 9), {"max_new_tokens": 3}, "give either max_length or max_new_tokens"),
        ((IDS, None), {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ((IDS[0], 9), {}, r"input_ids must be \(batch, seqlen\) .* got \(3,\)"),
        ((IDS[:, :0], 9), {}, "at least one token"),
        ((IDS.float(), 9), {}, "input_ids must be int32 or int64, got torch.float32"),
        (([IDS[0], IDS], 9), {}, r"input_ids\[1\] must be \(seqlen,\)"),
        (([], 9), {}, "input_ids must be"),
        ((IDS, 9), {"lengths": [4]}, r"lengths must be from 1 to input_ids' 3 tokens, got \[4\]"),
        ((IDS, 9), {"lengths": [1, 2]}, "lengths must have an entry for each of 1 rows"),
        (([IDS[0]], 9), {"lengths": [1]}, "lengths needs input_ids to be one tensor"),
        ((IDS, 9), {"eos_token_id": -5}, "eos_token_id must not be negative"),
        ((IDS, 9), {"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        (
            (IDS, 9),
            {"teacher_outputs": IDS.expand(2, 3)},
            "teacher_outputs must have a row for each",
        ),
        ((IDS, 9), {"tensor_parallel": 2}, r"tensor_parallel \(2\) must be the size of"),
        ((IDS, 9), {"min_p": 2}, "min_p must be from 0 to 1"),
        ((IDS, POSITIONS + 1), {}, f"65 tokens .* exceed the {POSITIONS} positions"),
        ((IDS, None), {"max_new_tokens": 62}, f"65 tokens .* exceed the {POSITIONS} positions"),
        ((IDS, 9), {"cache": 5}, "cache must be a PagedKVCache, got int"),
        ((IDS,), {}, "give either max_length or max_new_tokens, got None and None"),
        ((IDS, 9), {"num_beams": 4}, "no argument 'num_beams': there is no beam search"),
        ((IDS, 9), {"do_sample": True}, "no argument 'do_sample': top_k=0 draws"),
        ((IDS, 9), {"attention_mask": IDS}, "no argument 'attention_mask': .* with lengths"),
        ((IDS, 9), {"penalty": 1}, "no argument 'penalty': it has .*repetition_penalty"),
    ],
    ids=str,
)
def test_bad_arguments(args, options, message):
    model = TinyDecoder()
    for function in (model.generate, model.stream):
        with pytest.raises((ValueError, TypeError), match=message):
            function(*args, **options)
    assert not model.calls


@pytest.mark.filterwarnings("error")
def test_options_that_greedy_decoding_does_not_see(model):
    calls = {
        "generate": lambda **options: model.generate(IDS, 5, **options),
        "stream": lambda **options: model.stream(IDS, 5, **options),
        "decode": lambda **options: decode(IDS, model, 5, **options),
        "speculative": lambda **options: decode_speculative(IDS, model, model, 5, **options),
    }
    for name, call in calls.items():
        with pytest.warns(UserWarning, match="top_p=0.9 without effect: top_k=1") as caught:
            call(temperature=0.8, top_p=0.9)
        assert str(caught[0].message).startswith("temperature=0.8, top_p=0.9")
        assert caught[0].filename == __file__, name
        call(temperature=0.8, top_p=0.9, top_k=0)
        call(temperature=0.0, top_p=0.9)  # asks for the likeliest
        call(top_p=1.0, repetition_penalty=1.2)


def test_all_positions_are_used():
    model = TinyDecoder()
    assert_sequences(model.generate(IDS, POSITIONS), [greedy(model, IDS[0], POSITIONS)[0]])


def test_inference_params():
    params = InferenceParams(8, 2, 5, lengths_per_sample=torch.tensor([3, 4]))
    params.reset(16, 1)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (16, 1, 0)
    assert params.lengths_per_sample.tolist() == [0, 0]
    cache = allocate_inference_cache(2, 8, 3, 16, 2, "cpu")
    assert list(cache) == [0, 1] and cache[0].shape == (2, 8, 2, 3, 16)
    assert cache[0].dtype == torch.float16
    assert list(allocate_inference_cache(2, 8, 3, 16, [4, 7], "cpu", torch.float32)) == [4, 7]


def test_packing():
    packing = Packing([2, 1, 3], [4, 0, 1])
    assert packing.cu_seqlens_q.tolist() == [0, 2, 3, 6]
    assert packing.cu_seqlens_k.tolist() == [0, 6, 7, 11]
    assert (packing.max_seqlen_q, packing.max_seqlen_k) == (3, 6)
    assert packing.sequences.tolist() == [0, 0, 1, 2, 2, 2]
    assert packing.positions.tolist() == [4, 5, 0, 1, 2, 3]
    assert packing.last(1).tolist() == [[1], [2], [5]]
    table = torch.tensor([[5, 0, 1], [2, 9, 9], [7, 3, 9]], dtype=torch.int32)
    assert packing.slots(2, table).tolist() == [2, 3, 4, 15, 6, 7]
    with pytest.raises(ValueError, match="a sequence has fewer than 2 new tokens"):
        packing.last(2)
    with pytest.raises(ValueError, match="needs a new token"):
        Packing([1, 0])
    with pytest.raises(ValueError, match="an entry for each sequence"):
        Packing([1, 1], [0])
