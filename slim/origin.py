"""What a run began with, and what a checkpoint must therefore share with those who go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.reader import Dataset
from shards.settings import digest
from shards.stream import Stream
from slim.checkpoint import CheckpointError, facts
from slim.config import TrainSettings

_HINT = "Use the settings in the run's config.yaml, or another run.out"
# field: what the user can set of it
_SET_BY = {
    "tensors": "model, view, windows.k, loss or the data's grid; in fine-tuning the weights, the head or the answers",
    "stream": "data, its weights, its training sessions or run.seed",
    "zero_stage": "zero.stage",
    "global_batch": "run.batch x run.accumulate x processes",
}


@dataclass(frozen=True)
class Origin:
    """Written into every checkpoint of a run.

    Attributes
    ----------
    tensors : str
        Hash of what the shapes and meaning of all tensors depend on.
    stream : str
        Hash of the order of samples: with another one, the position in it would mean other samples.
    zero_stage : int
    global_batch : int
        Samples that all processes together take per optimizer step.
    """

    tensors: str
    stream: str
    zero_stage: int
    global_batch: int

    @classmethod
    def of(
        cls, settings: TrainSettings, learned: Any, datasets: Sequence[Dataset], stream: Stream, processes: int
    ) -> Origin:
        """That of these settings; `learned` as in `slim.course.Course`."""
        model, grid = settings.model.model_dump(mode="json"), datasets[0].manifest["grid"]
        shapes = [model, settings.view, settings.windows.k, grid, datasets[0].frames, learned]
        samples = settings.run.batch * settings.run.accumulate * processes
        return cls(digest(shapes), stream.digest(), settings.zero.stage, samples)

    def facts(self) -> dict[str, Any]:
        """For `checkpoint.save`."""
        return asdict(self)

    def check(self, folder: Path) -> None:
        """Refuse to go on from a checkpoint that differs.

        Raises
        ------
        CheckpointError
            With the settings at fault.
        """
        about = facts(folder)
        for field, mine in self.facts().items():
            if about[field] != mine:
                hashed = isinstance(mine, str)
                got, expected = ("another than the run began with", "the same") if hashed else (mine, about[field])
                raise CheckpointError(folder, _SET_BY[field], got, expected, _HINT)
