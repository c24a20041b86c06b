"""Greedy generation of converted models, token by token as transformers' ``generate``."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from model_cases import CASES, hf_model
from test_models_converters import converted

from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.utils.generation import decode_speculative
from flash_attn.utils.paged_cache import PagedKVCache

transformers = pytest.importorskip("transformers")

VOCAB, LENGTHS, NEW = 96, (5, 13, 1, 24), 16
COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
LLAMA = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def gpt2():
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **COMMON
    )
    return "gpt", config, transformers.GPT2LMHeadModel


def llama():
    config = transformers.LlamaConfig(**LLAMA, rope_parameters=SCALED)
    return "llama", config, transformers.LlamaForCausalLM


@pytest.fixture(scope="module", params=[gpt2, llama], ids=lambda made: made.__name__)
def pair(request):
    """A model of transformers and the same one here, fp32."""
    module_name, config, kind = request.param()
    torch.manual_seed(0)
    theirs = kind(config).eval()
    module = importlib.import_module(f"flash_attn.models.{module_name}")
    name = "gpt2" if module_name == "gpt" else module_name
    ours_config = getattr(module, f"{name}_config_to_gpt2_config", copy.copy)(config)
    ours_config.use_flash_attn = True
    ours = GPTLMHeadModel(ours_config).eval()
    state_dict = getattr(module, f"remap_state_dict_hf_{name}")(theirs.state_dict(), ours_config)
    ours.load_state_dict(state_dict)
    return theirs, ours


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB, (n,), generator=generator) for n in lengths]


def expected(theirs, rows, **options):
    """Each prompt apart, so that nothing is padded."""
    made = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **options}
    return [theirs.generate(row[None], **made)[0] for row in rows]


def equal(actual, awaited):
    return len(actual) == len(awaited) and all(map(torch.equal, actual, awaited))


def test_batch(pair):
    theirs, ours = pair
    ids = torch.stack(prompts(7, 7, 7))
    whole = theirs.generate(ids, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(ours.generate(ids, 7 + NEW), whole)
    assert len(whole[0, 7:].unique()) > 4  # not the same token again and again


@pytest.mark.parametrize("block_size", [None, 4, 16])
def test_prompts_of_different_lengths(pair, block_size):
    theirs, ours = pair
    rows, options = prompts(*LENGTHS), {}
    awaited = expected(theirs, rows)
    if block_size:
        options["cache"] = PagedKVCache.for_model(ours, 256 // block_size, block_size)
    for _ in range(2):  # again, with prefixes that a paged cache knows
        assert equal(ours.generate(rows, None, max_new_tokens=NEW, **options), awaited)


def test_left_padded_batch_of_transformers(pair):
    """What transformers needs padding on the left for takes none here."""
    theirs, ours = pair
    rows = prompts(*LENGTHS)
    longest = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    place = torch.arange(longest)
    mask = (place >= longest - torch.tensor(LENGTHS)[:, None]).long()
    whole = theirs.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0
    )
    awaited = [row[longest - n :] for row, n in zip(whole, LENGTHS)]
    assert equal(ours.generate(rows, None, max_new_tokens=NEW), awaited)


@pytest.mark.parametrize("paged", [False, True])
def test_stop_tokens(pair, paged):
    theirs, ours = pair
    rows = prompts(*LENGTHS)
    free = expected(theirs, rows)
    stop = [int(free[0][LENGTHS[0] + 4]), int(free[1][LENGTHS[1] + 9])]
    awaited = expected(theirs, rows, eos_token_id=stop)
    assert len({len(a) - n for a, n in zip(awaited, LENGTHS)}) > 1
    options = {"cache": PagedKVCache.for_model(ours, 64)} if paged else {}
    out = ours.generate(rows, None, max_new_tokens=NEW, eos_token_id=stop, **options)
    assert equal(out, awaited)


def test_repetition_penalty(pair):
    theirs, ours = pair
    rows = prompts(*LENGTHS)
    options = {"max_new_tokens": NEW, "repetition_penalty": 1.3}
    assert equal(ours.generate(rows, None, **options), expected(theirs, rows, **options))


def test_scores(pair):
    theirs, ours = pair
    ids = torch.stack(prompts(7, 7))
    options = {"return_dict_in_generate": True, "output_scores": True}
    a = ours.generate(ids, 7 + NEW, **options)
    b = theirs.generate(ids, do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options)
    assert torch.equal(a.sequences, b.sequences) and len(a.scores) == len(b.scores)
    # fp32's sums in another order, of logits of about 10.
    torch.testing.assert_close(torch.stack(a.scores), torch.stack(b.scores), rtol=1e-4, atol=2e-4)


def test_speculative(pair):
    theirs, ours = pair
    rows = prompts(*LENGTHS)
    draft = copy.deepcopy(ours)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    out = decode_speculative(rows, ours, draft, None, 4, max_new_tokens=NEW)
    assert equal(out.sequences, expected(theirs, rows))


@pytest.mark.parametrize("name", CASES)
def test_every_family(name):
    """Ragged prompts of every model that is converted, contiguous and paged."""
    theirs = hf_model(CASES[name])
    ours = converted(CASES[name], theirs, use_flash_attn=True)
    rows = prompts(5, 13, 1)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    awaited = expected(theirs, rows, **options)
    assert equal(ours.generate(rows, None, **options), awaited)
    cache = PagedKVCache.for_model(ours, 32, 4)
    for _ in range(2):
        assert equal(ours.generate(rows, None, **options, cache=cache), awaited)
