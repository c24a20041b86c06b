"""An MLP of two linear layers with a squared ReLU between them."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from flash_attn.ops.fused_dense import FusedMLP, FusedMLPFunc, fused_mlp_func

__all__ = [
    "FusedDenseSqreluDense",
    "FusedDenseSqreluDenseFunc",
    "fused_dense_sqrelu_dense_function",
]


class FusedDenseSqreluDenseFunc(FusedMLPFunc):
    """``fused_mlp_func`` with activation "sqrelu": ``apply(x, weight1, bias1, weight2, bias2,
    checkpoint_lvl)``."""

    @classmethod
    def apply(cls, x, weight1, bias1, weight2, bias2, checkpoint_lvl=0):
        return fused_mlp_func(
            x, weight1, weight2, bias1, bias2, "sqrelu", checkpoint_lvl=checkpoint_lvl
        )


fused_dense_sqrelu_dense_function = FusedDenseSqreluDenseFunc.apply


class FusedDenseSqreluDense(FusedMLP):
    """``FusedMLP`` with activation "sqrelu"."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        bias1: bool = True,
        bias2: bool = True,
        checkpoint_lvl: int = 0,
        device=None,
        dtype=None,
    ):
        """Make the module; the arguments are those of ``FusedMLP``."""
        super().__init__(
            in_features,
            hidden_features,
            out_features,
            bias1,
            bias2,
            activation="sqrelu",
            checkpoint_lvl=checkpoint_lvl,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out_features)`` of x ``(..., in_features)``."""
        return super().forward(x)
