"""The states of the windows of a scan, from BIDS tables of events.

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
from pydantic import Field, field_validator

from shards.core import tables
from shards.core.errors import ConfigError
from shards.core.settings import PathText, Settings, Unit
from shards.format.session_record import SessionRecord

if TYPE_CHECKING:
    import pandas as pd

FIELDS = ("subject", "session", "task", "run")


class EventSettings(Settings):
    """Where the tables are and how they are read."""

    path: PathText = Field(
        description="path of the table of a scan in the folder of events; {subject}, {session}, {task}, {run}"
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
        if any(name not in FIELDS or width or conversion for _, name, width, conversion in fields):
            raise ValueError(f"a path with {{{'}, {'.join(FIELDS)}}} and no other fields")
        return value


def read(settings: EventSettings, root: Path, session: SessionRecord, where: str | Path) -> pd.DataFrame:
    """Read the events of a session: onset and end (in s from the start of the harmonised scan), and state.

    Raises
    ------
    ConfigError
        If the table or a column is missing, or an onset or duration is not a number.
    """
    path = root / settings.path.format(**{name: getattr(session, name) for name in FIELDS})
    import pandas as pd  # takes half a second to import

    if not (path.is_file() or path.is_symlink()):
        raise ConfigError(
            where, "events.path", f"no file {path}", f"the events of {session.key}", "Give --events FOLDER"
        )
    table = tables.read(path, "a BIDS table of events")
    for column in ("onset", "duration", settings.column):
        if column not in table:
            raise ConfigError(path, column, f"columns {', '.join(table.columns)}", f"a column {column}")
    dropped_s = (session.dropped_frames or 0) * session.source_tr
    onset_E = table.numbers("onset") - dropped_s
    length_E = np.nan_to_num(table.numbers("duration"))
    found = pd.DataFrame({"onset": onset_E, "end": onset_E + length_E, "state": table.texts(settings.column)})
    found = found.dropna(subset=["onset", "state"])
    return found[found["state"].isin(settings.keep)] if settings.keep else found


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
