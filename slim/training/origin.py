"""What a run began with, and what a checkpoint must therefore share with those who go on from it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.core.settings import digest
from shards.format.reader import Dataset
from shards.format.stream import Stream
from slim.checkpoints.checkpoint import CheckpointError, facts
from slim.config import TrainSettings

_CONVERTED = "Use the dataset that the run began with, or another run.out"
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
    data : tuple of dict
        Of each dataset: `shards`, hash of the checksums of the shards that are trained on; `configuration`, hash of
        the settings of its conversion; `sessions`, how many are trained on; `folder`, where it lies, for messages.
    """

    tensors: str
    stream: str
    zero_stage: int
    global_batch: int
    data: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        settings: TrainSettings,
        learned: Any,
        datasets: Sequence[Dataset],
        stream: Stream,
        processes: int,
        splits: Collection[str] | None = None,
    ) -> Origin:
        """That of these settings; `learned` and `splits` as in `slim.training.task.TrainingTask`."""
        model, grid = settings.model.model_dump(mode="json"), datasets[0].manifest.grid.tree()
        shapes = [model, settings.view, settings.windows.k, grid, datasets[0].frames, learned]
        samples = settings.run.batch * settings.run.accumulate * processes
        data = tuple(
            {**content(dataset, splits), "sessions": len(sessions)}
            for dataset, sessions in zip(datasets, stream.sessions, strict=True)
        )
        return cls(digest(shapes), stream.digest(), settings.zero.stage, samples, data)

    def facts(self) -> dict[str, Any]:
        """For `checkpoint.save`."""
        return asdict(self) | {"data": [_without_place(one) for one in self.data]}

    def check(self, folder: Path) -> None:
        """Refuse to go on from a checkpoint that differs.

        Raises
        ------
        CheckpointError
            With the settings at fault, or the dataset that is not as it was.
        """
        about = facts(folder)
        self._check_data(folder, about.get("data"))
        for field, set_by in _SET_BY.items():
            mine = getattr(self, field)
            if about[field] != mine:
                hashed = isinstance(mine, str)
                got, expected = ("another than the run began with", "the same") if hashed else (mine, about[field])
                raise CheckpointError(folder, set_by, got, expected, _HINT)

    def unknown(self, folder: Path) -> list[str]:
        """A line for each dataset of which a checkpoint of an earlier version does not tell whether it has changed."""
        if "data" in facts(folder):
            return []
        return [
            f"{folder} was written by an earlier version: it is not known whether {one['folder']} is as it was then"
            for one in self.data
        ]

    def _check_data(self, folder: Path, before: Any) -> None:
        if not isinstance(before, list) or len(before) != len(self.data):
            return  # not recorded; other numbers of datasets are another stream
        for mine, theirs in zip(self.data, before, strict=True):
            if _without_place(mine) == theirs:
                continue
            where, count = mine["folder"], mine["sessions"]
            then = theirs["sessions"]
            if count != then:
                what = "were added" if count > then else "are gone"
                got = f"{count} training sessions"
                expected = f"{then}, as the run began with ({folder})"
                hint = f"{abs(count - then)} sessions {what}, which changes the order of samples. {_CONVERTED}"
                raise CheckpointError(where, "sessions", got, expected, hint)
            field = "configuration" if mine["configuration"] != theirs["configuration"] else "shards"
            got, expected = (f"hash {str(one[field])[:12]}" for one in (mine, theirs))
            hint = f"The dataset was converted again, with other {_CHANGED[field]}. {_CONVERTED}"
            raise CheckpointError(where, field, got, f"{expected}, as the run began with ({folder})", hint)


_CHANGED = {"configuration": "settings", "shards": "data in its training sessions"}


def content(dataset: Dataset, splits: Collection[str] | None = None) -> dict[str, Any]:
    """What a dataset holds, whatever folder it lies in: hashes of its shards, of these splits alone, and settings."""
    manifest = dataset.manifest
    shards = [shard.sha256 for shard in manifest.shards if splits is None or shard.name.rsplit("-", 1)[0] in splits]
    return {"folder": str(dataset.folder), "shards": digest(shards), "configuration": manifest.configuration_hash}


def _without_place(data: dict[str, Any]) -> dict[str, Any]:
    """A run may be resumed with its data in another folder."""
    return {name: value for name, value in data.items() if name != "folder"}
