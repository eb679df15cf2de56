"""Schedules of learning rate, weight decay and EMA momentum as functions of the optimizer step, and a run's steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slim.config import EmaSettings, OptimizerSettings

Extension = Literal["constant", "rewarm"]


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps of a run: the planned steps and the extensions.

    Attributes
    ----------
    steps : int
        Steps planned at the start of the run.
    extensions : tuple of (int, str)
        For each extension, the new total of steps and how the added steps are trained: `constant` keeps the last values
        of the schedules; `rewarm` starts new schedules with a warm-up.
    """

    steps: int
    extensions: tuple[tuple[int, Extension], ...] = ()

    @property
    def end(self) -> int:
        """Total steps of the run."""
        return self.extensions[-1][0] if self.extensions else self.steps

    def place(self, step: int) -> tuple[int, int]:
        """Position in a schedule, and its length in steps, at step `step` (from 0) of the run."""
        first, last, end = 0, self.steps, self.steps
        for until, how in self.extensions:
            if step < end:
                break
            if how == "rewarm":
                first, last = end, until
            end = until
        return min(step, last - 1) - first, last - first

    def facts(self) -> dict[str, object]:
        """The plan as JSON-serialisable data, for a checkpoint."""
        return {"steps": self.steps, "extensions": [list(one) for one in self.extensions]}

    @classmethod
    def from_facts(cls, tree: Any) -> StepPlan:
        """Read a plan from the result of `facts`.

        Raises
        ------
        ValueError
            If `tree` is not a plan.
        """
        try:
            plan = cls(int(tree["steps"]), tuple((int(until), how) for until, how in tree["extensions"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"an invalid plan ({error!r})") from None
        ends = [plan.steps, *(until for until, _ in plan.extensions)]
        if ends[0] < 1 or any(b <= a for a, b in itertools.pairwise(ends)):
            raise ValueError("an invalid plan (an extension does not add steps)")
        if any(how not in get_args(Extension) for _, how in plan.extensions):
            raise ValueError("an invalid plan (an unknown kind of extension)")
        return plan


def place(step: int, steps: int | StepPlan) -> tuple[int, int]:
    """Position and length for the schedules below, from a plan or from a plain number of steps."""
    return (step, steps) if isinstance(steps, int) else steps.place(step)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate: a linear warm-up over a share of the steps, then a cosine. `step` is counted from 0."""
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return cosine(settings.lr, min(settings.lr_end, settings.lr), (step - warmup) / max(1, steps - 1 - warmup))


def weight_decay(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Weight decay: a cosine from the first to the second value of `settings.weight_decay`."""
    return cosine(*settings.wd, step / max(1, steps - 1))


def ema_momentum(step: int, steps: int, settings: EmaSettings) -> float:
    """EMA momentum: a cosine from `start` to `end`."""
    return cosine(settings.start, settings.end, step / max(1, steps - 1))
