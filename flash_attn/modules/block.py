"""Transformer blocks: mixer and MLP with their norms, dropouts and residual connections."""

from __future__ import annotations

from functools import partial
from typing import Callable, Optional, Union

import torch
from torch import Tensor, nn

from flash_attn._arguments import check_optional, check_subset, check_tensors
from flash_attn._untouched import is_untouched
from flash_attn.modules._few import are_few, rms_norm_of_few
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn

__all__ = ["Block", "ParallelBlock", "StochasticDepth"]


class StochasticDepth(nn.Module):
    """Drop whole samples in training, and scale the others up (https://arxiv.org/abs/1603.09382).

    Args:
        p: probability to drop a sample, from 0 to 1.

    Raises:
        ValueError: ``p`` is not a probability.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be a probability, got {p}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` of shape ``(batch, ...)`` with samples dropped."""
        if not self.training or self.p == 0.0:
            return input
        if self.p == 1.0:
            return torch.zeros_like(input)
        keep = input.new_empty(input.shape[0], *(1,) * (input.dim() - 1)).bernoulli_(1.0 - self.p)
        return input * (keep / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _check_fusable(norm: nn.Module, *dropouts: nn.Module) -> None:
    """Raise TypeError for layers whose work the fused operator does not do."""
    if not isinstance(norm, (nn.LayerNorm, RMSNorm)):
        raise TypeError(
            "fused_dropout_add_ln needs norm_cls to make torch.nn.LayerNorm or "
            f"flash_attn.ops.triton.layer_norm.RMSNorm, got {type(norm).__name__}"
        )
    if isinstance(getattr(norm, "drop", None), nn.Dropout) and norm.drop.p > 0.0:
        raise TypeError("fused_dropout_add_ln needs norm_cls to make a norm without dropout")
    for dropout in dropouts:
        if not isinstance(dropout, nn.Dropout):
            raise TypeError(
                f"fused_dropout_add_ln needs dropout_cls to make torch.nn.Dropout, got "
                f"{type(dropout).__name__}"
            )


def _can_fuse(norms, dropouts, drop_paths=()) -> bool:
    """Whether the fused operator does what these modules would if they were called."""
    return (
        all(is_untouched(norm, nn.LayerNorm, RMSNorm) for norm in norms)
        and all(is_untouched(dropout, nn.Dropout) for dropout in dropouts)
        and all(is_untouched(drop_path, StochasticDepth) for drop_path in drop_paths)
    )


def _fused_norm(norm: nn.Module, dropout: nn.Dropout, x: Tensor, **options):
    """``layer_norm_fn`` with the parameters of a norm and a dropout."""
    return layer_norm_fn(
        x,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=dropout.p if dropout.training else 0.0,
        is_rms_norm=isinstance(norm, RMSNorm),
        zero_centered_weight=getattr(norm, "zero_centered_weight", False),
        **options,
    )


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm in the dtype of its parameters."""
    weight = getattr(norm, "weight", None)
    if is_untouched(norm, RMSNorm) and norm.drop is None and are_few(x):
        return rms_norm_of_few(norm, x)
    return norm(x if weight is None else x.to(weight.dtype))


def _normed_if(norm: Optional[nn.Module], x: Tensor) -> Tensor:
    return x if norm is None else _normed(norm, x)


class _Block(nn.Module):
    def _mark(self, norms, sequence_parallel: bool, mark_shared_params: bool) -> None:
        """Mark the norms' parameters for ``flash_attn.utils.distributed``."""
        for parameter in (p for norm in norms for p in norm.parameters()):
            if sequence_parallel:
                parameter._sequence_parallel = True
            if mark_shared_params:
                parameter._shared_params = True

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Optional[torch.dtype] = None, **kwargs
    ):
        """Return the mixer's ``allocate_inference_cache`` of the same arguments."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class Block(_Block):
    """A block whose mixer and MLP follow each other.

    With ``prenorm`` it is Dropout -> Add -> Norm -> Mixer -> Dropout -> Add -> Norm -> MLP, so that
    the addition and the norm after it can be one operator: the residual stream goes from block to
    block beside the branch that was not added yet. Without, it is Mixer -> Dropout -> Add -> Norm
    -> MLP -> Dropout -> Add -> Norm.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Optional[Callable[[int], nn.Module]] = None,
        mlp_cls: Optional[Callable[[int], nn.Module]] = None,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout_cls: Callable[[float], nn.Module] = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
        *,
        post_norm_cls: Optional[Callable[[int], nn.Module]] = None,
    ):
        """Make the block.

        Args:
            dim: size of a token.
            mixer_cls: makes the mixer from ``dim``; default ``MHA`` with heads of 64.
            mlp_cls: makes the MLP from ``dim``; default ``Mlp`` with 4 * dim hidden features.
                ``nn.Identity``: no MLP.
            norm_cls: makes a norm from ``dim``.
            dropout_cls: makes a dropout from its probability.
            prenorm: whether norms come before mixer and MLP.
            resid_dropout1, resid_dropout2: probabilities of the two dropouts.
            drop_path1, drop_path2: probabilities to drop a sample's branch in training.
            fused_dropout_add_ln: whether dropout, addition and norm are one operator.
            return_residual: whether mixer and MLP return their input, too; without ``prenorm``.
            residual_in_fp32: whether the residual stream is fp32; with ``prenorm`` alone.
            sequence_parallel: whether to mark the norms' parameters ``_sequence_parallel``.
            mark_shared_params: whether to mark them ``_shared_params``.
            post_norm_cls: makes a norm from ``dim`` for each branch before it is added, too:
                ``post_norm1`` behind the mixer, ``post_norm2`` behind the MLP; with ``prenorm``
                alone. None: no such norms.

        Raises:
            ValueError: ``residual_in_fp32`` or ``post_norm_cls`` without ``prenorm``, or a
                probability is none.
            TypeError: ``fused_dropout_add_ln`` with a norm or dropout of another kind.
        """
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise ValueError("residual_in_fp32 needs prenorm=True")
        if post_norm_cls is not None and not prenorm:
            raise ValueError("post_norm_cls needs prenorm=True")
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1, self.drop_path1 = dropout_cls(resid_dropout1), StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        norms = [self.norm1]
        if self._has_mlp:
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)
            norms.append(self.norm2)
        if fused_dropout_add_ln:
            for norm, dropout in zip(norms, self._dropouts()):
                _check_fusable(norm, dropout)
        self.post_norm1 = None if post_norm_cls is None else post_norm_cls(dim)
        self.post_norm2 = post_norm_cls(dim) if post_norm_cls and self._has_mlp else None
        norms += [norm for norm in (self.post_norm1, self.post_norm2) if norm is not None]
        self._mark(norms, sequence_parallel, mark_shared_params)

    @property
    def _has_mlp(self) -> bool:
        return not isinstance(self.mlp, nn.Identity)

    def _dropouts(self) -> list[nn.Module]:
        return [self.dropout1, self.dropout2] if self._has_mlp else [self.dropout1]

    def _add_norm(self, step: int, x: Tensor, residual: Optional[Tensor], prenorm: bool):
        """Dropout, drop path, addition and norm number ``step``.

        Returns:
            ``(normed, residual)``, residual None without ``prenorm``.
        """
        if step == 1:
            norm, dropout, drop_path = self.norm1, self.dropout1, self.drop_path1
        else:
            norm, dropout, drop_path = self.norm2, self.dropout2, self.drop_path2
        can_fuse = self.fused_dropout_add_ln and not are_few(x)
        if can_fuse and _can_fuse((norm,), (dropout,), (drop_path,)):
            options = {"residual": residual, "prenorm": prenorm}
            options["residual_in_fp32"] = self.residual_in_fp32
            if drop_path.training and drop_path.p > 0.0:
                options["rowscale"] = drop_path(x.new_ones(x.shape[:-1]))
            out = _fused_norm(norm, dropout, x, **options)
            return out if prenorm else (out, None)
        # In evaluation there is nothing to call, unless someone put something there.
        if (
            dropout.training
            or drop_path.training
            or not is_untouched(dropout, nn.Dropout)
            or not is_untouched(drop_path, StochasticDepth)
        ):
            x = drop_path(dropout(x))
        x = x if residual is None else x + residual
        normed = _normed(norm, x)
        if not prenorm:
            return normed, None
        return normed, x.float() if self.residual_in_fp32 else x

    def forward(
        self,
        hidden_states: Tensor,
        residual: Optional[Tensor] = None,
        mixer_subset=None,
        mixer_kwargs: Optional[dict] = None,
    ) -> Union[Tensor, tuple[Tensor, Tensor]]:
        """Run the block.

        Args:
            hidden_states: ``(batch, seqlen, dim)`` or what the mixer takes; with ``prenorm`` the
                branch that the residual stream does not have yet.
            residual: with ``prenorm`` the residual stream, of the same shape; None: zeros.
            mixer_subset: a slice or index of the tokens to keep; the others are keys of this block
                alone. With ``prenorm`` alone; the mixer must take ``mixer_subset``.
            mixer_kwargs: more arguments of the mixer.

        Returns:
            ``(hidden_states, residual)``, with ``prenorm``; else ``hidden_states``.

        Raises:
            ValueError: ``residual`` or ``mixer_subset`` without ``prenorm``.
        """
        check_tensors(hidden_states=hidden_states)
        check_optional(residual=residual)
        kwargs = dict(mixer_kwargs or {})
        if not self.prenorm:
            for name, x in (("residual", residual), ("mixer_subset", mixer_subset)):
                if x is not None:
                    raise ValueError(f"{name} needs a block with prenorm=True")
            return self._forward_postnorm(hidden_states, kwargs)
        check_subset("mixer_subset", mixer_subset)
        x, residual = self._add_norm(1, hidden_states, residual, True)
        if mixer_subset is not None:
            kwargs["mixer_subset"] = mixer_subset
            residual = residual[..., mixer_subset, :]
        x = _normed_if(self.post_norm1, self.mixer(x, **kwargs))
        if self._has_mlp:
            x, residual = self._add_norm(2, x, residual, True)
            x = _normed_if(self.post_norm2, self.mlp(x))
        return x, residual

    def _forward_postnorm(self, x: Tensor, mixer_kwargs: dict) -> Tensor:
        for step, layer, kwargs in ((1, self.mixer, mixer_kwargs), (2, self.mlp, {})):
            if layer is self.mlp and not self._has_mlp:
                return x
            out = layer(x, **kwargs)
            out, x = out if self.return_residual else (out, x)
            x, _ = self._add_norm(step, out, x, False)
        return x


class ParallelBlock(_Block):
    """A block whose mixer and MLP read the same tokens, as in GPT-J and PaLM: Dropout -> Add ->
    Norm, then both. The residual stream goes from block to block beside the two branches that were
    not added yet."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Optional[Callable[[int], nn.Module]] = None,
        mlp_cls: Optional[Callable[[int], nn.Module]] = None,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout_cls: Callable[[float], nn.Module] = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ):
        """Make the block.

        Args:
            resid_dropout1, resid_dropout2: probabilities of the dropouts of the mixer's and the
                MLP's branch, equal where they are fused.
            tied_norm: whether the MLP reads the mixer's norm rather than one of its own.

        The other arguments are those of ``Block``.

        Raises:
            ValueError: ``fused_dropout_add_ln`` with dropouts or epsilons that differ.
            TypeError: ``fused_dropout_add_ln`` with a norm or dropout of another kind.
        """
        super().__init__()
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1, self.norm1 = dropout_cls(resid_dropout1), norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        if not tied_norm:
            self.norm2 = norm_cls(dim)
        norms = [self.norm1] if tied_norm else [self.norm1, self.norm2]
        if fused_dropout_add_ln:
            self._check_fusable(norms)
        self._mark(norms, sequence_parallel, mark_shared_params)

    def _check_fusable(self, norms) -> None:
        for norm in norms:
            _check_fusable(norm, self.dropout1, self.dropout2)
        if self.dropout1.p != self.dropout2.p:
            raise ValueError(
                "fused_dropout_add_ln needs resid_dropout1 and resid_dropout2 to be the same, got "
                f"{self.dropout1.p} and {self.dropout2.p}"
            )
        if norms[0].eps != norms[-1].eps:
            raise ValueError("fused_dropout_add_ln needs norms of one eps")

    def _add_norm_fused(self, x1: Tensor, x2: Optional[Tensor], residual: Optional[Tensor]):
        own = {} if self.tied_norm else {"weight1": self.norm2.weight, "bias1": self.norm2.bias}
        options = {"x1": x2, "residual": residual, "residual_in_fp32": self.residual_in_fp32}
        first, *second, residual = _fused_norm(
            self.norm1, self.dropout1, x1, prenorm=True, **options, **own
        )
        return first, second[0] if second else first, residual

    def _add_norm(self, x1: Tensor, x2: Optional[Tensor], residual: Optional[Tensor]):
        """Return what mixer and MLP read, and the residual stream."""
        if self.fused_dropout_add_ln and not are_few(x1):
            norms = (self.norm1,) if self.tied_norm else (self.norm1, self.norm2)
            if _can_fuse(norms, (self.dropout1, self.dropout2)):
                return self._add_norm_fused(x1, x2, residual)
        x = self.dropout1(x1)
        for branch in (None if x2 is None else self.dropout2(x2), residual):
            x = x if branch is None else x + branch
        first = _normed(self.norm1, x)
        second = first if self.tied_norm else _normed(self.norm2, x)
        return first, second, x.float() if self.residual_in_fp32 else x

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Optional[Tensor] = None,
        residual: Optional[Tensor] = None,
        mixer_kwargs: Optional[dict] = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states1: ``(batch, seqlen, dim)``, the mixer's branch of the block before.
            hidden_states2: the MLP's branch, of the same shape; None in the first block.
            residual: the residual stream, of the same shape; None: zeros.
            mixer_kwargs: more arguments of the mixer.

        Returns:
            ``(hidden_states1, hidden_states2, residual)``: the mixer's branch, the MLP's, and the
            stream without them.
        """
        check_tensors(hidden_states1=hidden_states1)
        check_optional(hidden_states2=hidden_states2, residual=residual)
        x1, x2, residual = self._add_norm(hidden_states1, hidden_states2, residual)
        return self.mixer(x1, **(mixer_kwargs or {})), self.mlp(x2), residual
