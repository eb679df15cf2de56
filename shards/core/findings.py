"""What a look at a dataset or a run has found: pages and commands show it, and decide by its severity and kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["good", "look", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes
    ----------
    kind : str
        What it is about, such as `rank`; equal for findings of the same matter.
    severity : "good", "look" or "bad"
        As it should be; worth a look; wrong.
    text : str
        For people. No decision is taken from it.
    """

    kind: str
    severity: Severity
    text: str


def good(kind: str, text: str) -> Finding:
    """A finding that all is as it should be."""
    return Finding(kind, "good", text)


def look(kind: str, text: str) -> Finding:
    """A finding that is worth a look."""
    return Finding(kind, "look", text)


def bad(kind: str, text: str) -> Finding:
    """A finding of something wrong."""
    return Finding(kind, "bad", text)
