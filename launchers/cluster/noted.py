"""The record of submitted jobs, job.json, checked when it is read.

The job numbers are passed to SLURM commands. In a file received from others, a number could be an option instead.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shards.core.errors import ConfigError
from shards.core.files import trouble
from shards.core.settings import check

Number = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
Cluster = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,-]{0,250}$")]
_WHAT = "the record of submitted jobs, written by slim-brain slurm"


class _Noted(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    cluster: Cluster | None = None
    command: list[str]


class RunJob(_Noted):
    """The job of a run."""

    job: Number
    log: str
    steps: int | None
    then: str


class DatasetJobs(_Noted):
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


def read(path: Path, kind: type[RunJob | DatasetJobs]) -> dict[str, Any]:
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
    check(kind, tree, path)
    return tree
