"""Labels of subjects and sessions, from the participants table of a cohort.

A subject is looked up by name. If spreadsheet software removed or added zeros (0050002, 50002, 50002.0), it is looked
up by number, provided that no other subject in the table or the scans has that number. Subjects that are not found have
no labels, and are listed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.cohorts.patterns import glob_regex, listed
from shards.core import tables
from shards.core.errors import ConfigError
from shards.core.files import printable
from shards.format.session_record import Labels

if TYPE_CHECKING:
    from shards.cohorts.cohort_file import CohortSettings

SUBJECT_COLUMNS = ("participant_id", "subject", "Subject", "SUB_ID", "subject_id")
SESSION_COLUMNS = ("session_id", "session", "ses")
# Names of columns, in lower case without punctuation, that identify persons (HIPAA safe harbor identifiers).
_PRIVATE = re.compile(
    r"(first|last|sur|fore|full|given|family|maiden|middle|patient|subject|participant)?names?|initials"
    r"|.*(birthdate|birthday|birthplace|dateofbirth)|dob|(home|street|postal|mailing)?address(line)?\d*|street"
    r"|(zip|post|postal)(code)?|(tele|home|mobile|cell)?phone(number|no)?|mobile|fax(number)?|e?mail(address)?"
    r"|mrn|ssn|.*(medicalrecord|socialsecurity|passport|insurance)(number|no|id)?"
)
_NUMBER = re.compile(r"(\d+)(\.0*)?")


class Participants:
    """Labels by subject, or by subject and session.

    Parameters
    ----------
    path : Path
        The cohort file.
    cohort : CohortSettings
    root : Path
    scanned : iterable of (subject, session)
        The subjects and sessions that were scanned. A subject is found by number only if the number is unique.
    needed : collection of str
        Columns that are kept regardless of `labels` in the cohort file.

    Raises
    ------
    ConfigError
        If the table is missing or unreadable, has no column of subjects, or has different rows for one subject (and
        session).
    """

    def __init__(
        self,
        path: Path,
        cohort: CohortSettings,
        root: Path,
        scanned: Iterable[tuple[str, str]],
        needed: Collection[str] = (),
    ):
        self._rows: dict[str, dict[str, Labels]] = defaultdict(dict)  # rows by subject, then by session
        self._scanned = sorted(set(scanned))
        self._sessions: dict[str, set[str]] = defaultdict(set)  # scanned sessions, by subject
        for subject, session in self._scanned:
            self._sessions[subject].add(session)
        self._table: tables.TableFile | None = None
        self._private: list[str] = []
        if cohort.participants is None:
            return
        places = (path.parent / cohort.participants, root / cohort.participants)
        table_path = next((place for place in places if place.is_file() or place.is_symlink()), None)
        if table_path is None:
            got = f"{cohort.participants}, which is not a file"
            raise ConfigError(path, "participants", got, "a table in the folder of this file or under root")
        self._table = table = tables.read(table_path, "a table separated by tabs or commas")
        column = _subject_column(table, path, cohort)
        sessions = next((name for name in SESSION_COLUMNS if name in table and name != column), None)
        columns = [name for name in table.columns if name and name != column]
        names = self._chosen(columns, cohort.labels, needed)
        values = {name: table.texts(name) if name == sessions else table.values(name) for name in names}
        session_of = table.texts(sessions) if sessions else [None] * len(table)
        for row, text in enumerate(table.texts(column)):
            if text is None:
                got = f"no subject in line {table.lines[row]}"
                hint = "Add the missing subject, or remove the line"
                raise ConfigError(table_path, column, got, "a subject in every line", hint)
            subject = text.removeprefix("sub-")
            session = (session_of[row] or "").removeprefix("ses-")
            labels = {name: values[name][row] for name in names}
            if self._rows[subject].setdefault(session, labels) != labels:
                who = f"{subject}, session {session}" if session else subject
                got = f"two different rows for {who} (the second is line {table.lines[row]})"
                raise ConfigError(table_path, column, got, "one row per subject", "Keep one of them")
        subjects = {subject for subject, _ in self._scanned}
        self._named = _matched(subjects, self._rows)

    def _chosen(self, columns: list[str], wanted: tuple[str, ...] | None, needed: Collection[str]) -> list[str]:
        """The columns that are kept as labels."""
        assert self._table is not None
        if wanted is None:
            self._private = [name for name in columns if _is_private(name) and name not in needed]
            return [name for name in columns if name not in self._private]
        patterns = [glob_regex(text) for text in wanted]
        for text, pattern in zip(wanted, patterns, strict=True):
            if not any(pattern.fullmatch(name) for name in columns):
                got = f"no column {printable(text)} among {listed(columns)}"
                raise ConfigError(self._table.path, "header", got, "every column of `labels`", "Correct `labels`")
        return [name for name in columns if name in needed or any(p.fullmatch(name) for p in patterns)]

    def labels(self, subject: str, session: str) -> Labels:
        """The row of a subject's session; empty where there is none.

        If the table has no sessions, or has one row for a subject and the scan has no session, the subject's row is
        used.
        """
        rows = self._row_of(subject)
        name = self._session_of(subject, session)
        return rows[name] if name is not None else {}

    def notes(self) -> list[str]:
        """Notes on subjects without a row, subjects found by number, and rows without a scan."""
        if self._table is None:
            return []
        name = self._table.path.name
        without = [subject for subject in self._subjects() if self._named[subject] is None]
        by_number = [f"{s} for {self._named[s]}" for s in self._subjects() if self._named[s] not in (None, s)]
        no_session = [
            f"{subject} {session or '(none)'}"
            for subject, session in self._scanned
            if self._named[subject] is not None and self._session_of(subject, session) is None
        ]
        unused = sorted(self._rows.keys() - {found for found in self._named.values() if found is not None})
        found = []
        if self._private:
            what = f"{listed(self._private)}; list them in `labels` to keep them"
            found.append(f"columns of {name} that look like personal data are left out: {what}")
        if without:
            found.append(f"no row in {name}, so no labels, for {len(without)} subjects: {listed(without)}")
        if no_session:
            found.append(
                f"no row in {name} for the session, so no labels, for {len(no_session)} scans: {listed(no_session)}"
            )
        if by_number:
            found.append(f"found in {name} by number, because no name is equal: {listed(by_number)}")
        if unused:
            found.append(f"rows of {name} without a scan: {len(unused)} subjects ({listed(unused)})")
        return found

    def _subjects(self) -> list[str]:
        return sorted({subject for subject, _ in self._scanned})

    def _row_of(self, subject: str) -> Mapping[str, Labels]:
        found = self._named.get(subject) if self._table is not None else None
        return self._rows[found] if found is not None else {}

    def _session_of(self, subject: str, session: str) -> str | None:
        """The session in the table that a session of the scans belongs to."""
        rows = self._row_of(subject)
        if session in rows:
            return session
        if list(rows) == [""]:  # the table has no sessions, at least not for this subject
            return ""
        if not session:
            return next(iter(rows)) if len(rows) == 1 else None
        return _matched({session, *self._sessions[subject]}, rows)[session]


def _is_private(column: str) -> bool:
    """Whether a column identifies persons, judged from its name."""
    return _PRIVATE.fullmatch(re.sub(r"[\W_]", "", column).lower()) is not None


def _matched(names: set[str], rows: Mapping[str, Any]) -> dict[str, str | None]:
    """The row of each name: the row with this name, or with the same number if the number is unique."""
    same = Counter(map(_number, names))
    rows_of: dict[int | None, list[str]] = defaultdict(list)
    for row in rows:
        rows_of[_number(row)].append(row)
    found: dict[str, str | None] = {}
    for name in names:
        number = _number(name)
        alone = number is not None and same[number] == 1 and len(rows_of[number]) == 1
        found[name] = name if name in rows else rows_of[number][0] if alone else None
    return found


def _number(name: str) -> int | None:
    match = _NUMBER.fullmatch(name)
    return int(match.group(1)) if match and len(match.group(1)) < 20 else None


def _subject_column(table: tables.TableFile, path: Path, cohort: CohortSettings) -> str:
    wanted = (cohort.subject_column,) if cohort.subject_column else SUBJECT_COLUMNS
    column = next((name for name in wanted if name in table), None)
    if column is None:
        got = f"columns {', '.join(map(printable, table.columns[:20]))}"
        hint = f"Set `subject_column` in {path.name} to the column with the subjects"
        raise ConfigError(table.path, "header", got, f"a column {cohort.subject_column or 'participant_id'}", hint)
    return column
