"""The data and settings that a checkpoint depends on: a run can only be resumed if they are unchanged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from shards.core.settings import digest
from shards.format.reader import Dataset
from shards.format.stream import Stream
from slim.checkpoints.checkpoint import CheckpointError, facts
from slim.config import TrainSettings

_CONVERTED = "Use the dataset that the run was started with, or another run.out"
_HINT = "Use the settings in the run's config.yaml, or another run.out"
# field: the settings that it depends on
_SET_BY = {
    "tensors": "model, view, windows.k, loss or the grid of the data; "
    "in fine-tuning the weights, head, freeze, lora or labels",
    "stream": "data, their weights, their training sessions or run.seed",
    "zero_stage": "zero.stage",
    "global_batch": "run.batch x run.accumulate x processes",
}


class Content(TypedDict):
    """A dataset by its content: its folder, and hashes of its shards and of the settings of its conversion."""

    folder: str
    shards: str
    configuration: str


class DataOrigin(Content):
    """A training dataset, with the number of its training sessions."""

    sessions: int


@dataclass(frozen=True)
class Origin:
    """What a checkpoint depends on; written into every checkpoint of a run.

    Attributes
    ----------
    tensors : str
        Hash of everything that the shapes and meaning of the tensors depend on.
    stream : str
        Hash of everything that the order of samples depends on.
    zero_stage : int
    global_batch : int
        Samples per optimizer step, of all processes together.
    data : tuple of dict
        For each dataset: `shards`, a hash of the checksums of the training shards; `configuration`, a hash of the
        conversion settings; `sessions`, the number of training sessions; `folder`, its path, for messages.
    """

    tensors: str
    stream: str
    zero_stage: int
    global_batch: int
    data: tuple[DataOrigin, ...] = ()

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
        """The origin for these settings; `learned` and `splits` are as in `slim.training.task.TrainingTask`."""
        model, grid = settings.model.model_dump(mode="json"), datasets[0].manifest.grid.tree()
        shapes = [model, settings.view, settings.windows.k, grid, datasets[0].frames, learned]
        samples = settings.run.batch * settings.run.accumulate * processes
        data = tuple(
            DataOrigin(**content(dataset, splits), sessions=len(sessions))
            for dataset, sessions in zip(datasets, stream.sessions, strict=True)
        )
        return cls(digest(shapes), stream.digest(), settings.zero_stage, samples, data)

    def facts(self) -> dict[str, object]:
        """The attributes as a dict, for `checkpoint.save`."""
        return asdict(self) | {"data": [_without_place(one) for one in self.data]}

    def check(self, folder: Path) -> None:
        """Check that a checkpoint has the same origin.

        Raises
        ------
        CheckpointError
            If it differs. The error names the settings or the dataset that changed.
        """
        about = facts(folder)
        self._check_data(folder, about.get("data"))
        for field, set_by in _SET_BY.items():
            mine = getattr(self, field)
            if about.get(field) != mine:
                hashed = isinstance(mine, str)
                hashes = ("a value that differs from the checkpoint's", "the same settings and data")
                got, expected = hashes if hashed else (mine, about.get(field))
                raise CheckpointError(folder, set_by, got, expected, _HINT)

    def unknown(self, folder: Path) -> list[str]:
        """A line for each dataset for which a checkpoint of an earlier version has no hashes to compare."""
        if "data" in facts(folder):
            return []
        return [
            f"{folder} was written by an earlier version, so changes of {one['folder']} since then cannot be detected"
            for one in self.data
        ]

    def _check_data(self, folder: Path, before: Any) -> None:
        if not isinstance(before, list) or len(before) != len(self.data):
            return  # not recorded, or another number of datasets, which changes `stream`
        for mine, theirs in zip(self.data, before, strict=True):
            if _without_place(mine) == theirs:
                continue
            where, count = mine["folder"], mine["sessions"]
            then = theirs["sessions"]
            if count != then:
                what = "were added" if count > then else "are missing"
                got = f"{count} training sessions"
                expected = f"{then}, as in the checkpoint {folder}"
                hint = f"{abs(count - then)} sessions {what}, which changes the order of samples. {_CONVERTED}"
                raise CheckpointError(where, "sessions", got, expected, hint)
            field = "configuration" if mine["configuration"] != theirs["configuration"] else "shards"
            own = mine["configuration"] if field == "configuration" else mine["shards"]
            got, expected = (f"hash {str(value)[:12]}" for value in (own, theirs[field]))
            hint = f"The dataset was converted again, with other {_CHANGED[field]}. {_CONVERTED}"
            raise CheckpointError(where, field, got, f"{expected}, as in the checkpoint {folder}", hint)


_CHANGED = {"configuration": "settings", "shards": "data in its training sessions"}


def content(dataset: Dataset, splits: Collection[str] | None = None) -> Content:
    """Identify a dataset by its content, not its folder: hashes of the shards of these splits and of its settings."""
    manifest = dataset.manifest
    shards = [shard.sha256 for shard in manifest.shards if splits is None or shard.name.rsplit("-", 1)[0] in splits]
    return Content(folder=str(dataset.folder), shards=digest(shards), configuration=manifest.configuration_hash)


def _without_place(data: Mapping[str, object]) -> dict[str, object]:
    """Without the folder: a run may be resumed after its data have been moved."""
    return {name: value for name, value in data.items() if name != "folder"}
