"""What each process of test_distributed_training.py does: a small model on its tokens."""

from __future__ import annotations

import copy
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt_cases import config
from model_ranks import CASES
from small_cases import int32, randn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flash_attn.distributed import ContextParallel, ring_attention, share_sequences
from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.modules.embedding import GPT2Embeddings
from flash_attn.modules.mha import MHA, HeadOptions

PROCESSES, BATCH, SEQLEN, DIM, HEADS, VOCABULARY = 2, 2, 24, 32, 4, 17


class Layer(nn.Module):
    def __init__(self, context, checkpointing, **options):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        options = {"num_heads_kv": 2, "rotary_emb_dim": 8, "causal": True, **options}
        heads = HeadOptions(context_parallel=context)
        self.mixer = MHA(DIM, HEADS, **options, use_flash_attn=True, head_options=heads)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.checkpointing = checkpointing

    def mix(self, x, options):
        x = x + self.mixer(self.norms[0](x), **options)
        return x + self.mlp(self.norms[1](x))

    def forward(self, x, options):
        if self.checkpointing:
            return checkpoint(self.mix, x, options, use_reentrant=False)
        return self.mix(x, options)


class Model(nn.Module):
    """Tokens to the loss of each, ``(batch, seqlen)`` or, packed, ``(total,)``."""

    def __init__(self, context=None, checkpointing=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Layer(context, checkpointing, **options) for _ in range(2))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens, labels, **options):
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x, options)
        logits = self.head(x).float()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def texts():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCABULARY, (2, BATCH, SEQLEN), generator=generator)


def gradients(model):
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.").removeprefix("_orig_mod.")] = grad
    return found


def assert_same(actual, expected, rtol=1e-4, atol=2e-5):
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def alone(options=None, dtype=None, **model_options):
    """Loss and gradients of the whole on one process."""
    model, (tokens, labels) = Model(**model_options), texts()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        if options is None:
            loss = model(tokens, labels)
        else:
            loss = model(tokens.flatten(), labels.flatten(), **options)
    loss.backward()
    return loss.detach(), gradients(model)


def spread(wrap, context, options=None, dtype=None, **model_options):
    """The same, of this process' tokens, averaged over processes by ``wrap``'s model."""
    model = wrap(Model(context, **model_options))
    cu_seqlens = None if options is None else options["cu_seqlens"]
    tokens, labels = texts() if options is None else texts().flatten(1)
    tokens, labels = (context.shard(x, 1, cu_seqlens) for x in (tokens, labels))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(tokens, labels, **(options or {}))
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss / PROCESSES, gradients(model)


def plain(model):
    """Average gradients by hand."""
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(PROCESSES)))
    return model


def fsdp(mesh, model):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compare(wrap, context, **options):
    loss, grads = spread(wrap, context, **options)
    expected, expected_grads = alone(**options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same(grads, expected_grads)


def check_wrappers(mesh):
    for context in (
        ContextParallel(mesh, "ring", "zigzag"),
        ContextParallel(mesh, "ring"),
        ContextParallel(mesh, "ulysses", "zigzag"),
    ):
        for wrap in (plain, DistributedDataParallel, partial(fsdp, mesh)):
            compare(wrap, context)
    for wrap in (DistributedDataParallel, partial(fsdp, mesh)):
        compare(wrap, ContextParallel(mesh, "ring", "zigzag"), checkpointing=True)


def check_options(mesh):
    """Of the attention module: each kind of position, and its own checkpointing."""
    for options in (
        {"checkpointing": True},
        {"rotary_emb_dim": 0, "use_alibi": True},
        {"rotary_emb_interleaved": True, "window_size": (7, 0), "num_heads_kv": 4},
        {"rotary_emb_scale_base": 32, "causal": False},
    ):
        for layout in ("contiguous", "zigzag"):
            compare_mixer(ContextParallel(mesh, "ring", layout), options)


def compare_mixer(context, options):
    options = {"causal": True, "rotary_emb_dim": 8, "use_flash_attn": True, **options}
    modules = []
    for own in (None, context):
        torch.manual_seed(0)
        modules.append(MHA(DIM, HEADS, head_options=HeadOptions(context_parallel=own), **options))
    for cu_seqlens in (None, int32([0, 5, 5, 20, 23])):
        packed = cu_seqlens is not None
        more = {"cu_seqlens": cu_seqlens, "max_seqlen": 15} if packed else {}
        x = randn(*((23,) if packed else (BATCH, 23)), DIM, grad=True)
        out = modules[0](x, **more)
        dout = randn(*out.shape, seed=3)
        expected = torch.autograd.grad(out, x, dout)[0]
        mine = context.shard(x.detach(), 1, cu_seqlens).requires_grad_()
        actual = modules[1](mine, **more)
        dx = torch.autograd.grad(actual, mine, context.shard(dout, 1, cu_seqlens))[0]
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
        close(actual, context.shard(out.detach(), 1, cu_seqlens))
        close(dx, context.shard(expected, 1, cu_seqlens))


def check_packed(mesh):
    """Of sequences of 16, 4 and 28 tokens each process has half of every one."""
    options = {"cu_seqlens": int32([0, 16, 20, 48]), "max_seqlen": 28}
    for context in (ContextParallel(mesh, "ring", "zigzag"), ContextParallel(mesh, "ulysses")):
        compare(partial(fsdp, mesh), context, options=options)


def check_autocast(mesh):
    """As exact as the whole under autocast is, against fp32."""
    exact, exact_grads = alone()
    loss, grads = spread(plain, ContextParallel(mesh, "ring", "zigzag"), dtype=torch.bfloat16)
    own, own_grads = alone(dtype=torch.bfloat16)
    assert abs(loss - exact) <= 2 * abs(own - exact) + 1e-3
    for name, grad in grads.items():
        errors = [(g - exact_grads[name]).norm() for g in (grad, own_grads[name])]
        assert errors[0] <= 2 * errors[1] + 1e-3 * exact_grads[name].norm(), name


def check_compiled(mesh):
    """torch.compile calls attention, rather than tracing it."""
    compiled = partial(torch.compile, backend="eager")
    compare(lambda model: compiled(plain(model)), ContextParallel(mesh, "ring", "zigzag"))

    def attended(q, k, v):
        return ring_attention(2 * q, k, v, group=mesh)

    whole = torch.compile(attended, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(*(randn(1, 4, 2, 8, seed=i) for i in range(3)))


def check_gpt(mesh):
    """GPTLMHeadModel, made without a word of sharing: learned positions, and today's options."""
    for case in ("gpt2", "today"):
        torch.manual_seed(0)
        whole = GPTLMHeadModel(config(vocab_size=96, **CASES[case])).train()
        context = ContextParallel(mesh, "ring", "zigzag")
        model = share_sequences(copy.deepcopy(whole), context)
        tokens, labels = texts()
        logits = whole(tokens).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        mine = context.shard(tokens)
        positions, seqlen = context.position_ids(mine.shape[1])
        assert seqlen == SEQLEN
        assert torch.equal(positions, positions_of(context, SEQLEN))
        derived, found = model(mine).logits, plain(model)(mine, positions[None]).logits
        assert torch.equal(derived, found)
        torch.testing.assert_close(found, context.shard(logits.detach()), rtol=1e-4, atol=1e-4)
        F.cross_entropy(found.flatten(0, 1), context.shard(labels).flatten()).backward()
        assert_same(gradients(model), gradients(whole))


def positions_of(context, seqlen):
    return context.shard(torch.arange(seqlen)[None])[0]


def check_learned_positions(mesh):
    """Packed sequences, too many tokens, embeddings of another model, and the way back."""
    torch.manual_seed(0)
    model = GPTLMHeadModel(config(vocab_size=96, **CASES["gpt2"])).eval()
    tokens, _ = texts()
    row, most = tokens[:1], model.transformer.max_positions
    whole = model(row).logits
    cu_seqlens = torch.tensor([0, 5, SEQLEN], dtype=torch.int32)
    packed = {"cu_seqlens": cu_seqlens, "max_seqlen": SEQLEN}
    whole_packed = model(row, **packed).logits
    context = ContextParallel(mesh, "ring", "zigzag")
    share_sequences(share_sequences(model, context), context)  # the second time changes nothing
    found = model(context.shard(row)).logits
    torch.testing.assert_close(found, context.shard(whole), rtol=1e-4, atol=1e-4)
    mine = context.shard(row[0], 0, cu_seqlens)[None]
    expected = context.shard(whole_packed[0], 0, cu_seqlens)[None]
    found = model(mine, **packed).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    too_many = torch.zeros(1, most + 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=f"{most + 1} tokens over all processes.* {most} positions"
    ):
        model(context.shard(too_many))
    other = torch.nn.ModuleDict({"embeddings": GPT2Embeddings(8, 96, 64), "mixer": MHA(8, 2)})
    ids = torch.randint(0, 96, (2, SEQLEN), generator=torch.Generator().manual_seed(0))
    expected = other["embeddings"](ids)
    with pytest.raises(ValueError, match=r"mixer\.use_flash_attn must be True"):
        share_sequences(other, context)
    assert torch.equal(other["embeddings"](ids), expected)  # it was left as it was
    other["mixer"] = MHA(8, 2, use_flash_attn=True)
    share_sequences(other, context)
    assert torch.equal(other["embeddings"](context.shard(ids)), context.shard(expected))
    assert torch.equal(share_sequences(model, None)(row).logits, whole)


CHECKS = (
    check_gpt,
    check_learned_positions,
    check_wrappers,
    check_options,
    check_packed,
    check_autocast,
    check_compiled,
)


def run_rank(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for check in CHECKS:
            try:
                check(mesh)
            except Exception as error:
                raise AssertionError(f"{check.__name__}: {error}") from error
    finally:
        dist.destroy_process_group()
