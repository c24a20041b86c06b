"""Steps of decoding of a model that someone changes: what its modules compute, whatever it is."""

from __future__ import annotations

import threading

import pytest
import torch
from test_models_decode_step import CONFIGS, make_model, one_thread, steps  # noqa: F401
from torch import nn

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.mlp import GatedMlp
from flash_attn.utils.generation import InferenceParams


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def doubled_forward(module):
    forward = module.forward
    module.forward = lambda *args, **options: 2 * forward(*args, **options)


def hooked(module):
    hooks = pytest.importorskip("accelerate.hooks")

    class Hook(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    hooks.add_hook_to_module(module, Hook())


def of_other_class(module):
    kind = type(module)
    forward = {"forward": lambda self, x: 2 * kind.forward(self, x)}
    module.__class__ = type("Other", (kind,), forward)


def with_head_norms(mixer):
    mixer.q_norm, mixer.k_norm = nn.LayerNorm(8).eval(), nn.LayerNorm(8).eval()


CHANGES = {
    "forward of mlp": lambda model, layer: doubled_forward(layer.mlp),
    "forward of linear": lambda model, layer: doubled_forward(layer.mlp.fc2),
    "forward of dropout": lambda model, layer: doubled_forward(layer.dropout2),
    "accelerate": lambda model, layer: hooked(layer.mlp.fc1),
    "class": lambda model, layer: of_other_class(layer.mlp.fc2),
    "one more layer": lambda model, layer: model.layers.append(model.layers[1]),
    "one layer less": lambda model, layer: model.layers.pop(1),
    "post_norm1": lambda model, layer: setattr(layer, "post_norm1", nn.LayerNorm(32).eval()),
    "head norms": lambda model, layer: with_head_norms(layer.mixer),
    "interleaved": lambda model, layer: setattr(layer.mixer.rotary_emb, "interleaved", True),
    "window": lambda model, layer: setattr(layer.mixer.inner_cross_attn, "window_size", (1, 0)),
    "softcap": lambda model, layer: setattr(layer.mixer.inner_cross_attn, "softcap", 0.5),
    "dropout2": lambda model, layer: setattr(layer, "dropout2", Doubled().eval()),
    "drop_path2": lambda model, layer: setattr(layer, "drop_path2", Doubled().eval()),
    "drop_f": lambda model, layer: setattr(model, "drop_f", Doubled().eval()),
    "hook on drop_f": lambda model, layer: model.drop_f.register_forward_hook(
        lambda module, args, out: 2 * out
    ),
    "strided norm": lambda model, layer: setattr(
        layer.norm1.weight, "data", torch.linspace(0, 2, 64)[::2]
    ),
}


def decoded(model, change):
    """Logits of three steps, the change before the second."""
    params, logits = InferenceParams(16, 2), []
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model(torch.randint(67, (2, 5), generator=generator), inference_params=params)
        params.seqlen_offset = 5
        for i in range(3):
            if i == 1:
                change(model.transformer, model.transformer.layers[0])
                for index in range(len(model.transformer.layers)):  # of a layer that is new
                    cache = params.key_value_memory_dict[0]
                    params.key_value_memory_dict.setdefault(index, torch.zeros_like(cache))
            ids = torch.randint(67, (2, 1), generator=generator)
            logits.append(model(ids, inference_params=params).logits)
            params.seqlen_offset += 1
    return torch.stack(logits)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name, steps):  # noqa: F811
    steps.use = False
    expected = decoded(make_model(**CONFIGS["llama"]), CHANGES[name])
    unchanged = decoded(make_model(**CONFIGS["llama"]), lambda model, layer: None)
    steps.use = True
    steps.clear()
    logits = decoded(make_model(**CONFIGS["llama"]), CHANGES[name])
    assert steps[1], "the model was not looked through before it changed"
    assert (expected - unchanged)[1:].abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_residual_in_fp32_is_seen(steps):  # noqa: F811
    decoded(
        make_model(**CONFIGS["llama"]),
        lambda model, layer: setattr(layer, "residual_in_fp32", True),
    )
    assert steps == [False, True, False, False]


@pytest.mark.parametrize("is_late", [False, True])
def test_patched_classes_are_left_to_modules(is_late, steps, monkeypatch):  # noqa: F811
    forward, calls = GatedMlp.forward, []

    def patched(self, x):
        calls.append(1)
        return forward(self, x)

    def patch(*_):
        monkeypatch.setattr(GatedMlp, "forward", patched)

    if not is_late:
        patch()
    decoded(make_model(**CONFIGS["llama"]), patch if is_late else lambda *_: None)
    assert steps == ([False, True, False, False] if is_late else [False] * 4)
    assert len(calls) == (4 if is_late else 8)


def test_methods_of_a_subclass_are_called(steps):  # noqa: F811
    model, calls = make_model(**CONFIGS["llama"]), []
    kind = type(model.transformer)

    def final_norm(self, *args):
        calls.append(1)
        return kind._final_norm(self, *args)

    model.transformer.__class__ = type("Other", (kind,), {"_final_norm": final_norm})
    decoded(model, lambda *_: None)
    assert not any(steps) and len(calls) == 4


def test_no_sequences_and_strided_lengths(steps):  # noqa: F811
    model, params = make_model(**CONFIGS["llama"]), InferenceParams(8, 2)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with torch.no_grad():
        model(ids, inference_params=params)
        lengths = torch.tensor([3, 0, 2, 0], dtype=torch.int32)
        found = []
        for params.lengths_per_sample in (lengths[::2], lengths[::2].contiguous()):
            found.append(model(ids[:, :1], inference_params=params).logits)
        assert steps[1:] == [True, True]
        assert torch.equal(*found)
        empty = InferenceParams(8, 0)
        model(ids[:0], inference_params=empty)
        empty.seqlen_offset = 3
        assert model(ids[:0, :1], inference_params=empty).logits.shape == (0, 1, 67)


def test_rotary_tables_among_threads(monkeypatch):
    """A thread turns by tables of its own length, whatever others keep meanwhile."""
    rotary = RotaryEmbedding(8)
    in_first, second_is_done = threading.Event(), threading.Event()
    new_tables = RotaryEmbedding._new_tables

    def slow(self, seqlen, device, dtype):
        tables = new_tables(self, seqlen, device, dtype)
        if seqlen == 3:
            in_first.set()
            assert second_is_done.wait(20)
        return tables

    monkeypatch.setattr(RotaryEmbedding, "_new_tables", slow)
    where = (torch.device("cpu"), torch.float32)
    found = []
    first = threading.Thread(target=lambda: found.append(rotary._update_cos_sin_cache(3, *where)))
    first.start()
    assert in_first.wait(20)
    long = rotary._update_cos_sin_cache(90, *where)
    second_is_done.set()
    first.join()
    assert len(long.cos) == 90 and len(found[0].cos) >= 3
    assert rotary._seq_len_cached == 90  # the shorter one did not take its place
    other = rotary._update_cos_sin_cache(5, torch.device("cpu"), torch.bfloat16)
    assert other.cos.dtype == torch.bfloat16 and long.cos.dtype == torch.float32
