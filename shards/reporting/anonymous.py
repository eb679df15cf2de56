"""Replace the names of people by numbers, for a page that leaves the laboratory."""

from __future__ import annotations

from collections.abc import Sequence

from shards.format.refusal import Refusal
from shards.format.session_record import SessionRecord

_HIDDEN = "hidden on this page"


def without_names(sessions: Sequence[SessionRecord]) -> list[SessionRecord]:
    """Sessions in the same order; keys and subjects are numbers, labels and file names are left out.

    A subject has the same number in all its sessions. Numbers follow the order of the sessions.
    """
    numbers: dict[tuple[str, str], int] = {}
    wide, found = len(str(len(sessions))), []
    for number, session in enumerate(sessions, 1):
        subject = numbers.setdefault((session.cohort, session.subject), len(numbers) + 1)
        hidden: dict[str, object] = {
            "key": f"session {number:0{wide}}",
            "subject": f"subject {subject:0{wide}}",
            "session": "",
            "source": "",
            "labels": {},
        }
        if session.mask_source not in (None, "computed"):
            hidden["mask_source"] = "a file"
        found.append(session.model_copy(update=hidden))
    return found


def without_files(refusals: Sequence[Refusal]) -> list[Refusal]:
    """Refusals in the same order; keys are numbers, and the reasons, which name files, are left out."""
    wide = len(str(len(refusals)))
    return [
        one.model_copy(update={"key": f"scan {number:0{wide}}", "source": "", "reason": _HIDDEN})
        for number, one in enumerate(refusals, 1)
    ]
