"""What a run learns, and from what: handed to the trainer, which knows neither JEPA nor labels.

A `TrainingTask` opens the data and makes the learner; a learner (`Learner`) has the model and says what a step does.
`PretrainTask` is one, `slim.finetune.task.FinetuneTask` the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shards.format.reader import Dataset
from shards.format.stream import Item, Stream
from slim.checkpoints.seen import Seen
from slim.config import TrainSettings
from slim.data.collate import load_batch
from slim.data.samples import geometry_for
from slim.model.inputs import Batch, PackedBatch
from slim.training.metrics import MetricsLine
from slim.training.optim import Group
from slim.training.origin import Origin
from slim.training.schedule import Plan

Steps = Callable[[int], Iterable[Batch]]  # this process's micro-batches of the first so many optimizer steps
Forward = Callable[..., Any]
Full = Callable[[Tensor], Tensor]  # the whole fp32 value of a parameter that processes hold in parts


class Learner(Protocol):
    """What a trainer asks of whatever it trains. Every process calls everything, so any of it may reduce.

    Attributes
    ----------
    model : nn.Module
        The engine is made around it.
    logged : sequence of str
        Names in `Losses.logs` that are averaged into a line of metrics.jsonl.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def logged(self) -> Sequence[str]: ...

    def summarise(self, mean: dict[str, float | None]) -> dict[str, float | None]:
        """The numbers of a line of metrics.jsonl, from the means over micro-batches and processes."""
        ...

    def groups(self) -> list[Group]:
        """All parameters, by how the optimizer treats them."""
        ...

    def begin(self, steps: Steps, forward: Forward) -> None:
        """Measure what has to be known before the first step; a run that goes on is given it by `load`."""
        ...

    def losses(self, batch: Batch, step: int, forward: Forward) -> Losses:
        """Those of one micro-batch; `forward` is the engine around the model."""
        ...

    def commit(self, step: int, steps: int | Plan, forward: Forward, full: Full | None) -> MetricsLine:
        """End optimizer step `step` (from 0) of `steps`; what else its line of metrics.jsonl holds."""
        ...

    def discard(self) -> None:
        """End a step that was skipped."""
        ...

    def state(self, full: Full | None) -> dict[str, Tensor]:
        """What `weights.safetensors` of a checkpoint holds: whole tensors."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from such a state; the model itself is left to the engine."""
        ...


class TrainingTask(ABC):
    """Data and learner of a run.

    Attributes
    ----------
    name : what the progress bar calls it
    splits : splits of the datasets that are trained on; None: any

    Parameters
    ----------
    settings : TrainSettings
    datasets : sequence of Dataset
        Training samples are those of their split `train`.

    Raises
    ------
    UserError
        If model and data do not fit, or there is nothing to train on.
    """

    name: str
    splits: Collection[str] | None = None

    def __init__(self, settings: TrainSettings, datasets: Sequence[Dataset]):
        self.settings, self.datasets = settings, list(datasets)
        self.geometry = geometry_for(settings, self.datasets)
        weights = [item.weight for item in settings.data]
        self.stream = Stream(self.datasets, weights, "train", settings.run.seed, settings.windows.k)

    def origin(self, processes: int) -> Origin:
        """What checkpoints of this task must share, with so many processes."""
        return Origin.of(self.settings, self.learned, self.datasets, self.stream, processes, self.splits)

    def seen(self) -> Seen | None:
        """Who is seen in training, without labels; None where that is not known."""
        return Seen.of(self.stream.sessions)

    def too_short(self) -> list[str]:
        """A line for each dataset with training sessions of fewer windows than pass through the model together."""
        least = self.settings.windows.k
        return [
            f"{short} of {short + len(part)} training sessions of {dataset.folder} are left out: they have fewer than "
            f"{least} windows (windows.k)"
            for dataset, part, short in zip(self.datasets, self.stream.sessions, self.stream.short, strict=True)
            if short
        ]

    def load(self) -> Callable[[list[Item]], PackedBatch]:
        """Makes micro-batches in the loading processes; picklable."""
        return partial(load_batch, datasets=self.datasets, geometry=self.geometry, settings=self.settings)

    @property
    @abstractmethod
    def learned(self) -> Any:
        """JSON-able: what the meaning of the tensors depends on beside sizes and data."""

    @abstractmethod
    def learner(self, device: torch.device) -> Learner:
        """The learner at its start, drawn from the seed of the run."""


@dataclass
class Losses:
    """The loss of a micro-batch, and what is logged beside it (detached): numbers, and features whose spread is."""

    total: Tensor
    logs: dict[str, Tensor]
    features: dict[str, Tensor | None] = field(default_factory=dict)
