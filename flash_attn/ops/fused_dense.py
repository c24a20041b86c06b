"""Linear layers and MLPs of two linear layers, on one process or spread over a group.

The products are torch's own: oneDNN or BLAS on the CPU, cuBLAS on a GPU. What is fused is what goes
around them: the bias and, where its input need not be kept, the activation into the product; on a
GPU the gradient of a residual branch into the product that gives the input's. The collectives of a
process group run beside products that do not need them. The CPU and CUDA take fp16, bf16, fp32 and
fp64.

Over a process group the first layer's weight is divided by rows (output features), the second
one's by columns (input features), as in Megatron-LM (https://arxiv.org/abs/1909.08053). Tokens are
along the first dimension of x. With ``sequence_parallel`` each process has its share of the tokens
(https://arxiv.org/abs/2205.05198): x is gathered before the first layer, the second one's results
are reduced and scattered. Without, each process has all of them, and results are reduced.

Under torch.compile, vmap and forward-mode differentiation the same is computed by operations that
torch takes apart, without the savings of ``checkpoint_lvl``.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn._arguments import check_operands, flag
from flash_attn._untouched import is_untouched
from flash_attn.ops._dense import (
    ACTIVATIONS,
    Tokens,
    again,
    as_autocast,
    check_dtypes,
    check_input,
    check_layer,
    check_options,
    finished,
    first_layer,
    in_dtype_of_forward,
    input_gradient,
    is_for_torch,
    kept_of,
    parameter_gradients,
    reduced,
    rows_of,
    with_residual,
)
from flash_attn.utils.distributed import get_dim_for_local_rank, group_rank, group_size

__all__ = [
    "ColumnParallelLinear",
    "FusedDense",
    "FusedDenseFunc",
    "FusedMLP",
    "FusedMLPFunc",
    "ParallelFusedMLP",
    "RowParallelLinear",
    "fused_dense_func",
    "fused_mlp_func",
]


class FusedDenseFunc(torch.autograd.Function):
    """``fused_dense_func`` with its collectives beside its products."""

    @classmethod
    def apply(
        cls,
        x,
        weight,
        bias,
        return_residual=False,
        process_group=None,
        sequence_parallel=True,
    ):
        operands = as_autocast(x, weight, bias)
        is_residual_within = return_residual and operands[0] is x and x.requires_grad
        tokens = Tokens(process_group, sequence_parallel)
        out = super().apply(*operands, is_residual_within, tokens)
        return (out, x) if return_residual and not is_residual_within else out

    @staticmethod
    def forward(ctx, x, weight, bias, return_residual, tokens):
        ctx.tokens, ctx.x_shape = tokens, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        out = F.linear(finished(tokens.start_gather(x)), weight, bias)
        return (out, x.detach()) if return_residual else out

    @staticmethod
    @in_dtype_of_forward
    def backward(ctx, grad_output, *residual):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathered = ctx.tokens.start_gather(x) if needs_weight else (None, None)
        grad = rows_of(grad_output)
        if needs_x:
            started = input_gradient(ctx.tokens, grad, weight, residual)
        grads = parameter_gradients(grad, finished(gathered), needs_weight, needs_bias)
        grad_x = with_residual(ctx.tokens, started, ctx.x_shape, residual) if needs_x else None
        return grad_x, *grads, None, None


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    return_residual: bool = False,
    process_group=None,
    sequence_parallel: bool = True,
):
    """Compute x W^T + b.

    Args:
        x: ``(..., in_features)``, fp16, bf16, fp32 or fp64. Over a process group ``(tokens, ...,
            in_features)``: this process's tokens with ``sequence_parallel``, otherwise all.
        weight: ``(out_features, in_features)``, this process's rows.
        bias: ``(out_features,)``, or None.
        return_residual: whether to return x, too, for a residual branch. A GPU then adds the
            gradients of both in the product that gives x's.
        process_group: over which the weight is divided; None: no group.
        sequence_parallel: whether the group's processes have a share of the tokens each, to be
            gathered, rather than all of them.

    Returns:
        ``(..., out_features)`` for all tokens, or a pair of it and ``x``. The dtype is that of the
        arguments, or autocast's.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes do not fit, or dtypes differ where autocast is off.
    """
    return_residual = flag("return_residual", return_residual)
    sequence_parallel = flag("sequence_parallel", sequence_parallel)
    check_operands({"bias": bias}, x=x, weight=weight)
    tokens = Tokens(process_group, sequence_parallel)
    check_input(x, tokens)
    check_layer(x.shape[-1], weight, bias)
    check_dtypes(x, weight=weight, bias=bias)
    if is_for_torch(x, weight, bias) or (tokens.is_alone and not return_residual):
        out = F.linear(tokens.composed(x), weight, bias)
        return (out, x) if return_residual else out
    return FusedDenseFunc.apply(x, weight, bias, return_residual, process_group, sequence_parallel)


class FusedDense(nn.Linear):
    """``torch.nn.Linear``, its state dict included, that can return its input for a residual branch
    and gather it from a process group."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device=None,
        dtype=None,
    ):
        """Make the layer: ``in_features`` to ``out_features``, with ``bias`` or without; the other
        arguments are those of ``fused_dense_func`` and ``torch.nn.Linear``."""
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group=None):
        """Return ``fused_dense_func(x, weight, bias)``.

        Args:
            x: ``(..., in_features)``.
            process_group: the group whose processes have a share of the tokens each; None: no
                group.
        """
        return fused_dense_func(
            x, self.weight, self.bias, self.return_residual, process_group=process_group
        )


def _share_of(name: str, features: int, process_group, multiple_of: int) -> int:
    """This process's part of a layer's features."""
    if features % multiple_of:
        raise ValueError(f"{name} ({features}) must be a multiple of {multiple_of}")
    size, rank = group_size(process_group), group_rank(process_group)
    return get_dim_for_local_rank(features, size, rank, multiple_of)


class ColumnParallelLinear(nn.Linear):
    """A linear layer whose output features are divided over a process group.

    Parameters: ``weight`` ``(share, in_features)`` and ``bias`` ``(share,)``; the share is that of
    ``get_dim_for_local_rank``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device=None,
        dtype=None,
    ):
        """Make this process's part.

        Args:
            in_features, out_features: of the whole layer.
            process_group: the group; None: this process alone.
            bias: whether to add a bias.
            sequence_parallel: whether each process has a share of the tokens, to be gathered.
            multiple_of: of which each process's share of ``out_features`` is a multiple.
            device, dtype: of the parameters.

        Raises:
            ValueError: ``out_features`` is not a multiple of ``multiple_of``.
        """
        share = _share_of("out_features", out_features, process_group, multiple_of)
        super().__init__(in_features, share, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return this process's features ``(tokens, ..., share)`` of all tokens.

        Args:
            x: ``(tokens, ..., in_features)``: this process's tokens if ``sequence_parallel``, in
                equal number on every process, otherwise all.
        """
        return fused_dense_func(
            x,
            self.weight,
            self.bias,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )


class RowParallelLinear(nn.Linear):
    """A linear layer whose input features are divided over a process group.

    Parameters: ``weight`` ``(out_features, share)``, and on the group's first process alone
    ``bias`` ``(out_features,)``; the share is that of ``get_dim_for_local_rank``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device=None,
        dtype=None,
    ):
        """Make this process's part.

        Args:
            in_features, out_features: of the whole layer.
            process_group: the group; None: this process alone.
            bias: whether to add a bias.
            sequence_parallel: whether each process gets its share of the tokens, rather than all.
            multiple_of: of which each process's share of ``in_features`` is a multiple.
            device, dtype: of the parameters.

        Raises:
            ValueError: ``in_features`` is not a multiple of ``multiple_of``.
        """
        share = _share_of("in_features", in_features, process_group, multiple_of)
        bias = bias and group_rank(process_group) == 0
        super().__init__(share, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(tokens, ..., out_features)``: of this process's tokens if
        ``sequence_parallel``, otherwise of all.

        Args:
            x: ``(tokens, ..., share)``, this process's features of all tokens, whose number the
                processes divide evenly if ``sequence_parallel``.
        """
        out = fused_dense_func(x, self.weight, self.bias)
        return reduced(out, self.process_group, self.sequence_parallel)


class FusedMLPFunc(torch.autograd.Function):
    """``fused_mlp_func``, with the biases behind their weights."""

    @classmethod
    def apply(
        cls,
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        activation="gelu_approx",
        save_pre_act=True,
        return_residual=False,
        checkpoint_lvl=0,
        heuristic=0,
        process_group=None,
        sequence_parallel=True,
    ):
        operands = as_autocast(x, weight1, bias1, weight2, bias2)
        is_residual_within = return_residual and operands[0] is x and x.requires_grad
        tokens = Tokens(process_group, sequence_parallel)
        level = checkpoint_lvl if save_pre_act else 2
        out = super().apply(*operands, activation, level, is_residual_within, tokens)
        return (out, x) if return_residual and not is_residual_within else out

    @staticmethod
    def forward(
        ctx, x, weight1, bias1, weight2, bias2, activation, checkpoint_lvl, return_residual, tokens
    ):
        ctx.activation, ctx.tokens = ACTIVATIONS[activation], tokens
        x_of_all = finished(tokens.start_gather(x))
        pre_act, hidden = first_layer(
            ctx.activation, x_of_all, weight1, bias1, keeps_pre_act=checkpoint_lvl < 2
        )
        kept = kept_of(ctx.activation, pre_act, hidden, checkpoint_lvl, ctx.needs_input_grad[3])
        ctx.save_for_backward(x, weight1, bias1, weight2, *kept)
        out = F.linear(hidden, weight2, bias2)
        return (out, x.detach()) if return_residual else out

    @staticmethod
    @in_dtype_of_forward
    def backward(ctx, grad_output, *residual):
        x, weight1, bias1, weight2, *kept = ctx.saved_tensors
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        is_again = torch.is_grad_enabled() or all(t is None for t in kept)
        gathered = ctx.tokens.start_gather(x) if needs_w1 or is_again else (None, None)
        pre_act, hidden = again(ctx.activation, gathered, weight1, bias1, kept, needs_w2)
        grad = rows_of(grad_output)
        of_second = parameter_gradients(grad, hidden, needs_w2, needs_b2)
        if not (needs_x or needs_w1 or needs_b1):
            return None, None, None, *of_second, *(None,) * 4
        grad = grad @ weight2
        grad, of_bias1 = ctx.activation.gradients(grad, pre_act, hidden, needs_b1)
        if needs_x:
            started = input_gradient(ctx.tokens, grad, weight1, residual)
        of_weight1, _ = parameter_gradients(grad, finished(gathered), needs_w1, False)
        grad_x = with_residual(ctx.tokens, started, x.shape, residual) if needs_x else None
        return grad_x, of_weight1, of_bias1, *of_second, *(None,) * 4


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Optional[Tensor] = None,
    bias2: Optional[Tensor] = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: Union[int, str] = 0,
    process_group=None,
    sequence_parallel: bool = True,
):
    """Compute f(x W1^T + b1) W2^T + b2.

    Over a process group ``weight1``, ``bias1`` and ``weight2`` are this process's part of the
    hidden features, and so is the result: a summand, which the caller adds to those of the others.

    Args:
        x: ``(..., in_features)``, fp16, bf16, fp32 or fp64. Over a process group ``(tokens, ...,
            in_features)``: this process's tokens with ``sequence_parallel``, otherwise all.
        weight1: ``(hidden_features, in_features)``.
        weight2: ``(out_features, hidden_features)``.
        bias1, bias2: ``(hidden_features,)`` and ``(out_features,)``, or None.
        activation: f: "gelu_approx" (tanh), "relu" or "sqrelu" (max(x, 0)**2).
        save_pre_act: whether to keep what ``checkpoint_lvl`` says for a backward; False keeps x
            alone.
        return_residual: whether to return x, too, for a residual branch. A GPU then adds the
            gradients of both in the product that gives x's.
        checkpoint_lvl: what the backward computes again instead of its being kept. 0: nothing; 1:
            the activation; 2: the first layer. ReLU's result is kept at 1, as it costs no more than
            what it is computed from.
        heuristic: "auto" or -1 to 4, without effect: torch chooses the algorithm of a product.
        process_group: over which the hidden features are divided; None: no group.
        sequence_parallel: whether the group's processes have a share of the tokens each, to be
            gathered, rather than all of them.

    Returns:
        ``(..., out_features)`` for all tokens, or a pair of it and ``x``. The dtype is that of the
        arguments, or autocast's.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: shapes do not fit, dtypes differ where autocast is off, or an option is not one
            of those above.
    """
    save_pre_act = flag("save_pre_act", save_pre_act)
    return_residual = flag("return_residual", return_residual)
    sequence_parallel = flag("sequence_parallel", sequence_parallel)
    check_operands({"bias1": bias1, "bias2": bias2}, x=x, weight1=weight1, weight2=weight2)
    tokens = Tokens(process_group, sequence_parallel)
    check_input(x, tokens)
    check_layer(x.shape[-1], weight1, bias1, "1")
    check_layer(weight1.shape[0], weight2, bias2, "2")
    check_dtypes(x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    check_options(activation, checkpoint_lvl, heuristic)
    if is_for_torch(x, weight1, bias1, weight2, bias2):
        hidden = ACTIVATIONS[activation].composed(F.linear(tokens.composed(x), weight1, bias1))
        out = F.linear(hidden, weight2, bias2)
        return (out, x) if return_residual else out
    return FusedMLPFunc.apply(
        x, weight1, bias1, weight2, bias2, activation, save_pre_act, return_residual,
        checkpoint_lvl, heuristic, process_group, sequence_parallel,
    )  # fmt: skip


_LINEAR = (nn.Linear, FusedDense, ColumnParallelLinear, RowParallelLinear)


def _by_calls(mlp, x: Tensor, return_residual: bool, process_group, sequence_parallel: bool):
    """``_apply_mlp`` by calls of the layers, which adapters, hooks or others may have changed."""
    # Layers that belong to a group gather and reduce themselves.
    is_parallel = isinstance(mlp, ParallelFusedMLP)
    tokens = Tokens(None if is_parallel else process_group, sequence_parallel)
    hidden = mlp.fc1(tokens.composed(x))
    out = mlp.fc2(ACTIVATIONS[mlp.activation].composed(hidden))
    if not is_parallel:
        out = reduced(out, process_group, sequence_parallel)
    return (out, x) if return_residual else out


def _apply_mlp(mlp, x: Tensor, return_residual: bool, process_group, sequence_parallel: bool):
    """``fused_mlp_func`` of a module's layers, added up over the group; or by calls of the layers
    where that would be something else."""
    fc1, fc2 = mlp.fc1, mlp.fc2
    if not (is_untouched(fc1, *_LINEAR) and is_untouched(fc2, *_LINEAR)):
        return _by_calls(mlp, x, return_residual, process_group, sequence_parallel)
    out = fused_mlp_func(
        x,
        fc1.weight,
        fc2.weight,
        fc1.bias,
        fc2.bias,
        mlp.activation,
        save_pre_act=mlp.training,
        return_residual=return_residual,
        checkpoint_lvl=mlp.checkpoint_lvl,
        heuristic=mlp.heuristic,
        process_group=process_group,
        sequence_parallel=sequence_parallel,
    )
    if return_residual:
        return reduced(out[0], process_group, sequence_parallel), out[1]
    return reduced(out, process_group, sequence_parallel)


class FusedMLP(nn.Module):
    """An MLP of two linear layers, ``fc1`` and ``fc2``, that keeps little for its backward.

    Where one of them has hooks or is something else, such as an adapter around it, both are called,
    and ``checkpoint_lvl`` has no effect.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: Union[int, str] = "auto",
        device=None,
        dtype=None,
    ):
        """Make the module.

        Args:
            in_features: of x.
            hidden_features: None: ``4 * in_features``.
            out_features: None: ``in_features``.
            bias1, bias2: whether ``fc1`` and ``fc2`` have a bias.
            activation, return_residual, checkpoint_lvl, heuristic: as for ``fused_mlp_func``.
            device, dtype: of the parameters.

        Raises:
            ValueError: an option is not one of those of ``fused_mlp_func``.
        """
        super().__init__()
        check_options(activation, checkpoint_lvl, heuristic)
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        factory = {"device": device, "dtype": dtype}
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **factory)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x: Tensor, process_group=None):
        """Return ``(..., out_features)``, or a pair of it and ``x`` with ``return_residual``.

        Args:
            x: ``(..., in_features)``.
            process_group: the group whose processes have a share of the tokens and of the hidden
                features each; the result is then of this process's tokens. None: no group.
        """
        return _apply_mlp(self, x, self.return_residual, process_group, True)


class ParallelFusedMLP(nn.Module):
    """``FusedMLP`` with its hidden features divided over a process group: ``fc1`` is a
    ``ColumnParallelLinear``, ``fc2`` a ``RowParallelLinear``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: str = "gelu_approx",
        process_group=None,
        bias1: bool = True,
        bias2: bool = True,
        sequence_parallel: bool = True,
        checkpoint_lvl: int = 0,
        heuristic: Union[int, str] = "auto",
        device=None,
        dtype=None,
    ):
        """Make this process's part.

        Args:
            in_features: of x.
            hidden_features: of the whole MLP; None: ``4 * in_features``.
            out_features: None: ``in_features``.
            activation, checkpoint_lvl, heuristic: as for ``fused_mlp_func``.
            process_group: the group; None: this process alone.
            bias1, bias2: whether ``fc1`` and ``fc2`` have a bias.
            sequence_parallel: whether each process has a share of the tokens, rather than all.
            device, dtype: of the parameters.

        Raises:
            ValueError: an option is not one of those of ``fused_mlp_func``.
        """
        super().__init__()
        check_options(activation, checkpoint_lvl, heuristic)
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.activation = activation
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
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
        return _apply_mlp(self, x, False, self.process_group, self.sequence_parallel)
