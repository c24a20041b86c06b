"""flash_attn.utils.pretrained: whole checkpoints load, others say which file is at fault."""

from __future__ import annotations

import json

import pytest
import torch

from flash_attn.utils.pretrained import state_dict_from_pretrained

safetensors = pytest.importorskip("safetensors.torch")

STATE = {
    "a.weight": torch.randn(3, 4),
    "a.bias": torch.randn(3, dtype=torch.bfloat16),
    "steps": torch.tensor([5, 7]),
    "none": torch.empty(0, 2),
}
SHARDS = (["a.weight"], ["a.bias", "steps", "none"])


def write(folder, is_safe, is_sharded, state=STATE):
    """Write a checkpoint; return the files with tensors."""
    suffix = "safetensors" if is_safe else "bin"
    stem = "model" if is_safe else "pytorch_model"

    def save(name, part):
        part = {key: state[key] for key in part}
        if is_safe:
            safetensors.save_file(part, folder / name)
        else:
            torch.save(part, folder / name)
        return folder / name

    if not is_sharded:
        return [save(f"{stem}.{suffix}", state)]
    names = [f"{stem}-{i + 1:05d}-of-00002.{suffix}" for i in range(2)]
    weight_map = {key: name for part, name in zip(SHARDS, names) for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return [save(name, part) for name, part in zip(names, SHARDS)]


LAYOUTS = [(True, False), (True, True), (False, False), (False, True)]
LAYOUT_NAMES = ["safetensors", "safetensors-shards", "bin", "bin-shards"]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype
        assert torch.equal(actual[name], x), name


@layouts
def test_loads(tmp_path, layout):
    files = write(tmp_path, *layout)
    assert_same(state_dict_from_pretrained(tmp_path), STATE)
    assert_same(
        state_dict_from_pretrained(str(tmp_path), device="cpu", dtype=torch.float16),
        {name: x.half() if x.is_floating_point() else x for name, x in STATE.items()},
    )
    if len(files) == 1:
        assert_same(state_dict_from_pretrained(files[0]), STATE)


def test_loads_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(state_dict_from_pretrained(tmp_path), model.state_dict())


def test_files_without_zip(tmp_path):
    """Those that torch wrote before 1.6."""
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(state_dict_from_pretrained(tmp_path), STATE)


def test_safetensors_go_first(tmp_path):
    write(tmp_path, False, False, {"other": torch.zeros(1)})
    write(tmp_path, True, False)
    assert_same(state_dict_from_pretrained(tmp_path), STATE)


def test_is_mapped_not_read(tmp_path):
    """A file of 1 GB of zeros, of which the disk has a few pages, loads without as much memory."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}})
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2**30)
    x = state_dict_from_pretrained(tmp_path)["x"]
    assert x.shape == (2**28,) and float(x[-1]) == 0.0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 2**18, f"{grown} KiB more"


@layouts
@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_truncated_file(tmp_path, layout, part):
    file = write(tmp_path, *layout)[-1]
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=f"{file.name} is not a whole checkpoint"):
        state_dict_from_pretrained(tmp_path)


@layouts
def test_corrupt_header(tmp_path, layout):
    file = write(tmp_path, *layout)[0]
    data = bytearray(file.read_bytes())
    data[:64] = b"\xff" * 64
    if file.suffix == ".bin":
        data[-64:] = b"\xff" * 64
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{file.name} is not a whole checkpoint"):
        state_dict_from_pretrained(tmp_path)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a checkpoint was run')",)


def test_runs_no_code(tmp_path):
    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a whole checkpoint"):
        state_dict_from_pretrained(tmp_path)


def test_other_things_than_tensors(tmp_path):
    torch.save({"x": 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a whole .*other things"):
        state_dict_from_pretrained(tmp_path)


@pytest.mark.parametrize("is_safe", [True, False])
def test_shards_and_index_that_differ(tmp_path, is_safe):
    first, second = write(tmp_path, is_safe, True)
    held = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"{second.name} is missing"):
        state_dict_from_pretrained(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f"{second.name} lacks 'a.bias'"):
        state_dict_from_pretrained(tmp_path)
    second.write_bytes(held)
    assert_same(state_dict_from_pretrained(tmp_path), STATE)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "JSONDecodeError"),
        ("{}", "KeyError: 'weight_map'"),
        ("[]", "TypeError"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"x": 5}}', "outside its folder"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_broken_index(tmp_path, text, reason):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=f"index.json is not an index of a checkpoint .*{reason}"):
        state_dict_from_pretrained(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors, "):
        state_dict_from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a local folder or file"):
        state_dict_from_pretrained(tmp_path / "gone")


def test_name_from_the_hubs_cache(tmp_path, monkeypatch):
    """A name is looked up by huggingface_hub; offline, in its cache on this machine."""
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.hf_hub_download
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--someone--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    write(snapshot, True, True)
    monkeypatch.chdir(tmp_path)
    assert_same(state_dict_from_pretrained("someone/model"), STATE)
    with pytest.raises(FileNotFoundError, match="someone/other is not a local folder or file"):
        state_dict_from_pretrained("someone/other")
