"""Findings about a dataset or a run. Pages and commands show them, and decide by their severity and kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["good", "look", "bad"]


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes
    ----------
    kind : str
        Subject of the finding, such as `rank`.
    severity : "good", "look" or "bad"
        Nothing wrong; worth a look; something wrong.
    text : str
        Text for the user. No decision depends on it.
    """

    kind: str
    severity: Severity
    text: str


def good(kind: str, text: str) -> Finding:
    """A finding that nothing is wrong."""
    return Finding(kind, "good", text)


def look(kind: str, text: str) -> Finding:
    """A finding that is worth a look."""
    return Finding(kind, "look", text)


def bad(kind: str, text: str) -> Finding:
    """A finding that something is wrong."""
    return Finding(kind, "bad", text)
