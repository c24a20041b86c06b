"""MLPs with and without a gate, on one process, against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_reference import DTYPES, assert_as_exact_as, outputs_and_gradients, randn
from torch import nn

from flash_attn.modules import mlp
from flash_attn.modules.mlp import GatedMlp, Mlp, ParallelGatedMlp, ParallelMLP
from flash_attn.ops import activations, fused_dense

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "sigmoid": F.sigmoid, "tanh": torch.tanh}


class Plain(nn.Module):
    """``function`` between two layers, of whose features it leaves ``hidden``."""

    def __init__(self, function, outer, hidden, residual=False, bias1=True, bias2=True, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(16, outer, bias=bias1, dtype=dtype)
        self.fc2 = nn.Linear(hidden, 12, bias=bias2, dtype=dtype)
        self.function, self.residual = function, residual

    def forward(self, x):
        y = self.fc2(self.function(self.fc1(x)))
        return (y, x) if self.residual else y


def gated_by(activation):
    def function(x):
        half = x.shape[-1] // 2
        return x[..., :half] * activation(x[..., half:])

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_mlp(dtype, activation, residual):
    x, function = randn(2, 5, 16, dtype=dtype), ACTIVATIONS[activation]
    plain = Plain(function, 24, 24, residual, dtype=dtype)
    module = Mlp(16, 24, 12, function, return_residual=residual, dtype=dtype)
    assert_as_exact_as(module, plain, x)
    if not residual:
        assert_as_exact_as(ParallelMLP(16, 24, 12, function, dtype=dtype), plain, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_gated_mlp(dtype, activation, residual):
    """20 hidden features are rounded up to 24."""
    x, function = randn(2, 5, 16, dtype=dtype), ACTIVATIONS[activation]
    plain = Plain(gated_by(function), 48, 24, residual, dtype=dtype)
    options = {"activation": function, "multiple_of": 8, "dtype": dtype}
    module = GatedMlp(16, 20, 12, return_residual=residual, **options)
    assert_as_exact_as(module, plain, x)
    if not residual:
        assert_as_exact_as(ParallelGatedMlp(16, None, 20, 12, **options), plain, x)


@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)])
def test_without_bias(biases):
    options, x = dict(zip(("bias1", "bias2"), biases)), randn(5, 16)
    plain = Plain(F.gelu, 24, 24, **options)
    assert_as_exact_as(Mlp(16, 24, 12, **options), plain, x)
    assert_as_exact_as(ParallelMLP(16, 24, 12, **options), plain, x)
    plain = Plain(gated_by(F.sigmoid), 48, 24, **options)
    assert_as_exact_as(GatedMlp(16, 24, 12, multiple_of=1, **options), plain, x)
    assert_as_exact_as(ParallelGatedMlp(16, None, 24, 12, multiple_of=1, **options), plain, x)


def shapes(module):
    return {name: tuple(p.shape) for name, p in module.state_dict().items()}


def test_default_features_and_state_dicts():
    for module in (Mlp(6), ParallelMLP(6)):
        assert shapes(module) == {
            "fc1.weight": (24, 6), "fc1.bias": (24,), "fc2.weight": (6, 24), "fc2.bias": (6,)
        }  # fmt: skip
    for module in (GatedMlp(96), ParallelGatedMlp(96, None)):  # 8 / 3 * 96 = 256
        assert shapes(module) == {
            "fc1.weight": (512, 96), "fc1.bias": (512,), "fc2.weight": (96, 256), "fc2.bias": (96,)
        }  # fmt: skip
    assert GatedMlp(97).fc2.in_features == 384  # of 258
    assert GatedMlp(96, 0 + 1, multiple_of=3).fc2.in_features == 3
    meta = GatedMlp(4, 5, 6, device="meta", dtype=torch.float16, multiple_of=5)
    assert shapes(meta)["fc2.weight"] == (6, 5)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float16)}


def test_names_of_other_modules():
    for name in ("ColumnParallelLinear", "RowParallelLinear", "FusedMLP", "ParallelFusedMLP"):
        assert getattr(mlp, name) is getattr(fused_dense, name)
    assert mlp.swiglu is activations.swiglu


def test_swiglu_is_one_operation(monkeypatch):
    """Of silu alone, and called where torch does not take the module apart."""
    calls = []
    monkeypatch.setattr(mlp, "swiglu", lambda *args: calls.append(1) or activations.swiglu(*args))
    module, x = GatedMlp(16, activation=F.silu), randn(5, 16)
    expected = outputs_and_gradients(module, (x,))
    assert len(calls) == 1
    out, _ = torch.func.jvp(module, (x,), (x,))
    assert len(calls) == 1
    torch.testing.assert_close(out, expected["output 0"])
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for name, actual in outputs_and_gradients(compiled, (x,)).items():
        torch.testing.assert_close(actual, expected[name.replace("_orig_mod.", "")])
    assert len(calls) == 1


@pytest.mark.parametrize("module", [Mlp, ParallelMLP, GatedMlp, ParallelGatedMlp])
def test_bad_arguments(module):
    arguments = (4, None) if module is ParallelGatedMlp else (4,)
    with pytest.raises(TypeError, match=r"activation must be a function of a tensor.* got 'gelu'"):
        module(*arguments, activation="gelu")
    if "Gated" in module.__name__:
        with pytest.raises(ValueError, match="multiple_of must be at least 1, got 0"):
            module(*arguments, multiple_of=0)
