"""The record of submitted jobs, job.json, checked when it is read.

The job numbers are passed to SLURM commands. In a file received from others, a number could be an option instead.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shards.core.errors import ConfigError
from shards.core.files import trouble
from shards.core.settings import check

Number = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
Cluster = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,-]{0,250}$")]
_WHAT = "the record of submitted jobs, written by slim-brain slurm"


class Note(BaseModel):
    """A JSON object in a folder that others may write to."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


N = TypeVar("N", bound=Note)


class Jobs(Note):
    """Jobs that were submitted.

    Attributes
    ----------
    cluster : str or None
        The cluster that took them, if it is not the default one.
    command : list of str
        The command that submitted them.
    """

    cluster: Cluster | None = None
    command: list[str]


class RunJob(Jobs):
    """The job of a run."""

    job: Number
    log: str
    steps: int | None
    then: str


class DatasetJobs(Jobs):
    """The jobs of a conversion."""

    jobs: dict[str, Number]

    @field_validator("jobs")
    @classmethod
    def _ends(cls, jobs: dict[str, str]) -> dict[str, str]:
        if "pack" not in jobs:
            raise ValueError("job numbers, with that of the job `pack`")
        return jobs


def call(command: list[str]) -> str:
    """The call that submitted jobs, as it is typed again; version 0.1 noted the file alone."""
    return shlex.join((["python"] if command[:1] and command[0].endswith(".py") else []) + command)


class Attempt(Note):
    """A line of RUN/slurm/attempts.jsonl.

    Attributes
    ----------
    job : str
        Number of the job.
    event : str
    checkpoint : str or None
        The newest complete checkpoint of the run at that time.
    restart : int
        How often SLURM had requeued the job.
    time : float
        In seconds since the epoch.
    """

    event: Literal["began", "ended"] = "began"
    job: str
    checkpoint: str | None
    restart: int = 0
    time: float = 0.0


class Began(Attempt):
    """An attempt began.

    Attributes
    ----------
    nodes : str
        Nodes, as SLURM names them.
    processes : int
    """

    event: Literal["began"] = "began"
    nodes: str = ""
    processes: int = 0


class Ended(Attempt):
    """An attempt ended.

    Attributes
    ----------
    status : int
        Exit status of the job, if it is not requeued.
    why : str
    again : bool
        Whether the job is requeued.
    failed : bool
        Whether the attempt failed, and was not stopped.
    """

    event: Literal["ended"] = "ended"
    status: int
    why: str
    again: bool
    failed: bool


class TaskOutcome(Note):
    """How a job of a conversion ended: DATASET/work/slurm/outcome/NAME.json.

    Attributes
    ----------
    status : int
        Exit status.
    error : str
        What made it fail, in one line.
    failed : list of str
        For the last job: a line for each job that failed before it.
    facts, next : dict, str
        For the last job: summary of the conversion, and what to do next.
    """

    status: int
    error: str = ""
    failed: list[str] = []
    facts: dict[str, object] = {}
    next: str = ""


def read(path: Path, kind: type[N]) -> N:
    """Read the record of submitted jobs.

    Raises
    ------
    FileNotFoundError
        If no job was submitted.
    ConfigError
        If the file has other content.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    if found := trouble(path):
        raise ConfigError(path, "", found.got, _WHAT, found.hint)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        got = f"an unreadable file ({type(error).__name__})"
        raise ConfigError(path, "", got, _WHAT, "Submit the jobs again") from None
    return check(kind, tree, path)
