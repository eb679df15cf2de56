"""Learning rate, weight decay and EMA momentum as pure functions of the optimizer step."""

from __future__ import annotations

import math

from slim.config import EmaSettings, OptimizerSettings


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Linear warm-up over a share of the steps, then a cosine; `step` counts optimizer steps from 0."""
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return cosine(settings.lr, min(settings.lr_end, settings.lr), (step - warmup) / max(1, steps - 1 - warmup))


def weight_decay(step: int, steps: int, settings: OptimizerSettings) -> float:
    """A cosine from the first to the second value."""
    return cosine(*settings.wd, step / max(1, steps - 1))


def ema_momentum(step: int, steps: int, settings: EmaSettings) -> float:
    """A cosine from `start` to `end`."""
    return cosine(settings.start, settings.end, step / max(1, steps - 1))
