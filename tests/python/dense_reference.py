"""Comparison of layers with plain torch of the same dtype, both against fp64."""

from __future__ import annotations

import copy

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def randn(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype)


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


def outputs_and_gradients(module, inputs):
    """Results of a module, and gradients of its floating inputs and parameters, of a weighted sum
    of the results."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    module.zero_grad()
    results = tensors(module(*inputs))
    weights = [randn(*y.shape, seed=100 + i, dtype=y.dtype) for i, y in enumerate(results)]
    torch.autograd.backward(results, weights)
    grads = {f"input {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    grads.update((name, p.grad) for name, p in module.named_parameters())
    return {**{f"output {i}": y.detach() for i, y in enumerate(results)}, **grads}


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def assert_as_exact_as(module, plain, *inputs):
    """The error of the module is at most twice that of a plain one with the same parameters, both
    against the plain one in fp64. A rounding of the largest value is granted to both."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(randn(*p.shape, seed=50 + i) / p.shape[-1] ** 0.5)
    plain.load_state_dict(module.state_dict())
    exact = outputs_and_gradients(
        copy.deepcopy(plain).double(),
        [x.double() if x.is_floating_point() else x for x in inputs],
    )
    actual, expected = (outputs_and_gradients(m, inputs) for m in (module, plain))
    assert actual.keys() == exact.keys()
    for name, wanted in exact.items():
        found = actual[name]
        assert found.dtype == expected[name].dtype and found.shape == wanted.shape, name
        error, allowed = (largest(x.double() - wanted) for x in (found, expected[name]))
        rounding = torch.finfo(found.dtype).eps * largest(wanted)
        assert error <= 2 * allowed + rounding, f"{name}: error {error}, plain torch's {allowed}"
