"""The learning rate over the steps, as a factor of the optimizer's."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from training.settings import SchedulerSettings

_WSD_DECAY_SHARE = 0.2  # of all steps (Hägele et al., arXiv:2405.18392, find 10 to 20 %)


def factor(step: int, settings: SchedulerSettings, max_steps: int) -> float:
    """Return the factor of the learning rate at ``step``, 0 the first of ``max_steps``.

    The warmup rises linearly and reaches 1 at step ``warmup_steps``. After it,
    "constant" stays; "linear" and "cosine" fall to ``final_factor`` over ``decay_steps`` (by
    default to the end) and stay there; "wsd" stays and falls linearly over the last
    ``decay_steps`` (by default a fifth of all steps).
    """
    warmup, final = settings.warmup_steps, settings.final_factor
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.name == "constant":
        return 1.0
    if settings.name == "wsd":
        decay = settings.decay_steps
        decay = round(_WSD_DECAY_SHARE * max_steps) if decay is None else decay
        decay = min(decay, max_steps - warmup)
        start = max_steps - decay
    else:
        start, decay = warmup, settings.decay_steps
    end = max_steps if decay is None else start + decay
    done = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
    if settings.name == "cosine":
        done = 0.5 - 0.5 * math.cos(math.pi * done)
    return (1.0 - done) + final * done


def make_scheduler(optimizer: Optimizer, settings: SchedulerSettings, max_steps: int) -> LambdaLR:
    """Return the scheduler; its ``step()`` follows the optimizer's."""
    return LambdaLR(optimizer, partial(factor, settings=settings, max_steps=max_steps))
