"""What each process of test_dense_groups.py does: layers divided over a group against the whole.

Everything is fp64, so that summing in another order shows in the last digits alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flash_attn.modules.embedding import (
    ColumnParallelEmbedding,
    GPT2Embeddings,
    ParallelGPT2Embeddings,
    VocabParallelEmbedding,
)
from flash_attn.modules.mlp import GatedMlp, ParallelGatedMlp, ParallelMLP
from flash_attn.ops import _dense
from flash_attn.ops.fused_dense import (
    ColumnParallelLinear,
    FusedDense,
    FusedMLP,
    ParallelFusedMLP,
    RowParallelLinear,
    fused_dense_func,
    fused_mlp_func,
)
from flash_attn.utils.distributed import (
    all_gather,
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    allreduce_sequence_parallel_grad,
    reduce_scatter,
    reduce_scatter_raw,
    sync_shared_params,
)

PROCESSES = 4
TOKENS, BATCH, FEATURES = 8, 3, 6
ACTIVATIONS = {
    "gelu_approx": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sqrelu": lambda x: F.relu(x) ** 2,
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


class Ranks:
    """This process's place, and its parts of what all have."""

    def __init__(self, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        # torch.compile and dispatch modes import the compiler, which takes seconds.
        self.has_compiler = self.size == 2 and dist.get_rank() < 2

    def tokens(self, x, sequence_parallel=True):
        return x.chunk(self.size)[self.rank] if sequence_parallel else x

    def part(self, x, dim, multiple_of=1):
        """Its share of a dimension, the first processes one multiple more than the last."""
        places = torch.arange(x.shape[dim]).view(-1, multiple_of)
        return x.index_select(dim, places.tensor_split(self.size)[self.rank].flatten())


def plain_mlp(activation, hidden, seed=0, out=FEATURES, first=None):
    """fc1, fc2 with the same values on every process, and the function they make."""
    torch.manual_seed(seed)
    fc1 = nn.Linear(FEATURES, first or hidden, dtype=torch.float64)
    fc2 = nn.Linear(hidden, out, dtype=torch.float64)
    return fc1, fc2, lambda x: fc2(activation(fc1(x)))


def copy_parts(ranks, module, fc1, fc2, fc1_part=None):
    """Give a module its parts of fc1 by rows and fc2 by columns."""
    rows = fc1_part or (lambda x: ranks.part(x, 0))
    with torch.no_grad():
        module.fc1.weight.copy_(rows(fc1.weight))
        module.fc1.bias.copy_(rows(fc1.bias))
        module.fc2.weight.copy_(ranks.part(fc2.weight, 1))
        assert (module.fc2.bias is None) == (ranks.rank > 0)
        if module.fc2.bias is not None:
            module.fc2.bias.copy_(fc2.bias)


def compare(ranks, whole, part, x, sequence_parallel):
    """Values and the gradient of x; returns nothing, the caller compares the parameters'."""
    x_whole, x_part = x.clone().requires_grad_(), ranks.tokens(x, sequence_parallel).clone()
    x_part.requires_grad_()
    expected = whole(x_whole)
    weights = randn(*expected.shape, seed=9)
    (expected * weights).sum().backward()
    actual = part(x_part)
    close(actual, ranks.tokens(expected, sequence_parallel))
    (actual * ranks.tokens(weights, sequence_parallel)).sum().backward()
    close(x_part.grad, ranks.tokens(x_whole.grad, sequence_parallel))


def compare_parameters(ranks, module, fc1, fc2, fc1_part=None):
    rows = fc1_part or (lambda x: ranks.part(x, 0))
    close(module.fc1.weight.grad, rows(fc1.weight.grad))
    close(module.fc1.bias.grad, rows(fc1.bias.grad))
    close(module.fc2.weight.grad, ranks.part(fc2.weight.grad, 1))
    if ranks.rank == 0:
        close(module.fc2.bias.grad, fc2.bias.grad)


def compare_mlp(ranks, module, mlp, sequence_parallel, fc1_part=None):
    fc1, fc2, whole = mlp
    for p in (*fc1.parameters(), *fc2.parameters(), *module.parameters()):
        p.grad = None
    copy_parts(ranks, module, fc1, fc2, fc1_part)
    compare(ranks, whole, module, randn(TOKENS, BATCH, FEATURES), sequence_parallel)
    compare_parameters(ranks, module, fc1, fc2, fc1_part)


def without_native_collectives(message):
    """Make those that take the processes' tensors as one fail, under either of their names."""

    def fail(*_, **__):
        raise RuntimeError(message)

    names = ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
             "reduce_scatter_single")  # fmt: skip
    return mock.patch.multiple(dist, **{n: fail for n in names if hasattr(dist, n)})


def check_raw_collectives(ranks):
    """Of a backend that has them and one that does not, at once and later, strided, empty."""
    of_all = [randn(2 * ranks.size, 3, seed=r) for r in range(ranks.size)]
    mine, total = of_all[ranks.rank], sum(of_all)
    strided = mine.t().contiguous().t()
    as_argument = None if ranks.size == dist.get_world_size() else ranks.group
    without = without_native_collectives("Backend gloo does not support this collective")
    for collectives in (contextlib.nullcontext(), without):
        with collectives:
            for group, x, is_async in (
                (ranks.group, mine, False), (as_argument, mine, True), (ranks.group, strided, True)
            ):  # fmt: skip
                for function, expected in (
                    (all_gather_raw, torch.cat(of_all)),
                    (reduce_scatter_raw, total.chunk(ranks.size)[ranks.rank]),
                    (all_reduce_raw, total),
                ):
                    argument = x.clone()
                    out, handle = function(argument, group, async_op=is_async)
                    assert (handle is not None) == is_async
                    if is_async:
                        handle.wait()
                    close(out, expected)
                    in_place = function is all_reduce_raw and argument.is_contiguous()
                    assert (out is argument) == in_place
            assert all_gather_raw(mine[:0], ranks.group)[0].shape == (0, 3)
            assert reduce_scatter_raw(mine[:0], ranks.group)[0].shape == (0, 3)


def check_other_errors_are_raised(ranks):
    with without_native_collectives("Connection closed by peer"):
        for function in (all_gather_raw, reduce_scatter_raw):
            with pytest.raises(RuntimeError, match="closed by peer"):
                function(randn(2 * ranks.size, 3), ranks.group)


def check_gradients_of_collectives(ranks):
    """Twice: the sum of squares of gathered, scattered and reduced values, and its Laplacian-like
    second derivative, computed by hand."""
    of_all = [randn(ranks.size, 2, seed=r) for r in range(ranks.size)]
    x = of_all[ranks.rank].clone().requires_grad_()
    total = sum(of_all)
    gathered = all_gather(x, ranks.group)
    close(gathered, torch.cat(of_all))
    # Each process's loss is the sum of cubes of all: the gradients of all of them are added.
    (grad,) = torch.autograd.grad((gathered**3).sum(), x, create_graph=True)
    close(grad, 3 * ranks.size * x**2)
    (second,) = torch.autograd.grad(grad.sum(), x)
    close(second, 6 * ranks.size * x)
    scattered = reduce_scatter(x, ranks.group)
    close(scattered, total[ranks.rank : ranks.rank + 1])
    (grad,) = torch.autograd.grad((scattered**3).sum(), x, create_graph=True)
    close(grad, 3 * total**2)
    (second,) = torch.autograd.grad(grad.sum(), x)
    close(second, 6 * ranks.size * total)
    reduced = all_reduce(x, ranks.group)
    close(reduced, total)
    close(x, of_all[ranks.rank])
    (grad,) = torch.autograd.grad((reduced**3).sum(), x)
    close(grad, 3 * total**2)


class Marked(nn.Module):
    """Parameters that are shared, sequence parallel, both or neither, of two dtypes."""

    def __init__(self, rank):
        super().__init__()
        for i, (name, dtype) in enumerate(
            (("shared", torch.float32), ("both", torch.bfloat16), ("tokens", torch.float32),
             ("unused", torch.float32), ("own", torch.float32), ("somewhere", torch.float32))
        ):  # fmt: skip
            values = randn(4, 3, seed=10 * rank + i, dtype=torch.float32).to(dtype)
            setattr(self, name, nn.Parameter(values))
        self.shared._shared_params = self.both._shared_params = True
        for p in (self.both, self.tokens, self.unused, self.somewhere):
            p._sequence_parallel = True
        self.shared.data = self.shared.data.t()


def check_marked_parameters(ranks):
    of_all = [Marked(r) for r in range(ranks.size)]
    mine = of_all[ranks.rank]
    own = mine.own.clone()
    sync_shared_params(mine, ranks.group)
    assert torch.equal(mine.shared, Marked(0).shared) and torch.equal(mine.both, Marked(0).both)
    assert torch.equal(mine.own, own)
    for r, model in enumerate(of_all):
        for name in ("shared", "both", "tokens", "own"):
            p = getattr(model, name)
            p.grad = torch.full_like(p, r + 1.0)
    if ranks.rank == 1:
        mine.somewhere.grad = torch.full_like(mine.somewhere, 5.0)
    kept = mine.tokens.grad
    allreduce_sequence_parallel_grad(mine, ranks.group)
    total = ranks.size * (ranks.size + 1) / 2
    assert mine.tokens.grad is kept and (kept == total).all()
    assert (mine.both.grad == total).all() and mine.both.grad.dtype == torch.bfloat16
    assert (mine.somewhere.grad == 5.0).all()
    assert mine.unused.grad is None
    assert (mine.own.grad == ranks.rank + 1.0).all()


def check_subgroup(ranks):
    """Shared values come from the first process of the group, not from process 0; who is not in it
    is refused."""
    if ranks.size < PROCESSES:
        return
    members = [1, 3]
    group = dist.new_group(members)
    model = Marked(ranks.rank)
    if ranks.rank in members:
        sync_shared_params(model, group)
        assert torch.equal(model.shared, Marked(members[0]).shared)
        close(all_gather_raw(randn(1, 2, seed=ranks.rank), group)[0].sum(),
              sum(randn(1, 2, seed=r) for r in members).sum())  # fmt: skip
    else:
        with pytest.raises(ValueError, match="a group that this process is a member of"):
            ColumnParallelLinear(4, 4, group)


def check_column_and_row(ranks):
    """Features that the processes do not divide, in multiples of 1 and 2, and 0 for some."""
    for hidden, multiple_of in ((4, 1), (7, 1), (10, 2), (2 * ranks.size - 2, 2)):
        for sequence_parallel in (True, False):
            fc1, fc2, whole = plain_mlp(torch.tanh, hidden)
            options = {"multiple_of": multiple_of, "sequence_parallel": sequence_parallel}
            module = nn.Module()
            module.fc1 = ColumnParallelLinear(FEATURES, hidden, ranks.group, **options).double()
            module.fc2 = RowParallelLinear(hidden, FEATURES, ranks.group, **options).double()
            module.forward = lambda x, m=module: m.fc2(torch.tanh(m.fc1(x)))

            def rows(x, m=multiple_of):
                return ranks.part(x, 0, m)

            fc2_columns = ranks.part(fc2.weight, 1, multiple_of)
            assert module.fc1.weight.shape == rows(fc1.weight).shape
            assert module.fc2.weight.shape == fc2_columns.shape
            assert module.fc1.out_features == module.fc2.in_features == fc2_columns.shape[1]
            with torch.no_grad():
                module.fc1.weight.copy_(rows(fc1.weight))
                module.fc1.bias.copy_(rows(fc1.bias))
                module.fc2.weight.copy_(fc2_columns)
                if ranks.rank == 0:
                    module.fc2.bias.copy_(fc2.bias)
            x = randn(TOKENS, BATCH, FEATURES)
            compare(ranks, whole, module, x, sequence_parallel)
            close(module.fc1.weight.grad, rows(fc1.weight.grad))
            close(module.fc1.bias.grad, rows(fc1.bias.grad))
            close(module.fc2.weight.grad, ranks.part(fc2.weight.grad, 1, multiple_of))
            if ranks.rank == 0:
                close(module.fc2.bias.grad, fc2.bias.grad)


def check_fused_mlps(ranks):
    for name, function in ACTIVATIONS.items():
        mlp = plain_mlp(function, 10, out=5)
        for level in (0, 1, 2):
            for sequence_parallel in (True, False):
                module = ParallelFusedMLP(
                    FEATURES, 10, 5, name, ranks.group, sequence_parallel=sequence_parallel,
                    checkpoint_lvl=level, dtype=torch.float64,
                )  # fmt: skip
                compare_mlp(ranks, module, mlp, sequence_parallel)
        compare_mlp(ranks, module.eval(), mlp, sequence_parallel)


def check_fused_mlp_of_a_call(ranks):
    """FusedMLP and FusedDense take the group where they are called."""
    fc1, fc2, whole = plain_mlp(ACTIVATIONS["sqrelu"], 8)
    module = FusedMLP(
        FEATURES, 8 // ranks.size, activation="sqrelu", return_residual=True, dtype=torch.float64
    )
    with torch.no_grad():
        module.fc1.weight.copy_(ranks.part(fc1.weight, 0))
        module.fc1.bias.copy_(ranks.part(fc1.bias, 0))
        module.fc2.weight.copy_(ranks.part(fc2.weight, 1))
        module.fc2.bias.copy_(fc2.bias / ranks.size)

    def with_residual(x):
        y, residual = module(x, process_group=ranks.group)
        return y + residual.sin()

    x = randn(TOKENS, BATCH, FEATURES)
    compare(ranks, lambda x: whole(x) + x.sin(), with_residual, x, True)
    close(module.fc1.weight.grad, ranks.part(fc1.weight.grad, 0))

    dense = FusedDense(FEATURES, 8 // ranks.size, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(ranks.part(fc1.weight, 0))
        dense.bias.copy_(ranks.part(fc1.bias, 0))
    out = dense(ranks.tokens(x), process_group=ranks.group)
    close(out, ranks.part(fc1(x), -1))


def check_residuals(ranks):
    """The residual branch's gradient is counted once, whatever the group adds up."""
    fc1, fc2, _ = plain_mlp(F.relu, 8)
    parts = {
        "weight1": ranks.part(fc1.weight, 0), "bias1": ranks.part(fc1.bias, 0),
        "weight2": ranks.part(fc2.weight, 1), "bias2": fc2.bias if ranks.rank == 0 else None,
    }  # fmt: skip
    parts = {name: p if p is None else p.detach() for name, p in parts.items()}
    for sequence_parallel in (True, False):
        options = {"process_group": ranks.group, "sequence_parallel": sequence_parallel,
                   "return_residual": True}  # fmt: skip

        def mlp(x, options=options):
            y, residual = fused_mlp_func(x, **parts, activation="relu", **options)
            reduce = reduce_scatter if options["sequence_parallel"] else all_reduce
            return reduce(y, ranks.group) + residual.sin()

        def dense(x, options=options):
            y, residual = fused_dense_func(x, parts["weight1"], parts["bias1"], **options)
            y = F.linear(y, parts["weight2"], parts["bias2"])
            reduce = reduce_scatter if options["sequence_parallel"] else all_reduce
            return reduce(y, ranks.group) + residual.sin()

        x = randn(TOKENS, BATCH, FEATURES)
        compare(ranks, lambda x: fc2(F.relu(fc1(x))) + x.sin(), mlp, x, sequence_parallel)
        compare(ranks, lambda x: fc2(fc1(x)) + x.sin(), dense, x, sequence_parallel)


def check_mlps(ranks):
    for sequence_parallel in (True, False):
        options = {"sequence_parallel": sequence_parallel, "dtype": torch.float64}
        module = ParallelMLP(FEATURES, 9, process_group=ranks.group, **options)
        compare_mlp(ranks, module, plain_mlp(F.gelu, 9), sequence_parallel)
        for activation in (F.sigmoid, F.silu, torch.tanh):
            # 10 rounded up to a multiple of 7: 14, which 4 processes do not divide.
            module = ParallelGatedMlp(
                FEATURES, ranks.group, 10, activation=activation, multiple_of=7, **options
            )
            gated = GatedMlp(
                FEATURES, 10, activation=activation, multiple_of=7, dtype=torch.float64
            )
            torch.manual_seed(1)
            with torch.no_grad():
                for p in gated.parameters():
                    p.normal_()

            def halves(x):
                return torch.cat([ranks.part(half, 0) for half in x.chunk(2)])

            mlp = gated.fc1, gated.fc2, gated
            compare_mlp(ranks, module, mlp, sequence_parallel, halves)


def check_second_derivatives(ranks):
    """Of the gradient's square, in x and the weights."""
    fc1, fc2, whole = plain_mlp(ACTIVATIONS["gelu_approx"], 8)
    x = randn(TOKENS, FEATURES)
    for sequence_parallel in (True, False):
        module = ParallelFusedMLP(
            FEATURES, 8, process_group=ranks.group, sequence_parallel=sequence_parallel,
            dtype=torch.float64,
        )  # fmt: skip
        copy_parts(ranks, module, fc1, fc2)

        def penalty(function, x):
            (grad,) = torch.autograd.grad((function(x) ** 2).sum(), x, create_graph=True)
            return (grad**2).sum()

        x_whole = x.clone().requires_grad_()
        expected = torch.autograd.grad(penalty(whole, x_whole), (x_whole, fc1.weight, fc2.weight))
        x_part = ranks.tokens(x, sequence_parallel).clone().requires_grad_()
        actual = torch.autograd.grad(
            penalty(module, x_part), (x_part, module.fc1.weight, module.fc2.weight)
        )
        close(actual[0], ranks.tokens(expected[0], sequence_parallel))
        close(actual[1], ranks.part(expected[1], 0))
        close(actual[2], ranks.part(expected[2], 1))


class Events(TorchDispatchMode):
    """Writes down products, and the start and the end of collectives."""

    def __init__(self):
        super().__init__()
        self.list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.list.append("product")
        return function(*args, **(kwargs or {}))

    def of(self, raw):
        def recorded(*args, **kwargs):
            self.list.append("start")
            out, handle = raw(*args, **kwargs)
            ended = mock.Mock()
            ended.wait.side_effect = lambda: (self.list.append("end"), handle.wait())
            return out, ended

        return recorded


def check_overlap(ranks):
    """In a backward, a product runs between the start and the end of every collective."""
    if not ranks.has_compiler:
        return
    events = Events()
    recorded = {name: events.of(getattr(_dense, name))
                for name in ("all_gather_raw", "reduce_scatter_raw", "all_reduce_raw")}  # fmt: skip
    x = randn(TOKENS, FEATURES).requires_grad_()
    for sequence_parallel in (True, False):
        options = {"process_group": ranks.group, "sequence_parallel": sequence_parallel}
        layers = [
            ColumnParallelLinear(FEATURES, 8, **options).double(),
            ParallelFusedMLP(FEATURES, 8, **options).double(),
        ]
        for layer in layers:
            loss = layer(ranks.tokens(x, sequence_parallel)).sum()
            events.list.clear()
            with mock.patch.multiple(_dense, **recorded), events:
                loss.backward()
            products = ["product"] * (4 if layer is layers[1] else 2)
            backward = [e for e in events.list if e == "product"]
            assert backward == products
            started, ended = (
                [i for i, e in enumerate(events.list) if e == kind] for kind in ("start", "end")
            )
            assert len(started) == len(ended) == (2 if sequence_parallel else 1)
            for first, last in zip(started, ended):
                assert "product" in events.list[first:last], events.list


def check_modes(ranks):
    """Without gradients, checkpointed, compiled, under autocast, with frozen parameters."""
    fc1, fc2, whole = plain_mlp(ACTIVATIONS["relu"], 8)
    x = randn(TOKENS, BATCH, FEATURES)
    for sequence_parallel in (True, False):
        module = ParallelFusedMLP(
            FEATURES, 8, activation="relu", process_group=ranks.group, dtype=torch.float64,
            sequence_parallel=sequence_parallel,
        )  # fmt: skip
        copy_parts(ranks, module, fc1, fc2)
        part = ranks.tokens(x, sequence_parallel)
        expected = ranks.tokens(whole(x), sequence_parallel)
        with torch.no_grad():
            close(module(part), expected)
        with torch.inference_mode():
            close(module(part), expected)
        if ranks.has_compiler and sequence_parallel:
            close(torch.compile(module, backend="eager")(part), expected)
            again = functools.partial(checkpoint, module, use_reentrant=False)
            compare(ranks, whole, again, x, sequence_parallel)
        module.requires_grad_(False)
        compare(ranks, whole, module, x, sequence_parallel)

        module = module.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            half = module(part.float())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.05)
        half.float().sum().backward()
        assert module.fc1.weight.grad.dtype == torch.float32


def check_embeddings(ranks):
    vocab, positions, features = 5 * ranks.size, 12, 3 * ranks.size
    torch.manual_seed(2)
    padding = vocab - 2  # a row of the last process
    whole = GPT2Embeddings(features, vocab, positions, padding, dtype=torch.float64)
    ids = torch.randint(vocab, (ranks.size, 6), generator=torch.Generator().manual_seed(3))
    ids[0, :2] = padding
    for sequence_parallel in (True, False):
        for combine in (True, False):
            for position_ids in (None, torch.arange(6).flip(0), ids % positions):
                part = ParallelGPT2Embeddings(
                    features, vocab, positions, ranks.group, padding,
                    sequence_parallel=sequence_parallel, dtype=torch.float64,
                )  # fmt: skip
                with torch.no_grad():
                    part.word_embeddings.weight.copy_(ranks.part(whole.word_embeddings.weight, 0))
                    part.position_embeddings.weight.copy_(
                        ranks.part(whole.position_embeddings.weight, 1)
                    )
                whole.zero_grad()
                expected = whole(ids, position_ids)
                expected = expected.flatten(0, 1) if combine else expected
                actual = part(ids, position_ids, combine_batch_seqlen_dim=combine)
                assert torch.equal(actual, ranks.tokens(expected, sequence_parallel))
                weights = randn(*expected.shape)
                (expected * weights).sum().backward()
                (actual * ranks.tokens(weights, sequence_parallel)).sum().backward()
                close(part.word_embeddings.weight.grad,
                      ranks.part(whole.word_embeddings.weight.grad, 0))  # fmt: skip
                close(part.position_embeddings.weight.grad,
                      ranks.part(whole.position_embeddings.weight.grad, 1))  # fmt: skip
    for bad in (-1, vocab):
        with pytest.raises(IndexError, match=f"between 0 and {vocab - 1}, got {bad} to {bad}"):
            part.word_embeddings(torch.tensor([bad]))


def check_refusals(ranks):
    size = ranks.size
    rows = f"input_ has {size + 1} rows, which the {size} processes of the group do not divide"
    with pytest.raises(ValueError, match=rows):
        reduce_scatter_raw(torch.ones(size + 1, 2), ranks.group)
    with pytest.raises(ValueError, match="input_ must have a first dimension"):
        all_gather_raw(torch.ones(()), ranks.group)
    with pytest.raises(ValueError, match=rows):
        RowParallelLinear(4, 4, ranks.group)(torch.ones(size + 1, 4 // size))
    with pytest.raises(ValueError, match=r"x must be \(tokens, ..., in_features\) over a process"):
        ColumnParallelLinear(4, 4, ranks.group)(torch.ones(4))
    for layer, name in ((ColumnParallelLinear, "out"), (RowParallelLinear, "in")):
        with pytest.raises(ValueError, match=rf"{name}_features \(9\) must be a multiple of 2"):
            layer(9, 9, ranks.group, multiple_of=2)
    divisible = rf"\({size + 1}\) must be divisible by the {size} processes"
    with pytest.raises(ValueError, match="num_embeddings " + divisible):
        VocabParallelEmbedding(size + 1, 4, process_group=ranks.group)
    with pytest.raises(ValueError, match="embedding_dim " + divisible):
        ColumnParallelEmbedding(4, size + 1, process_group=ranks.group)
    with pytest.raises(ValueError, match="max_norm and scale_grad_by_freq"):
        VocabParallelEmbedding(4, 4, process_group=ranks.group, max_norm=1.0)
    with pytest.raises(ValueError, match="padding_idx 4 is not one of 4"):
        VocabParallelEmbedding(4, 4, process_group=ranks.group, padding_idx=4)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def run_rank(rank, port):
    """All checks in the group of all processes, then in two groups of two."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    try:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for group in (dist.group.WORLD, pairs[rank // 2]):
            ranks = Ranks(group)
            for check in CHECKS:
                try:
                    check(ranks)
                except Exception as error:
                    where = f"on process {ranks.rank} of {ranks.size}"
                    raise AssertionError(f"{check.__name__} {where}") from error
    finally:
        dist.destroy_process_group()
