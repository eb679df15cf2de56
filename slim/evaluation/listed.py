"""Splits that are given, not drawn: by lists of subjects that somebody published, or by a column such as the site.

A file of lists is either a table with a row for each subject,

    subject   split
    sub-01    train
    sub-02    test

whose first column has the subjects and whose column `split` has the sides, or JSON,

    {"train": ["sub-01"], "validation": [], "test": ["sub-02"]}

`sub-` before a name is ignored. Sides may also be named `training`, `val`, `valid`, `dev` and `testing`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.conversion.splits import SPLITS
from shards.core import tables
from shards.core.errors import ConfigError, did_you_mean
from shards.format.session_record import SessionRecord
from slim.evaluation.labels import is_missing, refuse_lookalikes, word
from slim.evaluation.splits import TaskSplitSettings

Person = tuple[str, str]  # people, subject

_SIDES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_COLUMN = "split"
_LISTS = 'lists such as {"train": [...], "test": [...]}'


@dataclass(frozen=True)
class Groups:
    """The groups of the subjects of a dataset.

    Attributes
    ----------
    of_person : dict of person to str
        The side of each subject, for `listed`, or its value in the column, for `sites`. Others are left out.
    unscanned : int or None
        Number of subjects in the file of lists of which the dataset has no session; None without a file.
    """

    of_person: dict[Person, str]
    unscanned: int | None = None


def groups(
    settings: TaskSplitSettings, sessions: Sequence[SessionRecord], missing: Sequence[str], where: str | Path
) -> Groups:
    """Find the groups of the subjects of these sessions.

    Raises
    ------
    ConfigError
        If the file or column cannot be read, a side has another name, a subject has two sides or values, or two sites
        differ in their writing alone (NYU and nyu).
    """
    if settings.file is not None:
        sides = _of_file(Path(where).parent / settings.file)
        of_person = {s.person: sides[_bare(s.subject)] for s in sessions if _bare(s.subject) in sides}
        return Groups(of_person, len(sides.keys() - {_bare(s.subject) for s in sessions}))
    column = str(settings.column)
    found: dict[Person, str] = {}
    for session in sessions:
        value = session.fact(column)
        if is_missing(value, missing):
            continue
        text = word(value)
        if settings.kind == "listed":
            text = _side(text, where, "split.column")
        if found.setdefault(session.person, text) != text:
            got = f"{found[session.person]} and {text} for subject {session.subject}"
            raise ConfigError(where, "split.column", got, f"one {column} for each subject")
    if not found:
        got, expected = f"{column}, which no session has", "a column of the participants table"
        raise ConfigError(where, "split.column", got, expected)
    if settings.kind == "sites":
        refuse_lookalikes(found.values(), column, where, "split.column")
    return Groups(found)


def _of_file(path: Path) -> dict[str, str]:
    """The side of each subject in a file of lists."""
    pairs = _of_json(path) if path.suffix == ".json" else _of_table(path)
    sides: dict[str, str] = {}
    for subject, name in pairs:
        side = _side(name, path, _COLUMN)
        if sides.setdefault(_bare(subject), side) != side:
            raise ConfigError(path, subject, f"{sides[_bare(subject)]} and {side}", "one side for each subject")
    return sides


def _of_json(path: Path) -> list[tuple[str, str]]:
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, "", error.strerror, "a file of lists") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, "", f"invalid JSON ({error})", _LISTS) from None
    if not isinstance(tree, dict) or not all(isinstance(part, list) for part in tree.values()):
        raise ConfigError(path, "", "other JSON", _LISTS)
    return [(str(subject), name) for name, part in tree.items() for subject in part]


def _of_table(path: Path) -> list[tuple[str, str]]:
    table = tables.read(path, "a table of splits")
    if _COLUMN not in table:
        hint = did_you_mean(_COLUMN, table.columns)
        raise ConfigError(path, "", f"columns {', '.join(table.columns)}", f"a column {_COLUMN}", hint)
    subjects, sides = table.texts(table.columns[0]), table.texts(_COLUMN)
    return [(subject, side) for subject, side in zip(subjects, sides, strict=True) if subject and side]


def _side(name: str, where: str | Path, field: str) -> str:
    side = _SIDES.get(name.strip().lower())
    if side is None:
        raise ConfigError(where, field, name, "train, validation or test")
    assert side in SPLITS
    return side


def _bare(subject: str) -> str:
    return subject.strip().removeprefix("sub-")
