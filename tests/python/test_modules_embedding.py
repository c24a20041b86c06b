"""Embeddings on one process, against plain torch."""

from __future__ import annotations

import pytest
import torch
from dense_reference import DTYPES
from torch import nn

from flash_attn.modules.embedding import (
    BertEmbeddings,
    ColumnParallelEmbedding,
    GPT2Embeddings,
    ParallelGPT2Embeddings,
    VocabParallelEmbedding,
)

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
POSITIONS = [None, torch.tensor([4, 0, 3, 1, 2]), torch.tensor([[1, 2, 3, 4, 5]]), IDS % 6]
TYPES = [None, torch.tensor([0, 1, 1, 0, 1]), IDS % 2]


def summed(module, *ids):
    """Rows of a module's tables, added in the order of the arguments."""
    total = 0.0
    for name, i in ids:
        total = total + getattr(module, name).weight[i]
    return total


def check(module, actual, expected_of):
    """Values, bit for bit, and gradients as of ``expected_of()``."""
    module.zero_grad()
    weights = torch.randn(actual.shape, dtype=actual.dtype)
    actual.backward(weights)
    grads = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    expected = expected_of()
    assert torch.equal(actual, expected) and actual.dtype == expected.dtype
    expected.backward(weights)
    for name, p in module.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_gpt2(dtype, positions):
    places = torch.arange(5) if positions is None else positions
    names = (("word_embeddings", IDS), ("position_embeddings", places))
    module = GPT2Embeddings(8, 11, 7, dtype=dtype)
    check(module, module(IDS, positions), lambda: summed(module, *names))
    parallel = ParallelGPT2Embeddings(8, 11, 7, None, dtype=dtype)
    check(parallel, parallel(IDS, positions), lambda: summed(parallel, *names))
    combined = parallel(IDS, positions, combine_batch_seqlen_dim=True)
    assert torch.equal(combined, parallel(IDS, positions).flatten(0, 1))
    assert torch.equal(module(IDS.int(), positions), module(IDS, positions))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("types", TYPES)
def test_bert(dtype, types):
    for positions in POSITIONS:
        places = torch.arange(5) if positions is None else positions
        kinds = torch.zeros(5, dtype=torch.long) if types is None else types
        module = BertEmbeddings(8, 11, 7, 2, dtype=dtype)
        names = (("word_embeddings", IDS), ("position_embeddings", places),
                 ("token_type_embeddings", kinds))  # fmt: skip
        check(module, module(IDS, positions, types), lambda m=module, n=names: summed(m, *n))


def test_without_positions_or_types():
    for module in (
        GPT2Embeddings(8, 11, 0),
        BertEmbeddings(8, 11, -1, 0),
        ParallelGPT2Embeddings(8, 11, 0, None),
    ):
        assert list(module.state_dict()) == ["word_embeddings.weight"]
        check(module, module(IDS), lambda m=module: m.word_embeddings.weight[IDS])
        assert module(IDS.repeat(1, 5)).shape == (2, 25, 8)


def test_projection():
    module = GPT2Embeddings(8, 11, 7, word_embed_proj_dim=3)
    assert {n: tuple(p.shape) for n, p in module.state_dict().items()} == {
        "word_embeddings.weight": (11, 3),
        "project_in.weight": (8, 3),
        "position_embeddings.weight": (7, 8),
    }

    def expected():
        words = nn.functional.linear(module.word_embeddings.weight[IDS], module.project_in.weight)
        return words + module.position_embeddings.weight[torch.arange(5)]

    check(module, module(IDS), expected)


def test_state_dicts():
    names = ["word_embeddings.weight", "position_embeddings.weight"]
    assert list(GPT2Embeddings(8, 11, 7).state_dict()) == names
    assert list(ParallelGPT2Embeddings(8, 11, 7, None).state_dict()) == names
    assert list(BertEmbeddings(8, 11, 7, 2).state_dict()) == [
        *names, "token_type_embeddings.weight"
    ]  # fmt: skip
    meta = BertEmbeddings(8, 11, 7, 2, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float16)}


def test_padding_has_no_gradient():
    for module in (
        GPT2Embeddings(8, 11, 7, padding_idx=3),
        BertEmbeddings(8, 11, 7, 2, padding_idx=3),
        ParallelGPT2Embeddings(8, 11, 7, None, padding_idx=-8),
    ):
        assert (module.word_embeddings.weight[3] == 0).all()
        module(IDS).sum().backward()
        used = module.word_embeddings.weight.grad.any(dim=1)
        assert used.tolist() == [i in (1, 2, 4, 5, 6, 9) for i in range(11)]


def test_alone_parallel_embeddings_are_torchs():
    for module in (
        VocabParallelEmbedding(11, 8, padding_idx=2, max_norm=1.0),
        ColumnParallelEmbedding(11, 8, padding_idx=2, max_norm=1.0),
    ):
        plain = nn.Embedding(11, 8, padding_idx=2, max_norm=1.0)
        plain.load_state_dict(module.state_dict())
        assert torch.equal(module(IDS), plain(IDS))


GPT2, BERT = GPT2Embeddings(8, 11, 7), BertEmbeddings(8, 11, 7, 2)
BAD_CALLS = {
    "input_ids must be a torch.Tensor, got list": lambda: GPT2([[1]]),
    r"input_ids must be \(batch, seqlen\), got \(5,\)": lambda: GPT2(IDS[0]),
    "position_ids must be a torch.Tensor": lambda: BERT(IDS, 3),
    r"position_ids must be \(batch, seqlen\) as input_ids \(2, 5\), or .* got \(4,\)": lambda: GPT2(
        IDS, torch.arange(4)
    ),
    r"token_type_ids must be .* got \(3, 5\)": lambda: BERT(
        IDS, None, torch.zeros(3, 5, dtype=torch.long)
    ),
    "input_ids have 10 tokens, max_position_embeddings is 7": lambda: GPT2(IDS.repeat(1, 2)),
    "padding_idx 11 is not one of 11": lambda: VocabParallelEmbedding(11, 8, padding_idx=11),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD_CALLS[message]()
