"""What each process of test_models_parallel.py does: its part of a GPT against the whole."""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt_cases import LLAMA, config
from small_cases import int32

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models.gpt import (
    GPTLMHeadModel,
    combine_state_dicts_tp,
    shard_state_dict_tp,
)
from flash_attn.utils.distributed import allreduce_sequence_parallel_grad

RANKS, BATCH, SEQLEN = 2, 2, 6
_TODAY = {
    **LLAMA,
    "head_dim": 16,
    "qk_norm": True,
    "attn_sinks": True,
    "sandwich_norm": True,
    "attn_softcap": 5.0,
    "final_logit_softcap": 10.0,
    "sliding_window": 4,
}
CASES = {
    "gpt2": {"pad_vocab_size_multiple": 8},
    "llama": LLAMA,
    "llama, tied": {**LLAMA, "tie_word_embeddings": True},
    "not evenly": {**LLAMA, "n_embd": 48, "n_head": 6, "n_head_kv": 3, "n_inner": 45},
    "today": _TODAY,
    "parallel block": {**LLAMA, "parallel_block": True, "lm_head_bias": True},
    "fused": {"fused_mlp": True, "fused_dropout_add_ln": True, "residual_in_fp32": True},
    "positions with an offset": {"position_embeddings_offset": 2, "prenorm": False},
}


def pair(case, group, sequence_parallel):
    """The whole model, the same on every process, and this process's part of it."""
    torch.manual_seed(0)
    options = config(vocab_size=96, sequence_parallel=sequence_parallel, **CASES[case])
    whole = GPTLMHeadModel(options)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    part = GPTLMHeadModel(options, process_group=group)
    shard = shard_state_dict_tp(whole.state_dict(), options, RANKS, dist.get_rank(group))
    part.load_state_dict(shard)
    return whole, part, options


def check_training(case, group, sequence_parallel):
    whole, part, options = pair(case, group, sequence_parallel)
    ids = torch.randint(96, (BATCH, SEQLEN + 1), generator=torch.Generator().manual_seed(1))
    ids, labels = ids[:, :-1], ids[:, 1:].flatten()
    expected = F.cross_entropy(whole(ids).logits.flatten(0, 1), labels)
    expected.backward()
    logits = part(ids).logits.flatten(0, -2)
    loss = CrossEntropyLoss(process_group=group)(logits, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    allreduce_sequence_parallel_grad(part, group)
    gradients = {n: p.grad for n, p in whole.named_parameters(remove_duplicate=False)}
    wanted = shard_state_dict_tp(gradients, options, RANKS, dist.get_rank(group))
    actual = {n: p.grad for n, p in part.named_parameters(remove_duplicate=False)}
    assert actual.keys() == wanted.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(
            grad, wanted[name], atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def check_packed(case, group, sequence_parallel):
    whole, part, _ = pair(case, group, sequence_parallel)
    ids = torch.randint(96, (1, BATCH * SEQLEN), generator=torch.Generator().manual_seed(1))
    packed = {"cu_seqlens": int32([0, 5, BATCH * SEQLEN]), "max_seqlen": 7}
    with torch.no_grad():
        expected = whole(ids, **packed).logits[0].chunk(RANKS, -1)[dist.get_rank(group)]
        logits = part(ids, **packed).logits.flatten(0, -2)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def check_decoding(case, group):
    """Step by step, with each process's heads in a cache of its own."""
    whole, part, _ = pair(case, group, False)
    ids = torch.randint(96, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(2))
    params = SimpleNamespace(
        max_seqlen=SEQLEN,
        max_batch_size=BATCH,
        seqlen_offset=0,
        batch_size_offset=0,
        key_value_memory_dict=part.allocate_inference_cache(BATCH, SEQLEN),
        lengths_per_sample=None,
    )
    with torch.no_grad():
        expected = whole(ids).logits
        for i in range(SEQLEN):
            params.seqlen_offset = i
            logits = part(ids[:, i : i + 1], inference_params=params, num_last_tokens=1).logits
            torch.testing.assert_close(logits[:, 0], expected[:, i], atol=2e-5, rtol=1e-4)


def check_state_dicts(case, group):
    whole, part, options = pair(case, group, False)
    shards = [None] * RANKS
    dist.all_gather_object(shards, part.state_dict(), group=group)
    combined = combine_state_dicts_tp(shards, options)
    assert combined.keys() == whole.state_dict().keys()
    for name, x in whole.state_dict().items():
        assert torch.equal(combined[name], x), name


def run_rank(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    try:
        for case in CASES:
            try:
                for sequence_parallel in (False, True):
                    check_training(case, group, sequence_parallel)
                    if case in ("gpt2", "llama"):
                        check_packed(case, group, sequence_parallel)
                check_decoding(case, group)
                check_state_dicts(case, group)
            except Exception as error:
                raise AssertionError(f"{case}: {error}") from error
    finally:
        dist.destroy_process_group()
