"""The report of probes as it stands in a file: its parts are checked before they are added to or shown.

It may hold more: other versions add facts, and what is no method or metric is not shown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from shards.core.errors import ConfigError
from shards.core.files import trouble
from shards.core.settings import check

Number = Annotated[float, Field(strict=True, ge=-1e12, le=1e12)]
# A name stands in a picture, whose text has a syntax of its own.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.()+-]{0,79}$")]
Count = Annotated[StrictInt, Field(ge=0, le=10**12)]
_MOST = 100  # methods of a task, metrics of a method


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Cell(_Part):
    value: Number | None
    low: Number | None = None
    high: Number | None = None
    p: Number | None = None

    @model_validator(mode="after")
    def _has_both_ends(self) -> _Cell:
        if (self.low is None) != (self.high is None):
            raise ValueError("both ends of an interval, or none")
        return self


Cells = dict[Name, Annotated[dict[Name, _Cell], Field(max_length=_MOST)]]


class _Split(_Part):
    kind: StrictStr | None = None
    folds: Count | None = None
    repeats: Count | None = None

    @model_validator(mode="after")
    def _is_counted(self) -> _Split:
        if self.kind == "folds" and (self.folds is None or self.repeats is None):
            raise ValueError("folds and repeats of a split by folds")
        return self


class _Facts(_Part):
    type: StrictStr | None = None
    label: StrictStr | None = None
    pooling: StrictStr | None = None
    split: _Split | None = None
    subjects: Count | None = None
    test_subjects: Count | None = None
    subjects_seen_in_pretraining: Count | None = None
    seeds: list[Any] | StrictInt | None = None
    classes: dict[str, Any] | list[Any] | None = None
    chance: dict[str, Number | None] | None = None
    differences: Annotated[Cells, Field(max_length=_MOST)] = {}


class _Report(_Part):
    tasks: dict[str, Annotated[Cells, Field(max_length=_MOST)]]
    facts: dict[str, _Facts] = {}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The `tasks` and `facts` of a report as they stand in the file.

    Raises
    ------
    ConfigError
        If the file is no report.
    """
    hint = "Move it away, or run the probe again"
    if found := trouble(path):
        raise ConfigError(path, "", found.got, "a report.json that probe.py wrote", found.hint)
    try:
        report = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        got = f"what cannot be read ({type(error).__name__}: {error})"
        raise ConfigError(path, "", got, "a report.json that probe.py wrote", hint) from None
    if not isinstance(report, dict) or not isinstance(report.get("tasks"), dict):
        raise ConfigError(path, "", "no report of probes", "a report.json that probe.py wrote", hint)
    check(_Report, {**report, "tasks": {name: _measured(task) for name, task in report["tasks"].items()}}, path)
    return {part: dict(report.get(part) or {}) for part in ("tasks", "facts")}


def _measured(task: Any) -> Any:
    """The cells of a task that hold a value: all that is shown of it."""
    if not isinstance(task, dict):
        return task
    methods = {name: cells for name, cells in task.items() if isinstance(cells, dict)}
    return {
        name: {metric: cell for metric, cell in cells.items() if isinstance(cell, dict) and "value" in cell}
        for name, cells in methods.items()
    }
