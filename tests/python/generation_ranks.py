"""What each process of test_generation_parallel.py does: generate with its part of a GPT."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from gpt_cases import LLAMA, config

from flash_attn.models.gpt import GPTLMHeadModel, shard_state_dict_tp
from flash_attn.utils.generation import decode, decode_speculative
from flash_attn.utils.paged_cache import PagedKVCache

RANKS, LENGTHS, VOCAB = 2, (3, 9, 1, 6), 96
CASES = {"gpt2": {}, "llama": LLAMA}


def pair(case, group, noise=0.0):
    """The whole model, the same on every process, and this process's part of it."""
    torch.manual_seed(0)
    options = config(vocab_size=VOCAB, sequence_parallel=False, use_flash_attn=True, **CASES[case])
    whole = GPTLMHeadModel(options).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    part = GPTLMHeadModel(options, process_group=group).eval()
    shard = shard_state_dict_tp(whole.state_dict(), options, RANKS, dist.get_rank(group))
    part.load_state_dict(shard)
    return whole, part


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in LENGTHS]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected):
        assert torch.equal(a, b), f"{a.tolist()} instead of {b.tolist()}"


def assert_the_same_everywhere(sequences, group):
    everyones = [None] * RANKS
    dist.all_gather_object(everyones, [row.tolist() for row in sequences], group=group)
    assert all(each == everyones[0] for each in everyones)


def check(case, group):
    whole, part = pair(case, group)
    rows = prompts()
    expected = whole.generate(rows, 24)
    assert len({token for row in expected for token in row.tolist()}) > 8
    assert_equal(part.generate(rows, 24, tensor_parallel=RANKS), expected)
    cache = PagedKVCache.for_model(part, 40, 4)
    heads = part.config.n_head if case == "gpt2" else 2
    assert cache.key_value_memory_dict[0].shape[3] == heads // RANKS
    for _ in range(2):
        assert_equal(part.generate(rows, 24, cache=cache), expected)
    ids = torch.stack([row[:1] for row in rows])
    assert_equal(part.generate(ids, 12), whole.generate(ids, 12))


def check_draws(case, group):
    """Each process draws other numbers; the first one's count."""
    _, part = pair(case, group)
    _, draft = pair(case, group, noise=0.02)
    options = {"top_k": 0, "temperature": 2.0, "tensor_parallel": RANKS}
    for stop in (None, list(range(20))):
        options["eos_token_id"] = stop
        options["generator"] = torch.Generator().manual_seed(dist.get_rank(group))
        assert_the_same_everywhere(decode(prompts(), part, 24, **options).sequences, group)
        out = decode_speculative(prompts(), part, draft, 24, **options)
        assert_the_same_everywhere(out.sequences, group)


def check_speculative(case, group):
    whole, part = pair(case, group)
    _, draft = pair(case, group, noise=0.02)
    out = decode_speculative(prompts(), part, draft, 24, tensor_parallel=RANKS)
    assert_equal(out.sequences, whole.generate(prompts(), 24))


def run_rank(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    try:
        for case in CASES:
            for function in (check, check_draws, check_speculative):
                try:
                    function(case, group)
                except Exception as error:
                    raise AssertionError(f"{case}, {function.__name__}: {error}") from error
    finally:
        dist.destroy_process_group()
