"""What each process of test_parallel_modules.py does: its part of a module against the whole."""

from __future__ import annotations

import dataclasses
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from module_decoding import decode
from small_cases import int32, randn

from flash_attn.modules.block import Block, ParallelBlock
from flash_attn.modules.mha import MHA, ParallelMHA
from flash_attn.modules.mlp import Mlp, ParallelMLP
from flash_attn.utils.distributed import allreduce_sequence_parallel_grad

RANKS, BATCH, SEQLEN, HEAD_DIM = 4, 2, 6, 8
TOKENS = BATCH * SEQLEN


@dataclasses.dataclass
class Part:
    """This process's place in a group."""

    group: object
    rank: int
    size: int

    def of_tokens(self, x, sequence_parallel=True):
        """This process's tokens of a tensor's first dimension, or all."""
        return x.chunk(self.size)[self.rank] if sequence_parallel else x

    def range(self, count):
        """This process's range of ``count`` things, the first processes one more."""
        ends = [0]
        for rank in range(self.size):
            ends.append(ends[-1] + count // self.size + (rank < count % self.size))
        return slice(ends[self.rank], ends[self.rank + 1])


# num_heads, and options of both modules.
CASES = {
    "plain": (4, {}),
    "grouped, causal": (8, {"num_heads_kv": 4, "causal": True}),
    "not evenly": (10, {"num_heads_kv": 5, "causal": True}),
    "alibi, not evenly": (10, {"num_heads_kv": 5, "use_alibi": True, "window_size": (4, 0)}),
    "rotary": (4, {"rotary_emb_dim": 8, "causal": True}),
    "rotary, grouped, pairs, window": (
        8, {"num_heads_kv": 4, "rotary_emb_dim": 4, "rotary_emb_interleaved": True,
            "window_size": (3, 1), "checkpointing": True},
    ),
    "xpos, alibi": (4, {"rotary_emb_dim": 8, "rotary_emb_scale_base": 64, "use_alibi": True}),
    "no bias": (4, {"qkv_proj_bias": False, "out_proj_bias": False}),
}  # fmt: skip


def attention_pair(part, num_heads, options, sequence_parallel, use_flash_attn=True):
    """The whole module, the same on every process, and this process's part with its parameters."""
    torch.manual_seed(0)
    dim, options = num_heads * HEAD_DIM, {"use_flash_attn": use_flash_attn, **options}
    whole = MHA(dim, num_heads, layer_idx=3, **options)
    parallel = ParallelMHA(
        dim, num_heads, part.group, layer_idx=3, sequence_parallel=sequence_parallel, **options
    )
    parallel.load_state_dict(attention_shard(part, whole, whole.state_dict()))
    return whole, parallel


def attention_shard(part, whole, tensors):
    """This process's part of the parameters, or of their gradients, by their names."""
    queries = whole.num_heads // whole.num_heads_kv
    keys = part.range(whole.num_heads_kv)
    heads = slice(keys.start * queries, keys.stop * queries)
    sizes = [whole.num_heads, whole.num_heads_kv, whole.num_heads_kv]
    shard = {}
    for name, tensor in tensors.items():
        if name.startswith("Wqkv"):
            parts = tensor.unflatten(0, (-1, HEAD_DIM)).split(sizes)
            mine = [t[r] for t, r in zip(parts, (heads, keys, keys))]
            shard[name] = torch.cat(mine).flatten(0, 1)
        elif name == "out_proj.weight":
            shard[name] = tensor.unflatten(1, (-1, HEAD_DIM))[:, heads].flatten(1)
        elif part.rank == 0:
            shard[name] = tensor
    return shard


def assert_close(name, actual, expected):
    torch.testing.assert_close(
        actual, expected, atol=2e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}"
    )


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def check_attention(part, num_heads, options, sequence_parallel, use_flash_attn=True):
    whole, parallel = attention_pair(part, num_heads, options, sequence_parallel, use_flash_attn)
    x = randn(TOKENS, whole.embed_dim, grad=True)
    dout = randn(TOKENS, whole.embed_dim, seed=1)
    expected = whole(x.unflatten(0, (BATCH, SEQLEN))).flatten(0, 1)
    expected.backward(dout)
    mine = part.of_tokens(x.detach(), sequence_parallel).clone().requires_grad_()
    out = parallel(mine, seqlen=SEQLEN)
    out.backward(part.of_tokens(dout, sequence_parallel))
    assert_close("out", out, part.of_tokens(expected, sequence_parallel))
    assert_close("dx", mine.grad, part.of_tokens(x.grad, sequence_parallel))
    wanted = attention_shard(part, whole, gradients(whole))
    actual = gradients(parallel)
    assert actual.keys() == wanted.keys()
    for name, grad in actual.items():
        assert_close(f"d{name}", grad, wanted[name])


def check_packed(part, num_heads, options):
    whole, parallel = attention_pair(part, num_heads, options, True)
    x = randn(TOKENS, whole.embed_dim)
    packed = {"cu_seqlens": int32([0, 5, 5, TOKENS]), "max_seqlen": 7}
    out = parallel(part.of_tokens(x), **packed)
    assert_close("packed", out, part.of_tokens(whole(x, **packed)))


def check_decoding(part, num_heads, options, use_flash_attn):
    """With each process's heads in a cache of its own."""
    options = {**options, "causal": True}
    whole, parallel = attention_pair(part, num_heads, options, False, use_flash_attn)
    cache = parallel.allocate_inference_cache(BATCH, 9)
    keys = part.range(whole.num_heads_kv)
    assert cache.shape == (BATCH, 9, 2, keys.stop - keys.start, HEAD_DIM)
    x = randn(BATCH, SEQLEN, whole.embed_dim)
    with torch.no_grad():
        assert_close("decoded", decode(parallel, x, (3, 2, 1)), whole(x))


def check_block(part, kind, sequence_parallel):
    """A block of parallel mixer and MLP; the norms' gradients are added over the processes."""
    torch.manual_seed(0)
    dim, heads = 4 * HEAD_DIM, {"num_heads": 4, "causal": True, "use_flash_attn": True}
    whole = kind(dim, partial(MHA, **heads), partial(Mlp, hidden_features=24))
    spread = {"process_group": part.group, "sequence_parallel": sequence_parallel}
    mlp = partial(ParallelMLP, hidden_features=24, **spread)
    marks = {"sequence_parallel": sequence_parallel, "mark_shared_params": True}
    parallel = kind(dim, partial(ParallelMHA, **heads, **spread), mlp, **marks)
    parallel.load_state_dict(block_shard(part, whole, whole.state_dict()))
    inputs = [randn(TOKENS, dim, seed=i, grad=True) for i in range(2)]
    expected = whole(*(x.unflatten(0, (BATCH, SEQLEN)) for x in inputs))
    mine = [part.of_tokens(x.detach(), sequence_parallel).requires_grad_() for x in inputs]
    outs = parallel(*mine, mixer_kwargs={"seqlen": SEQLEN})
    expected = [out.flatten(0, 1) for out in expected]
    douts = [randn(TOKENS, dim, seed=10 + i) for i in range(len(expected))]
    torch.autograd.backward(expected, douts)
    torch.autograd.backward(outs, [part.of_tokens(x, sequence_parallel) for x in douts])
    for out, whole_out in zip(outs, expected):
        assert_close("out", out, part.of_tokens(whole_out, sequence_parallel))
    allreduce_sequence_parallel_grad(parallel, part.group)
    wanted = block_shard(part, whole, gradients(whole))
    for name, grad in gradients(parallel).items():
        assert_close(f"d{name}", grad, wanted[name])
    for x, shard in zip(inputs, mine):
        assert_close("dx", shard.grad, part.of_tokens(x.grad, sequence_parallel))


def block_shard(part, whole, tensors):
    of_mixer = {n[6:]: t for n, t in tensors.items() if n.startswith("mixer.")}
    of_mixer = attention_shard(part, whole.mixer, of_mixer)
    shard = {n: t for n, t in tensors.items() if n.startswith("norm")}
    shard.update({f"mixer.{n}": t for n, t in of_mixer.items()})
    shard["mlp.fc1.weight"] = tensors["mlp.fc1.weight"].chunk(part.size)[part.rank]
    shard["mlp.fc1.bias"] = tensors["mlp.fc1.bias"].chunk(part.size)[part.rank]
    shard["mlp.fc2.weight"] = tensors["mlp.fc2.weight"].chunk(part.size, 1)[part.rank]
    if part.rank == 0:
        shard["mlp.fc2.bias"] = tensors["mlp.fc2.bias"]
    return shard


def check_refusals(part):
    sentence = rf"num_heads_kv \(1\) must be at least the number .* \({part.size}\)"
    with pytest.raises(ValueError, match=sentence):
        ParallelMHA(32, 4, part.group, num_heads_kv=1)


def check_all(part):
    for name, case in CASES.items():
        for sequence_parallel in (False, True):
            yield (
                f"{name}, {sequence_parallel}",
                partial(check_attention, part, *case, sequence_parallel),
            )
    yield "composed", partial(check_attention, part, *CASES["alibi, not evenly"], True, False)
    for name in ("plain", "rotary, grouped, pairs, window", "alibi, not evenly"):
        yield f"packed, {name}", partial(check_packed, part, *CASES[name])
        for flash in (False, True):
            yield f"decoding, {name}", partial(check_decoding, part, *CASES[name], flash)
    for kind in (Block, ParallelBlock):
        for sequence_parallel in (False, True):
            yield kind.__name__, partial(check_block, part, kind, sequence_parallel)
    yield "refusals", partial(check_refusals, part)


def run_rank(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        for part in (Part(dist.group.WORLD, rank, RANKS), Part(pairs[rank // 2], rank % 2, 2)):
            for name, check in check_all(part):
                try:
                    check()
                except Exception as error:
                    raise AssertionError(f"{name} on {part.size} processes: {error}") from error
    finally:
        dist.destroy_process_group()
