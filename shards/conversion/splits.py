"""Divide subjects into training, validation and test sets. No subject and no family is in two of them.

The splits are stored in `splits.tsv` of the dataset and kept: scans or subjects added later do not change them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from shards.cohorts.scan import RunSource
from shards.core import files
from shards.core.errors import ConfigError, DatasetError, RunRefused
from shards.core.settings import Contradiction, Settings, Unit
from shards.format import layout

SPLITS = ("train", "val", "test")
_COLUMNS = ["people", "subject", "split"]
_BINS = 5  # strata of a column of numbers
_VALUES = 10  # columns with more different numbers are divided into bins

Person = tuple[str, str]  # people, subject


class DatasetSplitSettings(Settings):
    """How subjects are divided. `stratify`, `family` and `column` are columns of the participants table."""

    seed: int = Field(0, description="seed of the division of subjects")
    shares: Annotated[tuple[float, float, float], Unit("share")] = Field(
        (0.7, 0.1, 0.2), description="shares of the subjects for training, validation and test"
    )
    stratify: str | None = Field(
        None,
        description="column of the participants table: subjects with each value (numbers: each fifth) are divided in "
        "the same shares",
    )
    family: str | None = Field(
        None, description="column of the participants table: subjects with the same value stay together"
    )
    column: str | None = Field(
        None, description="column of the participants table that holds the split (train, val or test), instead"
    )

    @model_validator(mode="after")
    def _consistent(self) -> DatasetSplitSettings:
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            got = f"{list(self.shares)}, in all {sum(self.shares):g}"
            raise Contradiction("shares", got, "shares of 0 or more that add up to 1")
        if self.column and (self.stratify or self.family):
            other = "stratify" if self.stratify else "family"
            expected = f"null: the split is read from the column {self.column}"
            raise Contradiction(other, getattr(self, other), expected, f"Remove column or {other}")
        return self


def assign(
    runs: Iterable[RunSource], settings: DatasetSplitSettings, settled: Mapping[Person, str]
) -> tuple[dict[Person, str], dict[Person, RunRefused]]:
    """Assign every scanned subject to a split.

    Parameters
    ----------
    runs : iterable of RunSource
    settings : DatasetSplitSettings
    settled : mapping of person to split
        The stored splits.

    Returns
    -------
    splits : dict of person to "train", "val" or "test"
        Including all subjects in `settled`.
    torn : dict of person to RunRefused
        Subjects with different values in their sessions, which would be in two splits.

    Raises
    ------
    ConfigError
        If a column does not exist.
    DatasetError
        If the stored splits have a family in two splits, or contradict `settings.column`.
    """
    by_person: dict[Person, list[RunSource]] = defaultdict(list)
    for run in runs:
        by_person[run.person].append(run)
    torn: dict[Person, RunRefused] = {}

    def values(column: str | None, field: str) -> dict[Person, Any]:
        """The value of a column for every subject, None if it is empty."""
        result: dict[Person, Any] = {}
        for person, own in by_person.items():
            if column is None:
                continue
            for run in own:
                if column not in run.labels:
                    got = f"no label {column} for subject {run.subject}"
                    raise ConfigError(run.source, f"split.{field}", got, "a column of the participants table")
            found = {run.labels[column] for run in own}
            result[person] = own[0].labels[column]
            if len(found) > 1:
                what = " and ".join(sorted(map(str, found)))
                hint = "Give all sessions of a subject the same value"
                torn[person] = RunRefused(own[0].source, column, f"{what} for subject {person[1]}", "one value", hint)
        return result

    if settings.column:
        given = {person: _split_of(value) for person, value in values(settings.column, "column").items()}
        for person, split in given.items():
            if split is None and person not in torn:
                run = by_person[person][0]
                got = f"{run.labels[settings.column]} for subject {run.subject}"
                torn[person] = RunRefused(run.source, settings.column, got, "train, val or test", "Correct the table")
            if person not in torn and settled.get(person, split) != split:
                raise DatasetError(
                    layout.SPLITS_TABLE,
                    settings.column,
                    f"{split} for subject {person[1]}",
                    f"{settled[person]}, as in the dataset's splits.tsv",
                    "Restore the table, or give another --out",
                )
        return {**settled, **{person: split for person, split in given.items() if split and person not in torn}}, torn

    strata = values(settings.stratify, "stratify")
    families = values(settings.family, "family")
    bins = _bins(strata)
    labels = {person: str(bins.get(person, "")) for person in by_person if person not in torn}
    return split_people(labels, settings.shares, settings.seed, families, settled), torn


def _split_of(value: Any) -> str | None:
    word = str(value).strip().lower()
    word = {"validation": "val", "valid": "val", "training": "train", "testing": "test"}.get(word, word)
    return word if word in SPLITS else None


def _bins(values: Mapping[Person, Any]) -> dict[Person, Any]:
    """The values, or for columns with many different numbers the fifth to which each belongs."""
    import pandas as pd  # takes half a second to import

    numbers = pd.Series({p: v for p, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)})
    if numbers.nunique() <= _VALUES:
        return dict(values)
    fifths = np.ceil(numbers.rank(pct=True, method="max") * _BINS).astype(int)
    return {**values, **fifths.to_dict()}


def split_people(
    strata: Mapping[Person, str],
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    families: Mapping[Person, Any] | None = None,
    settled: Mapping[Person, str] | None = None,
) -> dict[Person, str]:
    """Divide subjects by strata and families.

    Families (a subject without a family is one) are sorted by size, the largest first, and in an order that depends
    only on the seed and their names. Each family is assigned to the split that is furthest below its share. In a tie,
    it is assigned to the training split, which is therefore never empty. Deviations in one stratum are compensated in
    the next stratum of the same population, so the shares hold within strata and in total.

    Parameters
    ----------
    strata : mapping of person to str
        The stratum of each subject. A family belongs to the stratum of its first member.
    shares : three floats
        Shares of train, validation and test; their sum is 1.
    seed : int
    families : mapping of person to anything, optional
        Subjects with the same value (None: no family) stay together.
    settled : mapping of person to split, optional
        Subjects that keep their split, also if they are not in `strata`.

    Returns
    -------
    dict of person to "train", "val" or "test"

    Raises
    ------
    DatasetError
        If `settled` has a family in two splits.
    """
    result = dict(settled or {})
    members: dict[tuple[str, str], list[Person]] = defaultdict(list)
    for person in sorted(strata):
        family = (families or {}).get(person)
        members[(person[0], f"family {family}") if family is not None else person].append(person)
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name, family_members in members.items():
        groups[name[0], strata[family_members[0]]].append(name)
    short_of: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])  # subjects missing from each split
    for stratum in sorted(groups):
        size = sum(len(members[name]) for name in groups[stratum])
        behind = short_of[stratum[0]]
        behind[:] = [short + share * size for short, share in zip(behind, shares, strict=True)]
        waiting = []
        for name in groups[stratum]:
            known = {result[person] for person in members[name] if person in result}
            if len(known) > 1:
                got = f"{' and '.join(sorted(known))} for {name[1]}"
                hint = "Restore the participants table, or give another --out"
                raise DatasetError(layout.SPLITS_TABLE, "split", got, "every family in one split", hint)
            if known:
                _put(members[name], known.pop(), result, behind)
            else:
                waiting.append(name)
        for name in sorted(waiting, key=lambda name: (-len(members[name]), _order(seed, *name))):
            furthest = max(range(3), key=lambda split: (round(behind[split], 9), -split))
            _put(members[name], SPLITS[furthest], result, behind)
    return result


def _put(people: list[Person], split: str, result: dict[Person, str], behind: list[float]) -> None:
    behind[SPLITS.index(split)] -= len(people)
    result.update(dict.fromkeys(people, split))


def _order(seed: int, *name: str) -> str:
    return hashlib.sha256("/".join([str(seed), *name]).encode()).hexdigest()


def read_table(folder: Path) -> dict[Person, str]:
    """Read the splits from `splits.tsv` of a dataset; empty if the file does not exist.

    Raises
    ------
    DatasetError
        If the table is damaged.
    """
    path = folder / layout.SPLITS_TABLE
    if not path.is_file():
        return {}
    try:
        header, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise DatasetError(path, "", f"unreadable ({error})", f"columns {', '.join(_COLUMNS)}", "Restore it") from None
    if header != _COLUMNS or any(len(row) != len(_COLUMNS) or row[2] not in SPLITS for row in rows):
        raise DatasetError(path, "", "other columns or splits", f"columns {', '.join(_COLUMNS)}", "Restore it")
    return {(people, subject): split for people, subject, split in rows}


def write_table(folder: Path, splits: Mapping[Person, str]) -> None:
    """Write the splits to `splits.tsv`."""
    lines = ["\t".join(_COLUMNS), *("\t".join([*person, split]) for person, split in sorted(splits.items()))]
    files.write_atomically(folder / layout.SPLITS_TABLE, "".join(f"{line}\n" for line in lines))
