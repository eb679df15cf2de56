"""What happens around the steps of a run: callbacks that the trainer calls, and those that every run has.

A callback of your own is a class derived from `Callback`. SLIM_CALLBACKS names functions that make some, as
`module:function`, several with commas; every process of a run imports them and calls them before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from shards.core.cli import progress
from slim.checkpoints.mirror import Mirror
from slim.config import TrainSettings
from slim.training.metrics import MetricsLine, Monitor, number
from slim.training.mfu import utilisation_of
from slim.training.stall import Watch


@dataclass(frozen=True, kw_only=True)
class Start:
    """A run that is about to train.

    Attributes
    ----------
    step, steps : int
        Optimizer steps done before, and of the run in all.
    warn : callable
        Tells the user a line, with the number of the step.
    """

    step: int
    steps: int
    warn: Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimizer step that has ended.

    Attributes
    ----------
    number : int
        Counted from 1.
    keys : list of str
        Samples that this process trained on.
    line : dict
        Its line of metrics.jsonl; the same in all processes but for the spread of features, which rank 0 has.
    logged : bool
        Whether the line is to be written.
    """

    number: int
    keys: list[str]
    line: MetricsLine
    logged: bool


class Callback:
    """Called by every process of a run; what is not overridden does nothing."""

    def on_start(self, start: Start) -> None:
        """Before the first step, after what was resumed from is loaded."""

    def on_phase(self, phase: str) -> None:
        """The process now waits for data, computes or saves: DATA, COMPUTE, SAVE of `slim.training.stall`."""

    def on_step(self, step: Step) -> None:
        """After a step, before a checkpoint of it is saved."""

    def on_save(self, folder: Path) -> None:
        """After a checkpoint is complete, before older ones are removed."""

    def needed(self) -> set[Path]:
        """Checkpoints that must not be removed yet."""
        return set()

    def on_finish(self) -> None:
        """After the last step of this process, if nothing has failed."""

    def on_end(self) -> None:
        """At the end, whether or not something has failed."""

    def warnings(self) -> list[str]:
        """What the summary of the run repeats."""
        return []


class MetricsWriter(Callback):
    """Writes metrics.jsonl and wandb, and warns when the run goes wrong; rank 0 only.

    Parameters
    ----------
    settings : TrainSettings
    utilisation : callable, optional
        From a line of metrics.jsonl to the model FLOPs utilisation of its step.
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
        if step.logged:
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
    """Steps, their rate and the time left; rank 0 only."""

    def __init__(self, name: str):
        self.name = name
        self._stack = ExitStack()

    def on_start(self, start: Start) -> None:
        self._advance = self._stack.enter_context(progress(self.name, start.steps - start.step, "steps"))

    def on_step(self, step: Step) -> None:
        line = step.line
        loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
        self._advance(
            1,
            f"loss {loss}, {number(line, 'samples_per_s'):.2f} samples/s, data wait {number(line, 'data_wait'):.0%}, "
            f"{number(line, 'peak_memory_bytes') / 2**30:.2f} GiB",
        )

    def on_finish(self) -> None:
        self._stack.close()

    def on_end(self) -> None:
        self._stack.close()


class StallWatch(Callback):
    """Tells that a step takes far longer than usual; rank 0 only."""

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

    def on_finish(self) -> None:  # what other callbacks then wait for, such as a copy, is no step
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
        """Warn of a copy that failed, once for each reason."""
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
    """The callbacks of every run: metrics, progress, stall watch and mirror, all of them on rank 0.

    Parameters
    ----------
    name : str
        Of the progress bar.
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
