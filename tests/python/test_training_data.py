"""From text to the order of sequences: tokenizers, token files, the position that tells all."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
import training_cases  # noqa: F401  makes training importable

from training.corpus import CorpusError, prepare
from training.dataset import EpochOrder, StepSampler, TokenDataset, restore_loader, training_loader
from training.settings import DataSettings, SettingError
from training.token_file import (
    TokenFileError,
    open_tokens,
    read_header,
    verify_content,
    write_tokens,
)


def token_file(tmp_path, count=1000, vocab_size=300):
    path = tmp_path / "some.tokens"
    tokens = np.arange(count) % vocab_size
    write_tokens(path, np.array_split(tokens, 7), vocab_size, "bytes")
    return path, tokens


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_token_file_keeps_tokens_and_facts(tmp_path, vocab_size, dtype):
    path, tokens = token_file(tmp_path, 1000, vocab_size)
    header, read = open_tokens(path)
    assert read.dtype == dtype
    assert np.array_equal(read, tokens)
    assert (header.vocab_size, header.num_tokens, header.tokenizer) == (vocab_size, 1000, "bytes")
    verify_content(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_token_file_that_is_damaged_is_refused(tmp_path):
    path, _ = token_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(TokenFileError, match=r"has 2062 bytes where its header asks for 2064"):
        open_tokens(path)
    path.write_bytes(whole[:20] + b"\x01" + whole[21:])
    with pytest.raises(TokenFileError, match=r"the header of .* is damaged"):
        open_tokens(path)
    path.write_bytes(b"some text")
    with pytest.raises(TokenFileError, match="is no token file"):
        open_tokens(path)
    path.write_bytes(whole[:100] + b"\xff" + whole[101:])
    read_header(path)
    with pytest.raises(TokenFileError, match=r"the tokens of .* are damaged"):
        verify_content(path)


def test_token_outside_the_vocabulary_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(TokenFileError, match="below the vocabulary's 10, got 10"):
        write_tokens(tmp_path / "x", [np.array([3, 10])], 10, "bytes")
    assert not list(tmp_path.iterdir())


def settings(tmp_path, **changes):
    return DataSettings(cache=str(tmp_path / "cache"), **{"seqlen": 4, "hold_out": 0, **changes})


def test_texts_become_bytes_and_every_third_is_held_out(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"text {i} ü")
    corpus = prepare(settings(tmp_path, train=[f"{tmp_path}/*.txt"], hold_out=3, tokenizer="bytes"))
    _, train = open_tokens(corpus.train)
    _, held_out = open_tokens(corpus.validation)
    assert bytes(train.astype(np.uint8)) == "".join(f"text {i} ü\0" for i in (0, 1, 3, 4)).encode()
    assert bytes(held_out.astype(np.uint8)) == "".join(f"text {i} ü\0" for i in (2, 5)).encode()
    assert corpus.tokenizer.decode(train[:9]) == "text 0 ü"


def test_json_lines_and_separators(tmp_path):
    lines = [json.dumps({"body": text}) for text in ("first", "", "second")]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / "b.txt").write_text("third<|end|>fourth<|end|>")
    patterns = [f"{tmp_path}/*.jsonl.gz", f"{tmp_path}/*.txt"]
    options = {"json_field": "body", "separator": "<|end|>", "tokenizer": "bytes"}
    corpus = prepare(settings(tmp_path, train=patterns, **options))
    _, train = open_tokens(corpus.train)
    assert bytes(train.astype(np.uint8)) == b"first\0second\0third\0fourth\0"
    (tmp_path / "c.jsonl").write_text('{"body": "good"}\n{"text": "other"}\n')
    with pytest.raises(CorpusError, match=r"line 2 of .*c.jsonl .*'body'"):
        prepare(settings(tmp_path, train=[f"{tmp_path}/c.jsonl"], **options))
    (tmp_path / "d.jsonl").write_text('{"body": "good"}\n{"body": "ab\\ud83d\\ude00\\ud800"}\n')
    for tokenizer in ("bytes", "bpe"):
        half = settings(
            tmp_path, train=[f"{tmp_path}/d.jsonl"], **{**options, "tokenizer": tokenizer}
        )
        sentence = r"'body' in line 2 of .*d.jsonl must be Unicode, .*'\\ud800', at character 3"
        with pytest.raises(CorpusError, match=sentence):
            prepare(half)
    (tmp_path / "e.jsonl").write_text("[" * 100_000)
    with pytest.raises(CorpusError, match=r"line 1 of .*e.jsonl must be a JSON object"):
        prepare(settings(tmp_path, train=[f"{tmp_path}/e.jsonl"], **options))


def test_trained_bpe_gives_the_text_back_and_is_used_again(tmp_path):
    text = "der Fluß fließt, the river flows " * 40
    (tmp_path / "a.txt").write_text(text)
    said = []
    options = settings(tmp_path, train=[f"{tmp_path}/a.txt"], vocab_size=300)
    corpus = prepare(options, said.append)
    assert len(said) == 2
    again = prepare(options, said.append)
    assert len(said) == 2
    assert again.train == corpus.train
    header, tokens = open_tokens(corpus.train)
    assert header.vocab_size == corpus.tokenizer.vocab_size <= 300
    assert corpus.tokenizer.decode(tokens[:-1]) == text
    assert tokens[-1] == corpus.tokenizer.end_of_text
    assert len(tokens) < len(text) / 4  # words are tokens
    (folder := tmp_path / "folder").mkdir()
    bpe = next((tmp_path / "cache").glob("bpe-*.json"))
    (folder / "tokenizer.json").write_text(bpe.read_text())
    options.tokenizer, options.tokenizer_folder = "folder", str(folder)
    assert prepare(options).train == corpus.train
    options.end_of_text = "<none>"
    with pytest.raises(SettingError, match=r"data.end_of_text must be a token .*'<none>'"):
        prepare(options)


def test_changed_text_is_read_anew_and_short_text_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    options = settings(tmp_path, train=[f"{tmp_path}/a.txt"], tokenizer="bytes")
    first = prepare(options).train
    (tmp_path / "a.txt").write_text("another text")
    assert prepare(options).train != first
    options.seqlen = 13
    with pytest.raises(TokenFileError, match=r"data.seqlen must be below the 13 tokens .* got 13"):
        prepare(options)


def test_windows_are_consecutive(tmp_path):
    path, tokens = token_file(tmp_path, 1000)
    dataset = TokenDataset(path, 64)
    assert len(dataset) == 15
    for i in (0, 14):
        assert dataset[i].tolist() == tokens[64 * i : 64 * i + 65].tolist()
    assert len(TokenDataset(path, 999)) == 1
    assert len(TokenDataset(path, 1000)) == 0


def test_order_takes_every_sequence_once_an_epoch():
    order = EpochOrder(50, seed=3)
    epochs = [[order[50 * epoch + i] for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = EpochOrder(50, seed=3)
    assert [again[137], again[2], again[61]] == [epochs[2][37], epochs[0][2], epochs[1][11]]
    assert [EpochOrder(50, seed=4)[i] for i in range(50)] != epochs[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_steps_take_the_same_sequences_on_any_number_of_processes(world_size):
    samplers = [StepSampler(EpochOrder(30, 0), 8, rank, world_size) for rank in range(world_size)]
    for sampler in samplers:
        sampler.load_state_dict({"step": 3})
    order = EpochOrder(30, 0)
    for step in (3, 4):  # across the end of an epoch
        drawn = [index for sampler in samplers for index in next(sampler)]
        assert drawn == [order[8 * step + i] for i in range(8)]


@pytest.mark.parametrize(("workers", "later_workers"), [(0, 0), (2, 2), (2, 0)])
def test_loader_goes_on_where_it_was(tmp_path, workers, later_workers):
    path, _ = token_file(tmp_path)
    dataset = TokenDataset(path, 16)

    def loader(workers):
        return training_loader(dataset, 5, 4, rank=0, world_size=1, workers=workers)

    first = loader(workers)
    batches = iter(first)
    for _ in range(20):  # past an epoch's 15 steps
        next(batches)
    state = {"workers": workers, "loader": first.state_dict()}
    expected = [next(batches) for _ in range(3)]
    later = loader(later_workers)
    restore_loader(later, state, 20)
    batches = iter(later)
    for batch in expected:
        assert torch.equal(next(batches), batch)


def test_fewer_documents_than_hold_out_hold_out_the_last(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 9)
    corpus = prepare(
        settings(tmp_path, train=[f"{tmp_path}/*.txt"], hold_out=200, tokenizer="bytes")
    )
    assert bytes(open_tokens(corpus.train)[1].tolist()) == b"a" * 9 + b"\0" + b"b" * 9 + b"\0"
    assert bytes(open_tokens(corpus.validation)[1].tolist()) == b"c" * 9 + b"\0"
    one = settings(tmp_path, train=[f"{tmp_path}/a.txt"], hold_out=200, tokenizer="bytes")
    with pytest.raises(SettingError, match=r"one document, got 200: set data\.hold_out=0, "):
        prepare(one)
