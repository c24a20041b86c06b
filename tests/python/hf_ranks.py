"""What each process of test_models_to_hf.py does: its part of a model against the whole."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from hf_cases import edit_config, tokens
from safetensors.torch import load_file

from flash_attn.models import from_hf, to_hf

RANKS = 2


def compare(folder, group):
    """Logits, greedy tokens of different lengths, and the weights of all processes written."""
    whole, part = from_hf(folder), from_hf(folder, process_group=group)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (part, whole)]
    assert sizes[0] < 0.7 * sizes[1]
    ids = tokens(2, 20)
    with torch.inference_mode():
        rows = part(ids).logits.shape[-1]
        expected = whole(ids).logits[..., dist.get_rank() * rows :][..., :rows]
        torch.testing.assert_close(part(ids).logits, expected, atol=1e-4, rtol=1e-4)
        prompts = [ids[0], ids[1, :7]]
        ours = part.generate(prompts, None, max_new_tokens=12)
        theirs = whole.generate(prompts, None, max_new_tokens=12)
    assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]
    back = folder.parent / f"{folder.name} again"
    to_hf(part, back)
    dist.barrier()
    expected, actual = (load_file(f / "model.safetensors") for f in (folder, back))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


def compare_failures(folder, group):
    """What the first process raises, all do."""
    model = from_hf(folder, process_group=group)
    file = folder.parent / "file"
    file.write_text("no folder")
    with pytest.raises((OSError, RuntimeError), match="file"):
        to_hf(model, file / "folder")
    dist.barrier()
    if dist.get_rank() == 0:
        edit_config(folder, hidden_size=32)
    dist.barrier()
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight has shape"):
        from_hf(folder, process_group=group)


def run_rank(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    names = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    for name in names:
        compare(folder / name, dist.group.WORLD)
    compare_failures(folder / names[0], dist.group.WORLD)
    dist.destroy_process_group()
