"""The record of an explanation: RUN/report/explain/TASK.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shards.core.errors import ConfigError
from shards.core.files import dump, write_atomically
from shards.core.findings import Finding, good, look
from shards.core.settings import check
from shards.reporting import html, viewer

ABSOLUTE, ANATOMY = "_absolute", "_anatomy"  # endings of the files of maps; that of the signed map is empty
_VIEWS = {ABSOLUTE: "size of the shares", "": "signed shares", ANATOMY: "anatomy"}
Start = Literal["still", "empty"]  # start of the path, see `slim.explain.integrated_gradients`


class _StoredShares(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Place(_StoredShares):
    """A place in the brain with large shares: its position (x, y, z) in mm, and the mean absolute share."""

    mm: tuple[float, float, float]
    value: float


class WindowShares(_StoredShares):
    """A kept window: start (s), saliency, mean absolute share of its brain voxels, and the sum of the shares."""

    start_s: float
    saliency: float
    mean_absolute: float
    sum: float


class SessionShares(_StoredShares):
    """An explained session.

    Attributes
    ----------
    key, subject : str
    score, at_start : float
        Score of the session, and at the start of the path.
    sum : float
        Sum of all shares; `gap` is its difference from `score - at_start`.
    complete : bool
        Whether the gap is within the tolerance.
    points : int
        Number of points on the path.
    windows : tuple of WindowShares
        In time order.
    """

    key: str
    subject: str
    score: float
    at_start: float
    sum: float
    gap: float
    complete: bool
    points: int
    windows: tuple[WindowShares, ...]


class Explanation(_StoredShares):
    """The explanation of a task.

    Attributes
    ----------
    task, type, label, classes, pooling
        Facts of the task.
    score : str
        Description of the explained score.
    start, tolerance
        Settings of the path; see `slim.explain.integrated_gradients.integrated_gradients`.
    run, data, step, weights
        Source of the features.
    space : "MNI" or "native"
        Space of the maps.
    places : tuple of Place
        The strongest places, the largest first.
    sessions : tuple of SessionShares
        Sorted by key.
    """

    task: str
    type: str
    label: str | None
    classes: tuple[str, ...]
    score: str
    pooling: str
    start: Start
    tolerance: float
    run: str
    data: str
    step: int
    weights: str | None
    space: Literal["MNI", "native"]
    places: tuple[Place, ...] = ()
    sessions: tuple[SessionShares, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Explanation:
        """Read an explanation from a file.

        Raises
        ------
        ConfigError
            If the file has other content.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise unreadable(path, error) from None
        return check(cls, tree, path)

    def tree(self) -> dict[str, object]:
        """The explanation as JSON-serialisable data."""
        return self.model_dump(mode="json")

    def write(self, folder: Path) -> None:
        """Write FOLDER/TASK.json."""
        write_atomically(folder / f"{self.task}.json", dump(self.tree()) + "\n")

    @property
    def incomplete(self) -> list[str]:
        """Keys of the sessions with shares that do not add up to the score within the tolerance."""
        return [session.key for session in self.sessions if not session.complete]

    def remarks(self) -> list[Finding]:
        """Findings about the quality of the maps."""
        sessions, off = html.count(len(self.sessions), "session"), self.incomplete
        if off:
            return [
                look(
                    "completeness",
                    f"In {len(off)} of {sessions} the shares do not add up to the score within the tolerance, first "
                    f"{off[0]}: interpret these maps with care.",
                )
            ]
        return [
            good(
                "completeness",
                f"Complete: in {sessions} the shares of all voxels add up to the score minus the score at the start, "
                f"within {self.tolerance:.0%} of this difference or of the SD of the score over subjects.",
            )
        ]


def unreadable(path: Path, error: Exception) -> ConfigError:
    """The error for an unreadable file of an explanation."""
    got = f"an unreadable file ({type(error).__name__}: {error})"
    return ConfigError(path, "", got, "a file written by slim-brain explain, with its pictures", "Run it again")


def view_path(folder: Path, task: str, ending: str) -> Path:
    """The interactive view of a map; `ending` is that of the map."""
    return folder / f"{task}{ending}_view.html"


def find_views(folder: Path, task: str) -> dict[str, Path]:
    """The interactive views of a task's maps, by what they show; none for an explanation of an earlier version."""
    return {
        name if kind == "volume" else f"{name}, {kind}": path
        for ending, name in _VIEWS.items()
        for kind, path in viewer.find(view_path(folder, task, ending)).items()
    }
