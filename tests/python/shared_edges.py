"""What sharing sequences does besides attention: errors, memory, messages, masks, DTensors."""

from __future__ import annotations

import contextlib
import weakref
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_module_ranks import Part, attention_shard
from shared_sequences import int32
from small_cases import randn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from flash_attn import distributed as shared
from flash_attn import flash_attn_func
from flash_attn.distributed import _transfers
from flash_attn.modules.mha import MHA, HeadOptions, ParallelMHA


def qkv(tokens=8, heads=4, batch=2, grad=False, dtype=torch.float32):
    shape = (batch, tokens, heads, 8)
    return [randn(*shape, seed=i, grad=grad, dtype=dtype) for i in range(3)]


# ------------------------------------------------------------------------------------------ errors


def fails_everywhere(group, culprit, call, bad, own, others, kind=ValueError):
    """``call(bad())`` on one process and ``call()`` on the others: nobody waits for anybody."""
    rank = dist.get_rank(group)
    expected = (kind, own) if rank == culprit else (ValueError, others)
    with pytest.raises(expected[0], match=expected[1]):
        call(*bad()) if rank == culprit else call(*qkv())


def check_errors(group, mesh):
    ring = partial(shared.ring_attention, group=group)
    ulysses = partial(shared.ulysses_attention, group=group)
    hybrid = partial(shared.hybrid_attention, mesh=mesh)
    fails = partial(fails_everywhere, group)
    batch = r"q's batch must be the same on every process of the group, got 3 on process 1 and 2 on"
    for attention in (ring, ulysses):
        fails(1, attention, lambda: qkv(batch=3), batch, batch)
    flat = r"k must be \(batch, seqlen, nheads, headdim\), got shape \(8, 4, 8\)"
    refused = "process {} of the group refused its arguments: "
    for attention in (ring, ulysses):
        q, k, v = qkv()
        fails(2, attention, lambda: (q, k[0], v), flat, refused.format(2) + flat)  # noqa: B023
    fails(0, ring, lambda: (None, *qkv()[1:]), "q must be", refused.format(0) + "q", TypeError)
    dtypes = "dtype"
    bad = [*qkv()[:2], qkv(dtype=torch.float16)[2]]
    fails(1, ring, lambda: bad, dtypes, refused.format(1) + ".*" + dtypes, RuntimeError)
    tokens = "k and v must have as many tokens, got 8 and 9"
    fails(3, ring, lambda: [*qkv()[:2], qkv(9)[2]], tokens, refused.format(3) + tokens)
    gradient = "whether a gradient is required must be the same .* got True on process 2 and False"
    fails(2, ring, lambda: qkv(grad=True), gradient, gradient)
    # An option is wrong, or another one, on one process.
    for option, value, sentence in (
        ("layout", "stripes", "layout must be 'contiguous' or 'zigzag', got 'stripes'"),
        ("window_size", (5, 0), r"window_size\[0\] must be the same .* got 5 on process 1 and -1"),
        ("softmax_scale", 0.5, "softmax_scale must be the same .* got 0.5 on process 1"),
        ("causal", True, "causal must be the same on .* got True on process 1 and False on"),
        ("softcap", -1.0, "softcap"),
        ("alibi_slopes", torch.ones(3), "alibi_slopes must have shape"),
        ("s_aux", torch.ones(4), "whether s_aux is given must be the same"),
        ("window_size", (-3, 0), "window"),
    ):
        given = {option: value} if dist.get_rank(group) == 1 else {}
        with pytest.raises((ValueError, RuntimeError), match=sentence):
            ring(*qkv(), **given)
    function = ring if dist.get_rank(group) else ulysses
    with pytest.raises(ValueError, match=r"process 1 of the group called ring att.* 0 Ulysses att"):
        function(*qkv())
    uneven = qkv(8 if dist.get_rank(group) else 10)
    for attention in (ring, ulysses):
        with pytest.raises(
            ValueError, match=r"q has 10 tokens on process 0 .* share of 34 in layout"
        ):
            attention(*uneven, layout="zigzag")
    with pytest.raises(ValueError, match=r"heads \(6\) must be a multiple of the 4 processes"):
        ulysses(*qkv(heads=6))
    with pytest.raises(ValueError, match="alibi_slopes must not require a gradient"):
        ring(*qkv(), alibi_slopes=torch.ones(4, requires_grad=True))
    fails(3, hybrid, lambda: (q, k[0], v), flat, "refused its arguments: .*")
    with pytest.raises(ValueError, match="group must be a DeviceMesh of one dimension, got one of"):
        shared.ring_attention(*qkv(), group=mesh)
    alone = dist.new_group([dist.get_rank(group)], use_local_synchronization=True)
    for function in (shared.ring_attention, shared.ulysses_attention):
        with pytest.raises(ValueError, match="layout must be 'contiguous' or 'zigzag', got 'x'"):
            function(*qkv(), group=alone, layout="x")
        assert torch.equal(function(*qkv(), group=alone), flash_attn_func(*qkv()))
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh of two dimensions, got"):
        shared.hybrid_attention(*qkv(), mesh=mesh["ring"])
    check_packed_errors(group)


def check_packed_errors(group):
    rank = dist.get_rank(group)
    x = [t[0] for t in qkv(5)]
    sums = [int32([12, 8]), int32([8, 12])]
    for function in (shared.ring_attention_varlen, shared.ulysses_attention_varlen):
        attention = partial(function, group=group)
        mine = sums[rank == 1]
        with pytest.raises(
            ValueError, match="the CRC-32 of cu_seqlens_q must be the same on every"
        ):
            attention(*x, mine, mine)
        with pytest.raises(
            ValueError, match=r"q has 5 tokens, but .* share of cu_seqlens_q's 24 in"
        ):
            attention(*x, int32([24]), int32([20]))
        with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k must have one length"):
            attention(*x, int32([20]), int32([20, 0]))


# ------------------------------------------------------------------------------------------ memory


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made or used inside."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict = {}

    def _see(self, x):
        if not isinstance(x, torch.Tensor):
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._seen or not storage.nbytes():
            return
        self._seen[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.live -= self._seen.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, results)):
            self._see(x)
        return results


def peak_bytes(attention, tokens, dtype=torch.bfloat16):
    """Bytes alive at the peak of forward and backward, inputs and gradients included."""
    heads = (8, 2, 2)
    x = [randn(1, tokens, h, 32, seed=i, grad=True, dtype=dtype) for i, h in enumerate(heads)]
    with PeakBytes() as counted:
        for t in x:
            t.detach()
        out = attention(*x, causal=True)
        out.backward(out.detach())
    return counted.peak


def check_memory(group, mesh):
    """Per process it is about twice its share of what one process needs."""
    total = 2048
    pair = mesh["ring"].get_group()
    alone = peak_bytes(flash_attn_func, total)
    for layout in ("contiguous", "zigzag"):
        of_two, of_four = (
            peak_bytes(partial(shared.ring_attention, group=g, layout=layout), total // size)
            for g, size in ((pair, 2), (group, 4))
        )
        largest = torch.tensor([of_two, of_four])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        of_two, of_four = largest.tolist()
        # Beside its share a process has keys and values of two others, and sums in fp32: a multiple
        # of the share that does not grow with the processes. Of four, gradients of keys travel in
        # fp32; of two, nothing is added to them on the way, and they do not.
        assert of_two < 2.2 * alone / 2, (of_two, alone)
        assert of_four < 2.5 * alone / 4, (of_four, alone)
        assert of_four < 0.62 * of_two, (of_two, of_four)


# ---------------------------------------------------------------------------------------- messages


@contextlib.contextmanager
def counted_bytes():
    """The bytes that this process sends."""
    sent = []
    send = dist.batch_isend_irecv

    def count(operations):
        sent.extend(p.tensor.nbytes for p in operations if p.op is dist.isend)
        return send(operations)

    with mock.patch.object(_transfers.dist, "batch_isend_irecv", count):
        yield sent


def check_messages(group, mesh):
    """What docs/distributed.md says of the bytes sent."""
    rank, tokens = dist.get_rank(group), 8
    for dtype in (torch.float32, torch.bfloat16):
        x = qkv(tokens, heads=2, batch=1, grad=True, dtype=dtype)
        keys = x[1].nbytes + x[2].nbytes
        in_fp32 = keys * 4 // dtype.itemsize
        cases = {
            # name: options, parts' keys that travel forward, and gradients: in dtype, in fp32
            "full": ({}, 3, (1, 2)),
            "causal": ({"causal": True}, 3 - rank if rank < 3 else 0, None),
            "zigzag": ({"causal": True, "layout": "zigzag"}, 3, (1, 2)),
            "window": ({"window_size": (3, 0)}, 1 if rank < 3 else 0, None),
            "own": ({"window_size": (0, 0)}, 0, (0, 0)),
        }
        for name, (options, parts, gradients) in cases.items():
            with counted_bytes() as sent:
                out = shared.ring_attention(*x, group=group, **options)
            expected = parts
            if name == "causal":  # those of processes 0 to rank go on, where anyone is behind
                expected = rank + 1 if rank < 3 else 0
            assert sum(sent) == expected * keys, (name, sum(sent), keys)
            with counted_bytes() as sent:
                out.sum().backward()
            if gradients is not None:
                late, early = gradients[1] * in_fp32, gradients[0] * keys
                assert sum(sent) == expected * keys + late + early, name


# ------------------------------------------------------------------------------------------- masks


def check_dropout(group, mesh):
    """Every block draws a mask of its own, though all processes have one seed; backward its own."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    tokens, heads = 16, 4
    total = tokens * size
    q = torch.zeros(1, tokens, heads, 8, requires_grad=True)
    k = torch.zeros(1, tokens, heads, 8, requires_grad=True)
    eye = torch.eye(total)[None, :, None].expand(1, total, heads, total).contiguous()
    for layout in ("contiguous", "zigzag"):
        v = shared.shard_sequence(eye, 1, group, layout).requires_grad_()
        for attention in (shared.ring_attention, shared.ulysses_attention):
            torch.manual_seed(3)
            call = partial(attention, dropout_p=0.4, group=group, layout=layout)
            out = checkpoint(call, q, k, v, use_reentrant=False)
            whole = shared.unshard_sequence(out.detach(), 1, group, layout)  # weights
            kept = whole[0].permute(1, 0, 2) > 0
            assert abs(kept.float().mean() - 0.6) < 0.03
            assert torch.allclose(whole[whole > 0], torch.tensor(1 / (0.6 * total)))
            blocks = kept.unflatten(1, (2 * size, -1)).unflatten(3, (2 * size, -1))
            blocks = blocks.transpose(2, 3).flatten(0, 2).flatten(1)
            assert len(blocks.unique(dim=0)) == len(blocks)
            dout = randn(*out.shape, seed=rank)
            dv = torch.autograd.grad(out, v, dout)[0]
            sides = torch.stack([(dout * out.detach()).sum(), (dv * v.detach()).sum()])
            dist.all_reduce(sides, group=group)  # out is linear in v, with the same mask
            assert torch.allclose(*sides, rtol=1e-4), sides


# ------------------------------------------------------------------------------------------ shards


def check_shards(group, mesh):
    lengths = [9, 0, 14, 1]
    x, packed = randn(2, 23, 3), randn(24, 3)
    for shared_by in (group, mesh):
        owned = shared.layout.owners(shared_by)
        for layout in ("contiguous", "zigzag"):
            part = shared.shard_sequence(x, 1, shared_by, layout).requires_grad_()
            positions = shared.position_ids(23, shared_by, layout)
            assert torch.equal(part, x[:, positions])
            whole = shared.unshard_sequence(part, 1, shared_by, layout, seqlen=23)
            assert torch.equal(whole, x)
            (whole * x).sum().backward()  # on every process: their gradients are added
            torch.testing.assert_close(part.grad, owned.size * part.detach())
            cu = int32(lengths)
            part = shared.shard_varlen(packed, cu, shared_by, layout)
            ends, longest = shared.local_cu_seqlens(cu, shared_by, layout)
            assert ends[-1] == len(part) and longest == ends.diff().max()
            assert torch.equal(shared.unshard_varlen(part, cu, shared_by, layout), packed)
            starts = torch.repeat_interleave(cu[:-1], ends.diff())
            where = shared.position_ids_varlen(cu, shared_by, layout)
            assert torch.equal(part, packed[where + starts])
            method = "hybrid" if shared_by is mesh else "ring"
            context = shared.ContextParallel(shared_by, method, layout)
            found, total = context.position_ids(len(positions))
            assert torch.equal(found, positions) and total == 23
    with pytest.raises(ValueError, match="packed sequences need method 'ring' or 'ulysses', got"):
        context.varlen(*(t[0] for t in qkv()), cu, cu)
    with pytest.raises(TypeError, match="method 'hybrid' needs a DeviceMesh of two dimensions"):
        shared.ContextParallel(group, "hybrid")
    with pytest.raises(ValueError, match="method must be 'ring', 'ulysses' or 'hybrid', got 'x'"):
        shared.ContextParallel(group, "x")


def check_dtensors(group, mesh):
    """Sharded over tokens by one dimension of a mesh, over the batch or heads by the other."""
    shapes = (2, 10, 4, 8), (2, 10, 2, 8), (2, 10, 2, 8)  # parts of 5, or of 3, 3, 3 and 1
    whole = [randn(*shape, seed=i, grad=True) for i, shape in enumerate(shapes)]
    out, lse, _ = flash_attn_func(*whole, causal=True, return_attn_probs=True)
    dout = randn(*out.shape, seed=7)
    wanted = torch.autograd.grad([out, lse], whole, [dout, lse.detach()])
    for attention in (shared.ring_attention, shared.ulysses_attention):
        for own_mesh, placements in (
            (mesh._flatten(), [Shard(1)]),
            (mesh, [Shard(0), Shard(1)]),
            (mesh, [Shard(1), Shard(0)]),
            (mesh, [Shard(2), Shard(1)]),
        ):
            parts = [
                distribute_tensor(x.detach(), own_mesh, placements).requires_grad_() for x in whole
            ]
            actual = attention(*parts, causal=True, return_softmax_lse=True)
            assert actual[0].placements == tuple(placements)
            for a, e in zip(actual, (out, lse)):
                torch.testing.assert_close(a.full_tensor(), e, rtol=1e-5, atol=1e-5)
            spread = distribute_tensor(dout, own_mesh, placements)
            torch.autograd.backward(actual, [spread, actual[1].detach()])
            for x, e in zip(parts, wanted):
                torch.testing.assert_close(x.grad.full_tensor(), e, rtol=1e-4, atol=1e-5)
    replicated = [distribute_tensor(x.detach(), mesh, [Shard(0), Shard(2)]) for x in whole]
    with pytest.raises(ValueError, match=r"q must be sharded over its tokens, Shard\(1\), by one"):
        shared.ring_attention(*replicated)
    with pytest.raises(ValueError, match="layout must be 'contiguous' where q is a DTensor"):
        shared.ring_attention(*parts, layout="zigzag")
    with pytest.raises(TypeError, match="v must be a DTensor, as q is, got Tensor"):
        shared.ring_attention(*parts[:2], parts[2].to_local())


def check_lse_alone(group, mesh):
    """Processes of which some use softmax_lse alone, and some out alone."""
    uses = dist.get_rank(group) % 2
    x = [t.requires_grad_() for t in qkv(4)]
    results = shared.ring_attention(*x, group=group, causal=True, return_softmax_lse=True)
    results[uses].sum().backward()
    whole = [shared.unshard_sequence(t.detach(), 1, group).requires_grad_() for t in x]
    out, lse, _ = flash_attn_func(*whole, causal=True, return_attn_probs=True)
    wanted = out.unflatten(1, (4, -1))[:, ::2].sum() + lse.unflatten(2, (4, -1))[:, :, 1::2].sum()
    for t, e in zip(x, torch.autograd.grad(wanted, whole)):
        expected = shared.shard_sequence(e, 1, group)
        torch.testing.assert_close(t.grad, expected, rtol=1e-4, atol=1e-5)


def check_second_derivatives(group, mesh):
    """The ring has none, and says so; Ulysses has flash_attn_func's."""
    x = [t.requires_grad_() for t in qkv(2)]
    whole = [shared.unshard_sequence(t.detach(), 1, group).requires_grad_() for t in x]

    def penalty(attention, inputs, **options):
        first = torch.autograd.grad(
            attention(*inputs, causal=True, **options).sin().sum(), inputs, create_graph=True
        )
        return sum(g.square().sum() for g in first)

    ring = penalty(shared.ring_attention, x, group=group)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        ring.backward()
    penalty(shared.ulysses_attention, x, group=group).backward()
    penalty(flash_attn_func, whole).backward()
    for t, e in zip(x, whole):
        expected = shared.shard_sequence(e.grad, 1, group)
        torch.testing.assert_close(t.grad, expected, rtol=1e-4, atol=1e-4)


def check_tensor_parallel(group, mesh):
    """Heads over one dimension of a mesh, and tokens, in sequence parallel once more, over both."""
    part = Part(mesh.get_group("ulysses"), mesh.get_local_rank("ulysses"), 2)
    options = {"num_heads_kv": 2, "rotary_emb_dim": 8, "causal": True, "use_flash_attn": True}
    torch.manual_seed(0)
    alone = MHA(32, 4, **options)
    x, dout = randn(2, 12, 32, grad=True), randn(2, 12, 32, seed=1)
    expected = alone(x)
    expected.backward(dout)
    wanted = attention_shard(part, alone, {n: p.grad for n, p in alone.named_parameters()})
    for layout, sequence_parallel in (("zigzag", True), ("zigzag", False), ("contiguous", True)):
        context = shared.ContextParallel(mesh["ring"], "ring", layout)

        def mine(t, context=context, sequence_parallel=sequence_parallel):
            return part.of_tokens(context.shard(t.detach()).flatten(0, 1), sequence_parallel)

        module = ParallelMHA(
            *(32, 4, part.group),
            sequence_parallel=sequence_parallel,
            head_options=HeadOptions(context_parallel=context),
            **options,
        )
        module.load_state_dict(attention_shard(part, alone, alone.state_dict()))
        tokens = mine(x).requires_grad_()
        out = module(tokens, seqlen=6)
        out.backward(mine(dout))
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)
        close(out, mine(expected))
        close(tokens.grad, mine(x.grad))
        for name, parameter in module.named_parameters():
            dist.all_reduce(parameter.grad, group=mesh.get_group("ring"))
            close(parameter.grad, wanted[name])


CHECKS = {
    "shards": check_shards,
    "errors": check_errors,
    "messages": check_messages,
    "softmax_lse alone": check_lse_alone,
    "second derivatives": check_second_derivatives,
    "tensor parallel": check_tensor_parallel,
    "dropout": check_dropout,
    "DTensors": check_dtensors,
    "memory": check_memory,
}
