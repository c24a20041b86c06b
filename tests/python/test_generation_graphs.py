"""Decoding through CUDA graphs: with a GPU; and, without one, with a replay that calls the model
again on what it was captured with, so that buffers, lengths and reuse are tested anywhere."""

from __future__ import annotations

import pytest
import torch
from tiny_decoder import VOCAB, TinyDecoder, greedy, prompts

from flash_attn.utils import _cuda_graphs, generation
from flash_attn.utils.generation import DecodingCGCache, decode_speculative, update_graph_cache

LENGTHS = (3, 9, 1, 17)


@pytest.fixture
def replays(monkeypatch):
    """Graphs on a CPU: a list of the shapes that were replayed."""
    shapes = []

    def captured(function, device, mempool, n_warmups):
        for _ in range(n_warmups):
            function()
        # What was captured was not computed.
        result = torch.full_like(function(), float("nan"))

        def replay():
            shapes.append(tuple(result.shape[:2]))
            result.copy_(function())

        return result, replay

    monkeypatch.setattr(_cuda_graphs, "_captured", captured)
    monkeypatch.setattr(_cuda_graphs, "_check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(generation, "_wants_graphs", lambda cg, device: cg)
    return shapes


@pytest.mark.parametrize("options", [{}, {"rotary": 8}], ids=["positions", "rotary"])
def test_graphs(replays, options):
    model, rows = TinyDecoder(**options), prompts(*LENGTHS)
    ids = torch.stack(prompts(5, 5, 5, 5))
    awaited = [greedy(model, row, 24)[0] for row in (*ids, *rows)]
    out = model.generate(ids, 24, cg=True)
    assert all(map(torch.equal, out, awaited))
    assert replays == [(4, 1)] * 18
    cache = model._decoding_cache
    memory, graph = cache.inference_params.key_value_memory_dict[0], cache.callables[4, 1]
    assert memory.shape[:2] == (4, 24)
    out = model.generate(rows, 24, cg=True)  # prompts of different lengths, the same graph
    assert all(map(torch.equal, out, awaited[4:]))
    assert all(map(torch.equal, model.generate(ids, 20, cg=True), [row[:20] for row in awaited]))
    out = model.generate(ids[:2], 24, cg=True)  # fewer sequences: another graph, the same memory
    assert all(map(torch.equal, out, awaited[:2])) and (2, 1) in cache.callables
    assert cache.callables[4, 1] is graph
    assert cache.inference_params.key_value_memory_dict[0] is memory
    longer = model.generate(ids, 30, cg=True)
    assert torch.equal(longer[:, :24], torch.stack(awaited[:4]))
    assert cache.inference_params.key_value_memory_dict[0].shape[:2] == (4, 30)
    assert list(cache.callables) == [(4, 1)] and cache.callables[4, 1] is not graph


def test_stop_tokens(replays):
    model, rows = TinyDecoder(rotary=8), prompts(*LENGTHS)
    stop = [int(greedy(model, rows[0], 24)[0][8])]
    out = model.generate(rows, 24, cg=True, eos_token_id=stop)
    assert all(map(torch.equal, out, [greedy(model, row, 24, stop)[0] for row in rows]))


def test_speculative(replays):
    model, draft, rows = TinyDecoder(rotary=8), TinyDecoder(1, rotary=8), prompts(*LENGTHS)
    awaited = [greedy(model, row, 24)[0] for row in rows]
    for each in (draft, TinyDecoder(rotary=8)):
        replays.clear()
        out = decode_speculative(rows, model, each, 24, 3, cg=True)
        assert all(map(torch.equal, out.sequences, awaited))
        assert {(4, 4), (4, 2), (4, 1)} <= set(replays)
    with pytest.raises(ValueError, match="cg needs model and model_draft to be two"):
        decode_speculative(rows, model, model, 24, cg=True)


def test_decoding_cache():
    cache = DecodingCGCache()
    assert (cache.max_batch_size, cache.max_seqlen, cache.callables) == (0, 0, {})
    assert cache.inference_params is None and cache.run is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"rotary": 8}], ids=["positions", "rotary"])
def test_on_a_gpu(options):
    """Graphs give what the same calls give without, for batches and ragged prompts."""
    model = TinyDecoder(**options).half().cuda()
    ids = torch.stack(prompts(5, 5, 5)).cuda()
    rows = [row.cuda() for row in prompts(*LENGTHS)]
    for prompt in (ids, rows, ids[:1]):
        out = model.generate(prompt, 40, cg=True)
        assert all(map(torch.equal, out, model.generate(prompt, 40)))
    draft = TinyDecoder(1, **options).half().cuda()
    out = decode_speculative(rows, model, draft, 40, 3, cg=True).sequences
    assert all(int(row.max()) < VOCAB and len(row) == 40 for row in out)
    assert isinstance(update_graph_cache(model, None, 1, 4, 8), DecodingCGCache)
