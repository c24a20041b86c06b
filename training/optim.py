"""AdamW with weight decay for matrices alone, and a moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.settings import OptimizerSettings


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict]:
    """Return AdamW's groups of what is trained: matrices decay, vectors (biases, norms) do not,
    embeddings as ``decay_embeddings`` says."""
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    decayed, free = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() >= 2
            decays = is_matrix and (settings.decay_embeddings or parameter not in embeddings)
            (decayed if decays else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return AdamW of the model's parameters that are trained."""
    return torch.optim.AdamW(
        parameter_groups(model, settings),
        lr=settings.lr,
        betas=tuple(settings.betas),
        eps=settings.eps,
        fused=True,
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MovingAverage:
    """Exponential moving average of a model's trained parameters, each process its shards."""

    def __init__(self, model: nn.Module, decay: float):
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._averages = {n: p.detach().clone() for n, p in self._parameters.items()}
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step."""
        averages = [_local(average) for average in self._averages.values()]
        self._update(averages, [_local(p.detach()) for p in self._parameters.values()], None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averages for a while."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            average = _local(self._averages[name])
            held = _local(parameter).clone()
            _local(parameter).copy_(average)
            average.copy_(held)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages themselves, not copies: loading writes into them."""
        return dict(self._averages)
