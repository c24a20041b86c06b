"""The demo, small."""

from __future__ import annotations

import math

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("batch", [1, 3])
def test_demo_generates_alike_with_and_without_cache(demo_modules, batch):
    from gpt import GPT, GPTConfig, KVCache, generate, generate_without_cache

    torch.manual_seed(0)
    model = GPT(GPTConfig(num_layers=2, width=64, num_heads=2, max_seqlen=64))
    for parameter in model.parameters():  # some start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    prompt = torch.randint(256, (batch, 11))
    assert torch.equal(generate(model, prompt, 30), generate_without_cache(model, prompt, 30))
    with torch.inference_mode():
        cache = KVCache.empty(model.config, batch)
        parts = [model(part, cache) for part in prompt.split([5, 1, 5], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(prompt), rtol=0, atol=1e-4)


def test_demo_learns(demo_modules):
    from corpus import load_corpus, random_batch
    from gpt import GPT, GPTConfig
    from train_text import loss_of

    text, held_out = load_corpus()
    assert len(text) > len(held_out) > 10_000
    torch.manual_seed(0)
    model = GPT(GPTConfig(num_layers=1, width=32, num_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        batch = random_batch(text, 4, 64, torch.Generator().manual_seed(step))
        loss = loss_of(model, *batch, torch.float32)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(256), abs=1e-3)
    assert losses[-1] < 3.8
