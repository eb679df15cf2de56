"""The table of all sessions on the page of a dataset, which `templates/sessions.js` sorts, filters and pages.

The page holds the rows as JSON, and the script makes elements of one page of the table only: thousands of sessions open
as fast as fifty. It is made of records alone; nothing is read from the shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from shards.format.grid import Grid
from shards.format.session_record import SessionRecord
from shards.reporting import html, pictures
from shards.reporting.distribution import MEASURES, RULE, Measure, Outlying
from shards.reporting.pictures import Drawn
from shards.reporting.session_facts import details

SCRIPT = "sessions.js"


@dataclass(frozen=True)
class SessionTable:
    """The table: texts above it, values of its filters, and the rows as JSON that is safe inside a script element."""

    intro: Sequence[str]
    cohorts: Sequence[str]
    splits: Sequence[str]
    rows: Markup


def make(sessions: Sequence[SessionRecord], grid: Grid, outlying: Outlying, drawn: Mapping[str, Drawn]) -> SessionTable:
    """Make the table. Outlying sessions come first, the worst at the top; then those with missing measures.

    Parameters
    ----------
    sessions : sequence of SessionRecord
    grid : Grid
        Grid of the dataset.
    outlying : Outlying
    drawn : mapping of str to Drawn
        The pictures of the drawn sessions.
    """
    recorded = [one for one in MEASURES if any(np.isfinite(one.of(session)) for session in sessions)]
    absent = [one.title for one in MEASURES if one not in recorded]
    place = {key: number for number, key in enumerate(outlying)}
    cohorts = list(dict.fromkeys(session.cohort for session in sessions))
    splits = list(dict.fromkeys(session.split for session in sessions))
    facts: dict[tuple[str, str], int] = {}  # many sessions share most of their facts
    rows = []
    for session in sessions:
        value = {one.field: one.of(session) for one in recorded}
        missing = sum(not np.isfinite(number) for number in value.values())
        known = [(name, str(words)) for name, words in details(session, grid).items()]
        row = {
            "key": session.key,
            "subject": session.subject,
            "cohort": cohorts.index(session.cohort),
            "split": splits.index(session.split),
            "values": [_rounded(number) for number in value.values()],
            "facts": [facts.setdefault(fact, len(facts)) for fact in known],
        }
        if session.key in outlying:
            row["far"] = {field: [far.side, far.words] for field, far in outlying[session.key].items()}
        if session.key in drawn:
            picture = drawn[session.key]
            row["picture"] = [picture.source, picture.caption, picture.width]
        rows.append((place.get(session.key, len(place)), -missing, row))
    rows.sort(key=lambda item: item[:2])  # stable: equal ones stay in the order of their keys
    tree = {
        "measures": [_column(one) for one in recorded],
        "cohorts": cohorts,
        "splits": splits,
        "facts": list(facts),
        "alt": pictures.alt(""),
        "rows": [row for *_, row in rows],
    }
    return SessionTable(_intro(sessions, absent, drawn), cohorts, splits, _json(tree))


def _intro(sessions: Sequence[SessionRecord], absent: Sequence[str], drawn: Mapping[str, Drawn]) -> list[str]:
    words = [
        "Outlying sessions come first, then those with missing measures. Click a column to sort by it, and a session "
        f"to see its facts and its picture. {RULE}"
    ]
    if absent:
        words.append(f"Recorded in no session, and not checked: {', '.join(absent)}.")
    if any(session.space == "native" for session in sessions):
        words.append("The overlap with the MNI152 brain is recorded only for scans in MNI space.")
    if len(drawn) < len(sessions):
        words.append(
            f"{len(drawn)} of {html.count(len(sessions), 'session')} have a picture. "
            "slim-brain report DATASET --pictures all draws all of them."
        )
    if any(not picture.source.startswith("#") for picture in drawn.values()):
        words.append(f"Some pictures are in the folder {pictures.FOLDER}/ beside this page: copy it with the page.")
    return words


def _column(measure: Measure) -> dict[str, str]:
    unit = f", {measure.unit}" if measure.unit else ""
    return {
        "field": measure.field,
        "short": measure.short,
        "title": measure.short + unit,
        "name": measure.title + unit,
        "bad": measure.bad,
    }


def _rounded(value: float) -> float | None:
    """Four digits, as elsewhere on the page; None where nothing was recorded."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _json(tree: object) -> Markup:
    """JSON in which no text can end the script element."""
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))
