"""How a process of a run ended, as it notes it in JSON for the launcher: OUTCOME/RANK.json."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from slim.training.result import TrainingResult


class Outcome(BaseModel):
    """How a process ended.

    Attributes
    ----------
    status : int
        Exit status.
    ended : float
        When, in seconds since the epoch.
    result : TrainingResult or None
        How far it came, if nothing failed.
    error : str
        A mistake of the user's, or an unexpected failure, in one line.
    stopped, then : str
        What stopped it, and how to continue.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    status: int
    ended: float = 0.0
    result: TrainingResult | None = None
    error: str = ""
    stopped: str = ""
    then: str = ""

    def write(self, path: Path) -> None:
        """Write it, unless the launcher and its folder are gone."""
        if path.parent.is_dir():
            path.write_text(self.model_dump_json(), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, rank: int) -> Outcome | None:
        """That of a process; None if it has not ended, or was killed before it could write it."""
        try:
            return cls.model_validate_json((folder / f"{rank}.json").read_bytes())
        except (OSError, ValidationError):
            return None
