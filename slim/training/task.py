"""What a run trains: the data, the model and the loss, as the trainer uses them.

A `TrainingTask` opens the data and makes a `Learner`, which holds the model and computes the loss of a step. There are
two: `slim.pretrain.task.PretrainTask` and `slim.finetune.task.FinetuneTask`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shards.format.reader import Dataset
from shards.format.stream import Item, Stream
from slim.checkpoints.provenance import Ancestor
from slim.checkpoints.seen import Seen
from slim.config import TrainSettings
from slim.data.collate import load_batch
from slim.data.samples import geometry_for
from slim.model.inputs import Batch, PackedBatch
from slim.training.metrics import MetricsLine
from slim.training.optim import Group
from slim.training.origin import Origin
from slim.training.reshard import States
from slim.training.schedule import StepPlan

Steps = Callable[[int], Iterable[Batch]]  # this process's micro-batches of the first so many optimizer steps
Forward = Callable[..., Any]
Full = Callable[[Tensor], Tensor]  # returns the whole fp32 value of a parameter that is divided among processes


class Learner(Protocol):
    """What the trainer needs of a model in training. All processes call every method, so each may communicate.

    Attributes
    ----------
    model : nn.Module
        The model that the DeepSpeed engine wraps.
    logged : sequence of str
        Names in `Losses.logs` that are averaged for metrics.jsonl.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def logged(self) -> Sequence[str]: ...

    def summarise(self, mean: dict[str, float | None]) -> dict[str, float | None]:
        """Compute the numbers for metrics.jsonl from the means over micro-batches and processes."""
        ...

    def groups(self) -> list[Group]:
        """All parameters that are trained, in groups for the optimizer."""
        ...

    def begin(self, steps: Steps, forward: Forward) -> None:
        """Prepare for the first step of a new run, for example measure means. A resumed run calls `load` instead."""
        ...

    def losses(self, batch: Batch, step: int, forward: Forward) -> Losses:
        """The losses of one micro-batch; `forward` is the engine around the model."""
        ...

    def commit(self, step: int, steps: int | StepPlan, forward: Forward, full: Full | None) -> MetricsLine:
        """Finish optimizer step `step` (from 0) of `steps`, and return further numbers for metrics.jsonl."""
        ...

    def discard(self) -> None:
        """Finish a step that was skipped."""
        ...

    def state(self, full: Full | None) -> dict[str, Tensor]:
        """The whole tensors that a checkpoint stores in `weights.safetensors`."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore such a state, except the model, which the engine restores."""
        ...


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """How a new run begins.

    Attributes
    ----------
    settings : TrainSettings
        The settings, completed.
    init : Ancestor, optional
        The weights that the run begins with; None if they are random.
    seen : Seen, optional
        The subjects seen by these weights and in the run; None if this is not known.
    lines : sequence of str
        What was taken from them and what was not, for the user.
    """

    settings: TrainSettings
    init: Ancestor | None = None
    seen: Seen | None = None
    lines: Sequence[str] = ()


class TrainingTask(ABC):
    """The data and the learner of a run.

    Attributes
    ----------
    name : str
        Name shown by the progress bar.
    splits : collection of str or None
        Splits of the datasets that are used; None for all.

    Parameters
    ----------
    settings : TrainSettings
    datasets : sequence of Dataset
        Their split `train` is trained on.

    Raises
    ------
    UserError
        If model and data do not fit together, or there are no training sessions.
    """

    name: str
    splits: Collection[str] | None = None

    def __init__(self, settings: TrainSettings, datasets: Sequence[Dataset]):
        self.settings, self.datasets = settings, list(datasets)
        self.geometry = geometry_for(settings, self.datasets)
        weights = [item.weight for item in settings.data]
        self.stream = Stream(self.datasets, weights, "train", settings.run.seed, settings.windows.least)

    def origin(self, processes: int) -> Origin:
        """What the checkpoints of this task depend on, with this number of processes."""
        return Origin.of(self.settings, self.learned, self.datasets, self.stream, processes, self.splits)

    def seen(self) -> Seen | None:
        """The subjects and sessions seen in training, without labels; None if this is not known."""
        return Seen.of(self.stream.sessions)

    def too_short(self) -> list[str]:
        """A line for each dataset of which training sessions are left out, because they have too few windows."""
        least = self.settings.windows.least
        return [
            f"{short} of {short + len(part)} training sessions of {dataset.folder} are left out: they have fewer than "
            f"{least} windows (windows.minimum, windows.k)"
            for dataset, part, short in zip(self.datasets, self.stream.sessions, self.stream.short, strict=True)
            if short
        ]

    def load(self) -> Callable[[list[Item]], PackedBatch]:
        """Return a picklable function that makes micro-batches in the loading processes."""
        return partial(load_batch, datasets=self.datasets, geometry=self.geometry, settings=self.settings)

    def begin(self, folder: Path) -> Beginning:
        """Write what a new run in this folder needs before its first step, such as weights to begin with."""
        return Beginning(settings=self.settings, seen=self.seen())

    def moments(self) -> States | None:
        """Parameters and Adam moments that a new run begins with; None if the moments are zero."""
        return None

    @property
    @abstractmethod
    def learned(self) -> Any:
        """What the meaning of the tensors depends on, besides sizes and data, as JSON-serialisable data."""

    @abstractmethod
    def learner(self, device: torch.device) -> Learner:
        """Return a new learner, initialised from the seed of the run."""


@dataclass
class Losses:
    """The loss of a micro-batch, with detached numbers to log, and features to log the SD and effective rank of."""

    total: Tensor
    logs: dict[str, Tensor]
    features: dict[str, Tensor | None] = field(default_factory=dict)
