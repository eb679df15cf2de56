"""What was explained of a task: RUN/report/explain/TASK.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shards.core.errors import ConfigError
from shards.core.files import dump, write_atomically
from shards.core.findings import Finding, good, look
from shards.core.settings import check
from shards.reporting import html

Start = Literal["still", "empty"]  # of the path: see `slim.explain.integrated_gradients`


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Place(_Part):
    """A place of the brain whose voxels have large shares: mm (x, y, z), and the size of a share there."""

    mm: tuple[float, float, float]
    value: float


class WindowShares(_Part):
    """A kept window: start (s), saliency, mean size of the shares of its brain voxels, and their sum."""

    start_s: float
    saliency: float
    mean_absolute: float
    sum: float


class SessionShares(_Part):
    """A session whose score was taken apart.

    Attributes
    ----------
    key, subject : str
    score, at_start : float
        At the session, and at the start of the path.
    sum : float
        Of all shares; `gap` is what it lacks, or has too much, of `score - at_start`.
    complete : bool
        Whether the gap is within the tolerance.
    points : int
        Of the path.
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


class Explanation(_Part):
    """What was explained, how, and what was found.

    Attributes
    ----------
    task, type, label, classes, pooling
        Of the task.
    score : str
        What is explained, in words.
    start, tolerance
        Of the path; see `slim.explain.integrated_gradients.integrated_gradients`.
    run, data, step, weights
        Where the features are from.
    space : "MNI" or "native"
        Of the maps.
    places : tuple of Place
        The largest first.
    sessions : tuple of SessionShares
        By key.
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
        """That in a file.

        Raises
        ------
        ConfigError
            If the file holds something else.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise unreadable(path, error) from None
        return check(cls, tree, path)

    def tree(self) -> dict[str, object]:
        """For JSON."""
        return self.model_dump(mode="json")

    def write(self, folder: Path) -> None:
        """To FOLDER/TASK.json."""
        write_atomically(folder / f"{self.task}.json", dump(self.tree()) + "\n")

    @property
    def incomplete(self) -> list[str]:
        """Keys of the sessions whose shares do not sum to the score within the tolerance."""
        return [session.key for session in self.sessions if not session.complete]

    def remarks(self) -> list[Finding]:
        """What to know before the maps are believed."""
        sessions, off = html.count(len(self.sessions), "session"), self.incomplete
        if off:
            return [
                look(
                    "completeness",
                    f"In {len(off)} of {sessions} the shares do not sum to the score within the tolerance, first "
                    f"{off[0]}: read those maps with care.",
                )
            ]
        return [
            good(
                "completeness",
                f"Complete: in {sessions} the shares of all voxels sum to the score less that at the start, within "
                f"{self.tolerance:.0%} of that difference or of the score's SD over people.",
            )
        ]


def unreadable(path: Path, error: Exception) -> ConfigError:
    """Of a file that should be one of an explanation, or a picture of it."""
    got = f"what cannot be read ({type(error).__name__}: {error})"
    return ConfigError(path, "", got, "what tools/explain.py wrote, with its pictures", "Run it again")
