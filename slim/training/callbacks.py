"""Callbacks of the trainer: the base class, and the callbacks that every run has.

To add a callback, derive a class from `Callback` and write a function that returns an instance. Name the function in
the environment variable SLIM_CALLBACKS as `module:function`; separate several with commas. Every process of a run
imports these functions, and calls the callbacks before the built-in ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from shards.core.progress import progress
from slim.checkpoints.mirror import Mirror
from slim.config import TrainSettings
from slim.training.metrics import MetricsLine, Monitor, number
from slim.training.mfu import utilisation_of
from slim.training.stall import Watch


@dataclass(frozen=True, kw_only=True)
class Start:
    """The state of a run before its first step.

    Attributes
    ----------
    step, steps : int
        Optimizer steps already done, and the total of the run.
    warn : callable
        Logs a text as a warning, with the number of the current step.
    """

    step: int
    steps: int
    warn: Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A finished optimizer step.

    Attributes
    ----------
    number : int
        Number of the step, from 1.
    keys : list of str
        Keys of the samples that this process trained on.
    line : dict, optional
        The step's line of metrics.jsonl; None if the step is not logged (`run.log_every`). It is the same in all
        processes, except that only rank 0 has the standard deviation and effective rank of features.
    """

    number: int
    keys: list[str]
    line: MetricsLine | None


class Callback:
    """Base class of callbacks. Every process of a run calls these methods; by default they do nothing."""

    def on_start(self, start: Start) -> None:
        """Called before the first step, after a checkpoint has been loaded."""

    def on_phase(self, phase: str) -> None:
        """Called when the process starts to wait for data, compute or save: DATA, COMPUTE, SAVE in `stall.py`."""

    def on_step(self, step: Step) -> None:
        """Called after each step, before its checkpoint is saved."""

    def on_save(self, folder: Path) -> None:
        """Called when a checkpoint is complete, before older ones are removed."""

    def needed(self) -> set[Path]:
        """Return the checkpoints that must not be removed yet."""
        return set()

    def on_finish(self) -> None:
        """Called after the last step of this process, unless it failed."""

    def on_end(self) -> None:
        """Called at the end, also after a failure."""

    def warnings(self) -> list[str]:
        """Return the warnings that the summary of the run repeats."""
        return []


class MetricsWriter(Callback):
    """Writes metrics to metrics.jsonl and wandb, and warns of signs of collapse; rank 0 only.

    Parameters
    ----------
    settings : TrainSettings
    utilisation : callable, optional
        Computes a step's model FLOPs utilisation from its line of metrics.jsonl.
    """

    def __init__(self, settings: TrainSettings, utilisation: Callable[[MetricsLine], float] | None = None):
        self.settings, self.utilisation = settings, utilisation
        self._monitor: Monitor | None = None
        self._said: set[str] = set()

    def on_start(self, start: Start) -> None:
        config = self.settings.model_dump(mode="json")
        self._monitor = Monitor(Path(self.settings.run.out), start.step, self.settings.run.wandb, config)
        self._warn = start.warn

    def on_step(self, step: Step) -> None:
        assert self._monitor is not None
        if step.line is not None:
            more: MetricsLine = {} if self.utilisation is None else {"mfu": self.utilisation(step.line)}
            self._monitor.log(step.line | more)
        found = self._monitor.warnings()
        for one in found:
            if one.kind not in self._said:
                self._warn(one.text)
        self._said = {one.kind for one in found}

    def on_end(self) -> None:
        if self._monitor is not None:
            self._monitor.close()

    def warnings(self) -> list[str]:
        return [] if self._monitor is None else [one.text for one in self._monitor.warnings()]


class ProgressBar(Callback):
    """Shows the number of steps done, their rate and the time left; rank 0 only."""

    def __init__(self, name: str):
        self.name = name
        self._told = ""  # of the last logged step
        self._stack = ExitStack()

    def on_start(self, start: Start) -> None:
        self._advance = self._stack.enter_context(progress(self.name, start.steps - start.step, "steps"))

    def on_step(self, step: Step) -> None:
        if (line := step.line) is not None:
            loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
            self._told = (
                f"loss {loss}, {number(line, 'samples_per_s'):.2f} samples/s, "
                f"data wait {number(line, 'data_wait'):.0%}, {number(line, 'peak_memory_bytes') / 2**30:.2f} GiB"
            )
        self._advance(1, self._told)

    def on_finish(self) -> None:
        self._stack.close()

    def on_end(self) -> None:
        self._stack.close()


class StallWatch(Callback):
    """Warns when a step takes far longer than usual; rank 0 only."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._watch: Watch | None = None

    def on_start(self, start: Start) -> None:
        self._watch = self._stack.enter_context(Watch(start.warn))

    def on_phase(self, phase: str) -> None:
        if self._watch is not None:
            self._watch.now(phase)

    def on_step(self, step: Step) -> None:
        if self._watch is not None:
            self._watch.step()

    def on_finish(self) -> None:  # other callbacks may now wait, for example for a copy, which is not a step
        self._stack.close()

    def on_end(self) -> None:
        self._stack.close()


class MirrorCopies(Callback):
    """Copies each checkpoint to a second folder; rank 0 only. See `slim.checkpoints.mirror`."""

    def __init__(self, mirror: Mirror):
        self.mirror = mirror
        self._told: str | None = None

    def on_start(self, start: Start) -> None:
        self._warn = start.warn

    def on_save(self, folder: Path) -> None:
        self._tell()
        self.mirror.offer(folder)

    def needed(self) -> set[Path]:
        return self.mirror.needed

    def on_finish(self) -> None:
        self.mirror.close()
        self._tell()

    def warnings(self) -> list[str]:
        return [] if self.mirror.trouble is None else [self.mirror.trouble]

    def _tell(self) -> None:
        """Warn of a failed copy, once for each reason."""
        trouble = self.mirror.trouble
        if trouble is not None and trouble != self._told:
            self._warn(trouble)
        self._told = trouble


def usual(
    name: str,
    settings: TrainSettings,
    device: torch.device,
    rank: int,
    flops_per_token: Callable[[], float] | None = None,
) -> Sequence[Callback]:
    """The callbacks of every run: metrics, progress bar, stall watch and mirror. All of them act on rank 0 only.

    Parameters
    ----------
    name : str
        Name shown by the progress bar.
    flops_per_token : callable, optional
        See `utilisation_of`.
    """
    if rank:
        return ()
    run = settings.run
    chosen = [
        StallWatch(),
        MetricsWriter(settings, utilisation_of(settings, device, flops_per_token)),
        ProgressBar(name),
    ]
    if run.mirror is not None:
        chosen.append(MirrorCopies(Mirror(Path(run.out), Path(run.mirror), run.keep, run.keep_every)))
    return chosen
