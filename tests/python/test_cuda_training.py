"""Training on the CUDA kernels, emulated: the demo's GPT, and every differentiable function."""

from __future__ import annotations

import pytest
import torch
import training_cases  # noqa: F401  makes training importable
from backends import needs_emulator
from torch.utils.checkpoint import checkpoint

import flash_attn

pytestmark = needs_emulator


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).half().requires_grad_()


def test_training_step_of_the_demo():
    """The loss is the CPU's to 3 digits, gradients are as far as bfloat16 tells."""
    from training.model import LanguageModel, make_model
    from training.run import compose_settings
    from training.tokenizer import ByteTokenizer

    sizes = ["model.n_layer=1", "model.n_embd=64", "model.n_head=2"]
    torch.manual_seed(0)
    model = LanguageModel(
        make_model(compose_settings(["experiment=tiny", *sizes]).model, ByteTokenizer())
    )
    tokens = torch.randint(256, (2, 71))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens)
        return loss.item(), torch.autograd.grad(loss, list(model.parameters()))

    loss, gradients = step()
    with flash_attn.emulator(mode="late") as gpu:
        actual_loss, actual = step()
    kernels = {"fwd", "bwd", "rotary", "layer", "activation", "xentropy"}
    assert {name.split("_")[1] for name in gpu.counters} == kernels
    assert actual_loss == pytest.approx(loss, rel=1e-3)
    for x, y in zip(actual, gradients):
        assert (x - y).norm() <= 2e-2 * y.norm()  # bfloat16's own error is of this order


CU = torch.tensor([0, 10, 40], dtype=torch.int32)
FUNCTIONS = {
    "func": lambda q, kv: flash_attn.flash_attn_func(q, *kv.unbind(2), causal=True),
    "kvpacked": lambda q, kv: flash_attn.flash_attn_kvpacked_func(q, kv),
    "qkvpacked": lambda q, kv: flash_attn.flash_attn_qkvpacked_func(
        torch.cat([q[:, :, None], kv], 2)
    ),
    "varlen": lambda q, kv: flash_attn.flash_attn_varlen_func(
        q[0], *kv[0].unbind(1), CU, CU, 30, 30
    ),
    "varlen_kvpacked": lambda q, kv: flash_attn.flash_attn_varlen_kvpacked_func(
        q[0], kv[0], CU, CU, 30, 30
    ),
    "varlen_qkvpacked": lambda q, kv: flash_attn.flash_attn_varlen_qkvpacked_func(
        torch.cat([q[0, :, None], kv[0]], 1), CU, 30
    ),
}


def gradients_on(call, leaves, **options):
    with flash_attn.emulator(**options):
        out = call(*leaves)
        return torch.autograd.grad(out.float().square().sum(), leaves)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_differentiable_function(name):
    leaves = randn(1, 40, 2, 64), randn(1, 40, 2, 2, 64, seed=1)
    out = FUNCTIONS[name](*leaves)
    expected = torch.autograd.grad(out.float().square().sum(), leaves)
    actual = gradients_on(FUNCTIONS[name], leaves, mode="late")
    for x, y in zip(actual, expected):
        torch.testing.assert_close(x, y, atol=4e-3 * y.abs().max().item(), rtol=4e-3)


def test_checkpointing_changes_nothing():
    leaves = randn(1, 40, 2, 64), randn(1, 40, 2, 2, 64, seed=1)

    def call(q, kv):
        return flash_attn.flash_attn_func(q, *kv.unbind(2), causal=True, dropout_p=0.2)

    torch.manual_seed(3)
    expected = gradients_on(call, leaves)
    torch.manual_seed(3)
    actual = gradients_on(lambda *x: checkpoint(call, *x, use_reentrant=False), leaves)
    assert all(map(torch.equal, actual, expected))


def test_compiled():
    leaves = randn(1, 40, 2, 64), randn(1, 40, 2, 2, 64, seed=1)
    call = FUNCTIONS["func"]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, gradients_on(compiled, leaves), gradients_on(call, leaves)))
