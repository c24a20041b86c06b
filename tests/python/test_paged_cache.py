"""The paged cache: who holds which block, what is found again, and the same tokens as without."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny_decoder import POSITIONS, VOCAB, TinyDecoder, greedy, prompts

from flash_attn.utils.paged_cache import BlockAllocator, CacheFullError, PagedKVCache


@pytest.fixture(scope="module")
def model():
    return TinyDecoder(rotary=8)


def poisoned(model, num_blocks, block_size=4, **options):
    """Return a cache whose memory is NaN: what was not written must not be read."""
    cache = PagedKVCache.for_model(model, num_blocks, block_size, **options)
    for memory in cache.key_value_memory_dict.values():
        memory.fill_(float("nan"))
    return cache


def logits_of(model, tokens):
    return model(torch.tensor(tokens)[None]).logits[0, -1]


def assert_logits(model, actual, *sequences):
    assert actual.shape == (len(sequences), VOCAB)
    for row, tokens in zip(actual, sequences):
        torch.testing.assert_close(row, logits_of(model, tokens), rtol=1e-4, atol=1e-4)


def test_allocator():
    blocks = BlockAllocator(4)
    a = blocks.allocate(3)
    assert len(set(a)) == 3 and blocks.num_free == 1
    with pytest.raises(CacheFullError, match="2 blocks are needed, 1 of 4 are free"):
        blocks.allocate(2)
    assert blocks.num_free == 1
    blocks.hold(a[:1])
    blocks.release(a)
    assert blocks.num_free == 3 and blocks.holders(a[0]) == 1
    blocks.release(a[:1])
    assert blocks.num_free == 4
    with pytest.raises(ValueError, match="has no holder"):
        blocks.release(a[:1])


def test_allocator_finds_prefixes_and_forgets_the_oldest():
    blocks = BlockAllocator(3)
    first, second = blocks.allocate(2)
    node = blocks.register(first, 0, (1, 2))
    inner = blocks.register(second, node, (3, 4))
    assert blocks.find(0, (1, 2)) == (first, node) and blocks.find(node, (3, 4)).node == inner
    assert blocks.find(0, (3, 4)) is None and blocks.find(node, (1, 2)) is None
    (third,) = blocks.allocate(1)
    assert blocks.register(third, 0, (1, 2)) == node  # the same tokens: found at the first
    assert not blocks.is_registered(third)
    blocks.release([first, second, third])
    assert blocks.num_free == 3
    assert blocks.allocate(1) == [third]  # what nobody can find goes first
    assert blocks.allocate(1) == [second]  # then a sequence's end
    assert blocks.find(node, (3, 4)) is None and blocks.find(0, (1, 2)) is not None
    blocks.forget_all()
    assert blocks.find(0, (1, 2)) is None and blocks.num_free == 1


MODELS = {"rotary": {"rotary": 8}, "positions": {}, "window": {"rotary": 8, "window_size": (4, 0)}}


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("name", MODELS)
def test_generation(name, block_size):
    """Ragged prompts, greedy: as without any cache; a second time prefixes are found."""
    model, rows = TinyDecoder(**MODELS[name]), prompts(3, 9, 1, 17)
    expected = [greedy(model, row, 24)[0] for row in rows]
    cache = poisoned(model, 120 // block_size + 4, block_size)
    for known in (0, sum((len(row) - 1) // block_size * block_size for row in rows)):
        model.calls.clear()
        out = model.generate(rows, 24, cache=cache)
        assert all(map(torch.equal, out, expected))
        new = sum(map(len, rows)) - known
        assert model.calls[0] == ((1, new) if new > 4 else (4, 1))
        steps = model.calls[1:]  # a sequence that is over is run no more
        assert len(steps) == 22 and {seqlen for _, seqlen in steps} == {1}
        assert sum(batch for batch, _ in steps) == sum(24 - len(row) - 1 for row in rows)
        assert cache.num_free_blocks == cache.num_blocks


def test_generation_frees_what_is_over(model):
    """Sequences that met a stop token are run no more."""
    rows = prompts(5, 5, 5)
    free = [greedy(model, row, 24)[0] for row in rows]
    stop = [int(free[0][8])]
    expected = [greedy(model, row, 24, stop)[0] for row in rows]
    cache = poisoned(model, 30)
    model.calls.clear()
    out = model.generate(rows, 24, eos_token_id=stop, cache=cache)
    assert all(map(torch.equal, out, expected))
    assert len({len(tokens) for tokens in expected}) > 1
    assert sum(shape[0] for shape in model.calls[1:]) == sum(len(t) - 6 for t in expected)
    assert cache.num_free_blocks == 30


def test_mixed_steps(model):
    """A prompt in two parts, another prompt and single tokens share calls."""
    cache = poisoned(model, 32)
    a, b, c = (row.tolist() for row in prompts(11, 6, 3))
    s, t = cache.add(a), cache.add(b)
    assert_logits(model, cache.step(model, [s], [a[:5]]), a[:5])
    assert_logits(model, cache.step(model, [t, s], [b, a[5:]]), b, a)
    u = cache.add(c)
    assert_logits(model, cache.step(model, [s, u, t], [[7], c, [8]]), [*a, 7], c, [*b, 8])
    assert_logits(model, cache.step(model, [u, s], [[1], [2]]), [*c, 1], [*a, 7, 2])
    assert (s.length, t.length, u.length) == (13, 7, 4)
    assert s.tokens == [*a, 7, 2]


def test_prefixes_are_shared(model):
    cache, tokens = poisoned(model, 32), prompts(14)[0].tolist()
    first = cache.add(tokens)
    cache.step(model, [first], [tokens])
    second = cache.add(tokens)
    assert second.length == 12 and second.blocks == first.blocks[:3]
    assert cache.num_free_blocks == 32 - 4
    assert cache.add(tokens[:12]).length == 8  # one token is left to run
    other = [*tokens[:8], tokens[8] + 1, *tokens[9:]]
    assert cache.add(other).length == 8
    assert cache.add([tokens[0] + 1, *tokens[1:]]).length == 0
    logits = cache.step(model, [second], [[*tokens[12:], 5]])
    assert_logits(model, logits, [*tokens, 5])
    cache.free(first)
    cache.free(first)
    assert cache.add(tokens).length == 12  # of a sequence that is gone
    cache.forget_prefixes()
    assert cache.add(tokens).length == 0
    assert_logits(model, cache.step(model, [second], [[6]]), [*tokens, 5, 6])


def test_tokens_of_a_tensor(model):
    cache, tokens = poisoned(model, 32), prompts(10)[0]
    logits = cache.step(model, [cache.add(tokens)], [tokens])
    assert_logits(model, logits, tokens.tolist())
    again = cache.add(tokens)
    assert again.length == 8 and again.tokens == tokens[:8].tolist()
    assert_logits(model, cache.step(model, [again], [tokens[8:]]), tokens.tolist())


def test_no_sharing(model):
    cache, tokens = poisoned(model, 32, share_prefixes=False), prompts(14)[0].tolist()
    cache.step(model, [cache.add(tokens)], [tokens])
    assert cache.add(tokens).length == 0


def test_keys_that_depend_on_the_length_are_not_shared(model, monkeypatch):
    for layer in model.layers:
        monkeypatch.setattr(layer.mixer.rotary_emb, "depends_on_length", True)
    assert not PagedKVCache.for_model(model, 4).share_prefixes
    monkeypatch.undo()
    assert PagedKVCache.for_model(model, 4).share_prefixes


def test_fork_copies_when_one_writes(model):
    cache, tokens = poisoned(model, 32), prompts(10)[0].tolist()
    first = cache.add(tokens)
    cache.step(model, [first], [tokens])
    second, third = cache.fork(first), cache.fork(first)
    assert cache.num_free_blocks == 29 and second.blocks == first.blocks
    logits = cache.step(model, [second, first, third], [[1], [2], [3, 4]])
    assert_logits(model, logits, [*tokens, 1], [*tokens, 2], [*tokens, 3, 4])
    assert len({s.blocks[2] for s in (first, second, third)}) == 3
    assert cache.num_free_blocks == 27
    cache.free(first)
    assert_logits(
        model, cache.step(model, [second, third], [[5], [6]]), [*tokens, 1, 5], [*tokens, 3, 4, 6]
    )
    cache.free(second), cache.free(third)
    assert cache.num_free_blocks == 32


@pytest.mark.parametrize("length", [0, 3, 4, 5, 8, 10])
def test_truncate(model, length):
    """What is written after a cut harms nobody who found the blocks before."""
    cache, tokens = poisoned(model, 32), prompts(10)[0].tolist()
    first = cache.add(tokens)
    cache.step(model, [first], [tokens])
    second = cache.add([*tokens, 1])
    cache.truncate(first, length)
    assert first.length == length and len(first.blocks) == -(-length // 4)
    new = [*tokens[:length], 50, 51, 52]
    assert_logits(model, cache.step(model, [first], [new[length:]]), new)
    assert_logits(model, cache.step(model, [second], [[*tokens[second.length :], 1]]), [*tokens, 1])
    third = cache.add([*new, 1])
    assert_logits(model, cache.step(model, [third], [[*new[third.length :], 1]]), [*new, 1])
    with pytest.raises(ValueError, match=f"length must be from 0 to {first.length}"):
        cache.truncate(first, first.length + 1)


def test_full_cache_changes_nothing(model):
    cache = poisoned(model, 5)
    a, b = (row.tolist() for row in prompts(9, 5))
    s = cache.add(a)
    cache.step(model, [s], [a])
    t = cache.add(b)
    with pytest.raises(CacheFullError, match="3 blocks are needed, 2 of 5 are free"):
        cache.step(model, [t, s], [b, [1, 2, 3, 4]])
    assert (s.length, t.length, len(s.blocks), cache.num_free_blocks) == (9, 0, 3, 2)
    assert_logits(model, cache.step(model, [t, s], [b, [1, 2, 3]]), b, [*a, 1, 2, 3])
    cache.free(s)
    assert_logits(model, cache.step(model, [t], [[7] * 4]), [*b, 7, 7, 7, 7])


def test_a_request_that_does_not_fit_is_refused(model):
    """Before anything is generated; and what others hold stays theirs."""
    cache, rows = poisoned(model, 8), prompts(5, 5)
    model.calls.clear()
    with pytest.raises(ValueError, match=r"34 tokens .* exceed the 32 that a sequence"):
        model.generate(rows, 34, cache=cache)
    with pytest.raises(CacheFullError, match="10 blocks are needed, 8 of 8 are free"):
        model.generate(rows, 20, cache=cache)
    assert not model.calls and cache.num_free_blocks == 8
    out = model.generate(rows, 17, cache=cache)  # 16 tokens each are run: all blocks
    assert all(torch.equal(t, greedy(model, row, 17)[0]) for t, row in zip(out, rows))
    model = TinyDecoder()
    cache = PagedKVCache.for_model(model, 100, 4)
    assert cache.max_seqlen == POSITIONS
    s = cache.add([1] * POSITIONS)
    cache.step(model, [s], [[1] * POSITIONS])
    with pytest.raises(ValueError, match=f"1 tokens after {POSITIONS} exceed"):
        cache.step(model, [s], [[1]])


class Cache(RuleBasedStateMachine):
    """Any order of calls: every sequence's keys are its own tokens', and no block is lost.

    In place of a model, a token's number is written where its keys and values would be, so that
    what a sequence's blocks hold can be read back.
    """

    SIZE, BLOCKS = 2, 12

    def __init__(self):
        super().__init__()
        self.cache = PagedKVCache(self.BLOCKS, self.SIZE, 1, 1, 1)
        self.cache.key_value_memory_dict[0].fill_(-1)
        self.open = []

    def write(self, sequence, tokens):
        try:
            self.cache.reserve([sequence], [len(tokens)])
        except CacheFullError:
            return
        memory, start = self.cache.key_value_memory_dict[0], sequence.length
        for i, token in enumerate(tokens, start):
            memory[sequence.blocks[i // self.SIZE], i % self.SIZE] = token
        self.cache._append(sequence, tokens)

    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=7)

    @rule(tokens=tokens)
    def add(self, tokens):
        sequence = self.cache.add(tokens)
        assert sequence.tokens == tokens[: sequence.length] and sequence.length < len(tokens)
        self.open.append(sequence)
        self.write(sequence, tokens[sequence.length :])

    @precondition(lambda self: self.open)
    @rule(data=st.data(), tokens=tokens)
    def append(self, data, tokens):
        self.write(data.draw(st.sampled_from(self.open)), tokens)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def fork(self, data):
        self.open.append(self.cache.fork(data.draw(st.sampled_from(self.open))))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def free(self, data):
        sequence = data.draw(st.sampled_from(self.open))
        self.open.remove(sequence)
        self.cache.free(sequence)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = data.draw(st.sampled_from(self.open))
        self.cache.truncate(sequence, data.draw(st.integers(0, sequence.length)))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), count=st.integers(1, 5))
    def reserve(self, data, count):
        with contextlib.suppress(CacheFullError):
            self.cache.reserve([data.draw(st.sampled_from(self.open))], [count])

    @invariant()
    def blocks_hold_the_sequences_tokens(self):
        memory = self.cache.key_value_memory_dict[0][..., 0, 0, 0]
        held = set()
        for sequence in self.open:
            row = memory[sequence.blocks].flatten()[: sequence.length]
            assert row.tolist() == sequence.tokens
            assert sequence._row(16)[: len(sequence.blocks)].tolist() == sequence.blocks
            held.update(sequence.blocks)
        assert self.cache.num_free_blocks == self.BLOCKS - len(held)
        holders = [block for sequence in self.open for block in sequence.blocks]
        assert all(self.cache.allocator.holders(block) == holders.count(block) for block in held)


Cache.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestCache = Cache.TestCase


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, m, s: c.step(m, [s, s], [[1], [1]]), "a sequence is given twice"),
        (lambda c, m, s: c.step(m, [s], [[]]), "needs at least one new token"),
        (lambda c, m, s: c.step(m, [s], [[1], [2]]), "each of 1 sequences needs"),
        (lambda c, m, s: (c.free(s), c.step(m, [s], [[1]])), "the sequence was freed"),
        (lambda c, m, s: (c.free(s), c.fork(s)), "the sequence was freed"),
        (
            lambda c, m, s: c.step(TinyDecoder(use_flash_attn=False), [s], [[1]]),
            "use_flash_attn=True",
        ),
        (lambda c, m, s: PagedKVCache(0, 4, 1, 1, 8), "num_blocks must be positive, got 0"),
        (lambda c, m, s: PagedKVCache(4, 4, 1, 1, -8), "head_dim must be positive, got -8"),
        (
            lambda c, m, s: PagedKVCache.for_model(torch.nn.Linear(1, 1), 4),
            "must have flash_attn.*mix",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(model, change, message):
    cache = poisoned(model, 8)
    with pytest.raises(ValueError, match=message):
        change(cache, model, cache.add([1, 2]))


def test_layers_say_what_they_cannot_read(model):
    cache = poisoned(model, 8)
    sequence = cache.add([1, 2])
    cache.reserve([sequence], [2])
    params = cache.inference_params([sequence], [2])
    x = torch.randn(1, 2, 32)
    mixer = model.layers[0].mixer
    plain = TinyDecoder(use_flash_attn=False).layers[0].mixer
    with pytest.raises(ValueError, match=r"block_table needs use_flash_attn=True"):
        plain(x, inference_params=params)
    xpos = TinyDecoder(rotary=8, rotary_emb_scale_base=64.0).layers[0].mixer
    with pytest.raises(ValueError, match=r"block_table needs rotary_emb_scale_base=None"):
        xpos(x, inference_params=params)
    with pytest.raises(ValueError, match=r"packing needs tokens \(1, 2\), got \(2, 2\)"):
        mixer(x.expand(2, -1, -1), inference_params=params)
    with pytest.raises(ValueError, match=r"packing needs tokens \(1, 2\), got \(1, 1\)"):
        mixer(x[:, :1], inference_params=params)
    params.packing = None
    with pytest.raises(ValueError, match=r"block_table must have a row for each of 2 sequences"):
        mixer(x.expand(2, -1, -1), inference_params=params)
    params.key_value_memory_dict = {}
    with pytest.raises(ValueError, match=r"needs blocks in key_value_memory_dict, .* layer 0"):
        mixer(x, inference_params=params)
