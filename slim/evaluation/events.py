"""The states of the windows of a scan, from its events: a BIDS table, or FSL's file of three columns for each state.

Events are shifted by the delay of the haemodynamic response. A window belongs to the trial type with the largest
overlap, if its events cover half of the window, or half of their length lies in the window. Otherwise, and if two types
have the same overlap, the window has no state.

Legend: W windows; E events.
"""

from __future__ import annotations

from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, field_validator, model_validator

from shards.core import tables
from shards.core.errors import ConfigError
from shards.core.files import trouble
from shards.core.settings import Contradiction, PathText, Settings, Unit
from shards.format.session_record import SessionRecord

if TYPE_CHECKING:
    import pandas as pd

FIELDS = ("subject", "session", "task", "run")
STATE = "{state}"  # in the name of a file: each state has a file of its own
_COLUMNS = "three numbers in each line: onset, duration, weight"


class EventSettings(Settings):
    """Where the tables are and how they are read."""

    path: PathText = Field(
        description="path of the table of a scan in the folder of events; {subject}, {session}, {task}, {run}. With "
        "{state} in the file's name: FSL's files of three columns, one for each state in `keep`"
    )
    root: PathText | None = Field(None, description="folder of events, relative to the task's file; or --events FOLDER")
    column: str = Field("trial_type", description="column with the states")
    keep: tuple[str, ...] = Field((), description="states to decode; by default all")
    delay: Annotated[float, Unit("s")] = Field(
        5.0, ge=0, le=15, description="delay from an event to the peak of its response"
    )

    @field_validator("path")
    @classmethod
    def _has_known_fields(cls, value: str) -> str:
        try:
            fields = [field for field in Formatter().parse(value) if field[1] is not None]
        except ValueError:  # braces that do not match
            fields = [("", "", "", "")]
        # a width, as in {subject:>9}, could make very long paths
        known = (*FIELDS, "state")
        if any(name not in known or width or conversion for _, name, width, conversion in fields):
            raise ValueError(f"a path with {{{'}, {'.join(known)}}} and no other fields")
        if STATE in value.rpartition("/")[0]:
            raise ValueError(f"{STATE} in the name of the file alone, not in the names of its folders")
        return value

    @model_validator(mode="after")
    def _names_its_files(self) -> EventSettings:
        if self.has_files and not self.keep:
            raise Contradiction("keep", "nothing", f"the states, one for each file of {self.path}", "Add this key")
        return self

    @property
    def has_files(self) -> bool:
        """Whether each state has a file of its own."""
        return STATE in self.path


def read(settings: EventSettings, root: Path, session: SessionRecord, where: str | Path) -> pd.DataFrame:
    """Read the events of a session: onset and end (in s from the start of the harmonised scan), and state.

    Raises
    ------
    ConfigError
        If a table, its column, or the folder of the states' files is missing, or an onset or duration is not a number.
    """
    import pandas as pd  # takes half a second to import

    if settings.has_files:
        onset_E, length_E, state_E = _of_files(settings, root, session, where)
    else:
        onset_E, length_E, state_E = _of_table(settings, _path(settings, root, session), session.key, where)
    onset_E = onset_E - (session.dropped_frames or 0) * session.source_tr
    found = pd.DataFrame({"onset": onset_E, "end": onset_E + length_E, "state": pd.Series(state_E, dtype=object)})
    found = found.dropna(subset=["onset", "state"])
    return found[found["state"].isin(settings.keep)] if settings.keep else found


def has_events(settings: EventSettings, root: Path, session: SessionRecord) -> bool:
    """Whether there is a table of the events of a session, or the folder of its states' files."""
    path = _path(settings, root, session)
    return path.parent.is_dir() if settings.has_files else path.is_file() or path.is_symlink()


def _path(settings: EventSettings, root: Path, session: SessionRecord, state: str = "") -> Path:
    """The table of a session, or the file of a state."""
    return root / settings.path.format(**{name: getattr(session, name) for name in FIELDS}, state=state)


def _of_table(
    settings: EventSettings, path: Path, key: str, where: str | Path
) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """Onsets, durations (s) and states in a BIDS table."""
    if not (path.is_file() or path.is_symlink()):
        raise ConfigError(where, "events.path", f"no file {path}", f"the events of {key}", "Give --events FOLDER")
    table = tables.read(path, "a BIDS table of events")
    for column in ("onset", "duration", settings.column):
        if column not in table:
            raise ConfigError(path, column, f"columns {', '.join(table.columns)}", f"a column {column}")
    return table.numbers("onset"), np.nan_to_num(table.numbers("duration")), table.texts(settings.column)


def _of_files(
    settings: EventSettings, root: Path, session: SessionRecord, where: str | Path
) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """Onsets, durations (s) and states in FSL's files. A state without a file did not occur in the scan."""
    rows: list[tuple[float, float]] = []
    state_E: list[str | None] = []
    for state in settings.keep:
        path = _path(settings, root, session, state)
        if not path.parent.is_dir():
            got, expected = f"no folder {path.parent}", f"the events of {session.key}"
            raise ConfigError(where, "events.path", got, expected, "Give --events FOLDER")
        if path.is_file() or path.is_symlink():
            of_state = _three_columns(path)
            rows += of_state
            state_E += [state] * len(of_state)
    onset_E, length_E = np.array(rows, float).reshape(-1, 2).T
    return onset_E, length_E, state_E


def _three_columns(path: Path) -> list[tuple[float, float]]:
    """Onset and duration of each line; lines with weight 0 stand for no event."""
    if path.is_file() and not path.stat().st_size:
        return []
    if found := trouble(path):
        raise ConfigError(path, "", found.got, _COLUMNS, found.hint)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            onset, duration, weight = map(float, words)
        except ValueError:
            raise ConfigError(path, f"line {number}", line.strip()[:80], _COLUMNS, "Correct the file") from None
        if weight:
            rows.append((onset, duration))
    return rows


def states(events: pd.DataFrame, start_W: np.ndarray, seconds: float, delay: float) -> list[str | None]:
    """The state of each window.

    Parameters
    ----------
    events : DataFrame
        Result of `read`.
    start_W : float array
        Start of each window, in s.
    seconds : float
        Length of a window, in s.
    delay : float
        Delay of the haemodynamic response, in s.
    """
    onset_E, end_E = events["onset"].to_numpy() + delay, events["end"].to_numpy() + delay
    state_E = events["state"].to_numpy()
    names = np.unique(state_E)
    found: list[str | None] = []
    for start in start_W:
        # Events with duration 0 are counted with a tenth of a second.
        length_E = np.maximum(end_E - onset_E, 0.1)
        overlap_E = np.minimum(onset_E + length_E, start + seconds) - np.maximum(onset_E, start)
        covers_E = overlap_E >= 0.5 * np.minimum(length_E, seconds) - 1e-9
        share = [overlap_E[(state_E == name) & covers_E].sum() for name in names]
        best = int(np.argmax(share)) if len(names) else 0
        clear = len(names) > 0 and share[best] > 0 and sum(value == share[best] for value in share) == 1
        found.append(str(names[best]) if clear else None)
    return found
