"""Learning rate, weight decay and EMA momentum as pure functions of the optimizer step, and the steps of a run."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slim.config import EmaSettings, OptimizerSettings

Extension = Literal["constant", "rewarm"]


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of a run: those it was planned with, and those it was extended by.

    Attributes
    ----------
    steps : int
        Planned at the start of the run.
    extensions : tuple of (int, str)
        For each extension, the steps of the run in all and how the added ones are trained: `constant`, at the last
        values of the schedules before them; `rewarm`, by schedules of their own, with a warm-up.
    """

    steps: int
    extensions: tuple[tuple[int, Extension], ...] = ()

    @property
    def end(self) -> int:
        """Steps of the run in all."""
        return self.extensions[-1][0] if self.extensions else self.steps

    def place(self, step: int) -> tuple[int, int]:
        """Step, and number of steps, that the schedules are asked for at `step` (from 0) of the run."""
        first, last, end = 0, self.steps, self.steps
        for until, how in self.extensions:
            if step < end:
                break
            if how == "rewarm":
                first, last = end, until
            end = until
        return min(step, last - 1) - first, last - first

    def facts(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint."""
        return {"steps": self.steps, "extensions": [list(one) for one in self.extensions]}

    @classmethod
    def from_facts(cls, tree: Any) -> Plan:
        """From `facts`.

        Raises
        ------
        ValueError
            If `tree` is no plan.
        """
        try:
            plan = cls(int(tree["steps"]), tuple((int(until), how) for until, how in tree["extensions"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no plan ({error!r})") from None
        ends = [plan.steps, *(until for until, _ in plan.extensions)]
        if ends[0] < 1 or any(b <= a for a, b in itertools.pairwise(ends)):
            raise ValueError("no plan (steps that do not grow)")
        if any(how not in get_args(Extension) for _, how in plan.extensions):
            raise ValueError("no plan (an unknown extension)")
        return plan


def place(step: int, steps: int | Plan) -> tuple[int, int]:
    """Step and number of steps for the schedules below, of a plan or of a mere number of steps."""
    return (step, steps) if isinstance(steps, int) else steps.place(step)


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
