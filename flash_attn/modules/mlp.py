"""Feed-forward modules: two linear layers with an activation, or a gate, between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.modules._few import are_few
from flash_attn.ops._dense import has_kernels, is_for_torch
from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import (
    ColumnParallelLinear,
    FusedMLP,
    ParallelFusedMLP,
    RowParallelLinear,
)

__all__ = [
    "ColumnParallelLinear",
    "FusedMLP",
    "GatedMlp",
    "Mlp",
    "ParallelFusedMLP",
    "ParallelGatedMlp",
    "ParallelMLP",
    "RowParallelLinear",
    "swiglu",
]


def _or_default(features: Optional[int], default: int) -> int:
    return default if features is None else features


def _gated_features(in_features: int, hidden_features: Optional[int], multiple_of: int) -> int:
    """Hidden features of a gated MLP: by default as many parameters as one with four times
    ``in_features`` and no gate; rounded up to a multiple."""
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    features = _or_default(hidden_features, int(8 * in_features / 3))
    return -(-features // multiple_of) * multiple_of


def _check_activation(activation) -> None:
    if not callable(activation):
        raise TypeError(
            "activation must be a function of a tensor, such as torch.nn.functional.gelu, got "
            f"{activation!r:.80}"
        )


def _gated(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """``(..., 2 n)`` to ``(..., n)``: the first half times the activation of the second."""
    if activation is F.sigmoid or activation is torch.sigmoid:
        return F.glu(x, dim=-1)
    y, gate = x.chunk(2, dim=-1)
    if activation is not F.silu or are_few(x) or not has_kernels(x) or is_for_torch(x):
        return y * activation(gate)
    return swiglu(gate, y)


class Mlp(nn.Module):
    """``fc2(activation(fc1(x)))``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device=None,
        dtype=None,
    ):
        """Make the module.

        Args:
            in_features: of x.
            hidden_features: None: ``4 * in_features``.
            out_features: None: ``in_features``.
            activation: a function of a tensor.
            bias1, bias2: whether ``fc1`` and ``fc2`` have a bias.
            return_residual: whether to return x, too.
            device, dtype: of the parameters.
        """
        super().__init__()
        _check_activation(activation)
        hidden_features = _or_default(hidden_features, 4 * in_features)
        factory = {"device": device, "dtype": dtype}
        self.activation = activation
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **factory)
        out_features = _or_default(out_features, in_features)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x: Tensor):
        """Return ``(..., out_features)`` of x ``(..., in_features)``, or a pair of it and x."""
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class ParallelMLP(nn.Module):
    """``Mlp`` with its hidden features divided over a process group."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        process_group=None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        device=None,
        dtype=None,
    ):
        """Make this process's part.

        Args:
            in_features, hidden_features, out_features, activation, bias1, bias2, device, dtype: as
                for ``Mlp``, of the whole.
            process_group: the group; None: this process alone.
            sequence_parallel: whether each process has a share of the tokens, rather than all.
        """
        super().__init__()
        _check_activation(activation)
        hidden_features = _or_default(hidden_features, 4 * in_features)
        out_features = _or_default(out_features, in_features)
        options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.activation = activation
        self.fc1 = ColumnParallelLinear(
            in_features, hidden_features, process_group, bias=bias1, **options
        )
        self.fc2 = RowParallelLinear(
            hidden_features, out_features, process_group, bias=bias2, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(tokens, ..., out_features)`` of the tokens of x.

        Args:
            x: ``(tokens, ..., in_features)``: this process's tokens if ``sequence_parallel``, in
                equal number on every process, otherwise all.
        """
        return self.fc2(self.activation(self.fc1(x)))


class GatedMlp(nn.Module):
    """``fc2(y * activation(gate))`` with ``y, gate = fc1(x).chunk(2, dim=-1)``
    (https://arxiv.org/abs/2002.05202)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Callable[[Tensor], Tensor] = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device=None,
        dtype=None,
    ):
        """Make the module.

        Args:
            in_features: of x.
            hidden_features: None: ``8 / 3 * in_features``.
            out_features: None: ``in_features``.
            activation: of the gate, a function of a tensor.
            bias1, bias2: whether ``fc1`` and ``fc2`` have a bias.
            multiple_of: to which ``hidden_features`` is rounded up.
            return_residual: whether to return x, too.
            device, dtype: of the parameters.
        """
        super().__init__()
        _check_activation(activation)
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        factory = {"device": device, "dtype": dtype}
        self.activation = activation
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=bias1, **factory)
        out_features = _or_default(out_features, in_features)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x: Tensor):
        """Return ``(..., out_features)`` of x ``(..., in_features)``, or a pair of it and x."""
        y = self.fc2(_gated(self.fc1(x), self.activation))
        return (y, x) if self.return_residual else y


class ParallelGatedMlp(nn.Module):
    """``GatedMlp`` with its hidden features divided over a process group: each process's ``fc1``
    has its features of y, then those of the gate."""

    def __init__(
        self,
        in_features: int,
        process_group,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Callable[[Tensor], Tensor] = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        sequence_parallel: bool = True,
        device=None,
        dtype=None,
    ):
        """Make this process's part.

        Args:
            in_features, hidden_features, out_features, activation, bias1, bias2, multiple_of,
                device, dtype: as for ``GatedMlp``, of the whole.
            process_group: the group; None: this process alone.
            sequence_parallel: whether each process has a share of the tokens, rather than all.
        """
        super().__init__()
        _check_activation(activation)
        hidden_features = _gated_features(in_features, hidden_features, multiple_of)
        out_features = _or_default(out_features, in_features)
        options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.activation = activation
        self.fc1 = ColumnParallelLinear(
            in_features, 2 * hidden_features, process_group, bias=bias1, multiple_of=2, **options
        )
        self.fc2 = RowParallelLinear(
            hidden_features, out_features, process_group, bias=bias2, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(tokens, ..., out_features)`` of the tokens of x.

        Args:
            x: ``(tokens, ..., in_features)``: this process's tokens if ``sequence_parallel``, in
                equal number on every process, otherwise all.
        """
        return self.fc2(_gated(self.fc1(x), self.activation))
