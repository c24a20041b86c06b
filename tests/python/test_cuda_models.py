"""Models on the CUDA kernels, emulated, beside the CPU backend.

A small Llama of transformers has the same tokens, a GPT is trained.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from backends import needs_emulator

import flash_attn
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models.gpt import GPTLMHeadModel

pytestmark = needs_emulator
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    flash_attn.integrations.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="exact_attention",
    )
    return transformers.LlamaForCausalLM(config).half().eval()


def _both(call):
    """``call()`` on the CPU backend and on the emulated GPU, and the kernels that ran there."""
    expected = call()
    with flash_attn.emulator(mode="late") as gpu:
        actual = call()
    kinds = {name.split("_")[1] for name in gpu.counters}
    return expected, actual, kinds


def test_prefill(model):
    tokens = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, actual, kinds = _both(lambda: model(tokens).logits)
    assert kinds == {"fwd"}
    torch.testing.assert_close(actual, expected, atol=0.01, rtol=0.01)


def test_packed(model):
    """Two texts in one row, told apart by their positions."""
    tokens = torch.randint(97, (1, 90), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(30), torch.arange(60)])[None]
    with torch.inference_mode():
        expected, actual, kinds = _both(lambda: model(tokens, position_ids=positions).logits)
    assert kinds == {"fwd"}
    torch.testing.assert_close(actual, expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(model, cache):
    tokens = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    mask = torch.ones_like(tokens)

    def generate():
        return model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)

    expected, actual, _ = _both(generate)
    assert torch.equal(actual, expected)


def test_generation_with_a_paged_cache():
    """Greedy decoding by flash_attn_with_kvcache: a layer that appends, rotates and attends."""
    generator = torch.Generator().manual_seed(4)
    vocabulary, heads, heads_k, size, page = 61, 4, 2, 64, 16
    table = torch.randperm(16, generator=generator).to(torch.int32).view(2, 8)
    embedding = torch.randn(vocabulary, heads * size, generator=generator).half()
    weights = torch.randn(heads * size, (heads + 2 * heads_k) * size, generator=generator)
    weights = (weights / (heads * size) ** 0.5).half()
    angles = torch.outer(torch.arange(128.0), 1e4 ** -torch.linspace(0, 1, size // 2))
    cos, sin = angles.cos().half(), angles.sin().half()
    prompt = torch.randint(vocabulary, (2, 40), generator=generator)

    def generate():
        caches = [torch.zeros(16, page, heads_k, size, dtype=torch.float16) for _ in "kv"]
        lengths = torch.zeros(2, dtype=torch.int32)
        tokens, new = prompt, prompt
        for _ in range(6):
            x = embedding[new]
            qkv = (x @ weights).unflatten(-1, (-1, size)).split([heads, heads_k, heads_k], 2)
            q, k, v = qkv
            attended = flash_attn.flash_attn_with_kvcache(
                q, *caches, k, v, cos, sin, lengths, block_table=table, causal=True
            )
            lengths = lengths + new.shape[1]
            hidden = x + attended.flatten(2)
            new = (hidden[:, -1:] @ embedding.T).argmax(-1)
            tokens = torch.cat([tokens, new], 1)
        return tokens

    expected, actual, kinds = _both(generate)
    assert kinds == {"append", "fwd", "decode"}
    assert torch.equal(actual, expected)


class Trained(NamedTuple):
    losses: list[float]
    gradients: dict[str, torch.Tensor]  # of the last step


def train(steps: int) -> Trained:
    """A GPT of one layer, every part of it fused, from the same start each time."""
    torch.manual_seed(0)
    sizes = {"n_positions": 80, "n_embd": 128, "n_layer": 1, "n_head": 2, "n_inner": 128}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    fused = dict.fromkeys(
        ("use_flash_attn", "fused_bias_fc", "fused_mlp", "fused_dropout_add_ln"), True
    )
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=96, **sizes, **drops, **fused, **ends)
    model, loss_of = GPTLMHeadModel(config).half(), CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(96, (2, 71), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        logits = model(tokens[:, :-1]).logits
        loss = loss_of(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained(losses, {name: p.grad.float() for name, p in model.named_parameters()})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_training(arch):
    """The second loss depends on the first step's gradients; it has moved by 7 %."""
    expected = train(steps=2)
    assert expected.losses[1] < 0.95 * expected.losses[0]
    with flash_attn.emulator(arch=arch) as gpu:
        actual = train(steps=2)
    label = {"sm_80": "sm80", "sm_90a": "sm90"}[arch]
    assert {f"flash_{kind}_{label}_fp16_d64_masked" for kind in ("fwd", "bwd")} <= {
        name.removesuffix("_n128") for name in gpu.counters
    }
    assert actual.losses == pytest.approx(expected.losses, rel=1e-4)
    for name, gradient in expected.gradients.items():
        error = (actual.gradients[name] - gradient).norm() / gradient.norm()
        assert error < 5e-3, name
