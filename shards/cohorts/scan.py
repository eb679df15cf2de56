"""One scan of a cohort: its files, and what is known about it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shards.core.errors import RunRefused
from shards.format.session_record import Labels


@dataclass(frozen=True)
class RunSource:
    """One BOLD scan on disk, before it is read."""

    cohort: str
    subject: str
    session: str
    task: str
    run: str
    bold: Path
    source: str  # `bold` relative to the cohort's root
    space: str | None  # None: unknown
    variant: str = ""  # further BIDS entities that distinguish scans, such as acq-mb3_dir-AP
    people: str = ""  # name of the population, shared by cohorts with the same subjects; empty: that of the cohort
    mask: Path | None = None
    confounds: Path | None = None
    orientation: str | None = None
    tr: float | None = None  # seconds, overrides the header
    dummy: Literal["auto"] | int = "auto"
    labels: Labels = field(default_factory=dict)
    stated: str = "in the cohort file"  # where the facts about the scan are given, for hints
    problem: RunRefused | None = None  # why it cannot be converted, if known from the name

    @property
    def key(self) -> str:
        """Key of the sample: unique in a dataset, without dots and slashes, at which WebDataset splits names."""
        named = (("ses", self.session), ("task", self.task), ("", self.variant), ("run", self.run))
        parts = [self.cohort, f"sub-{self.subject}"]
        parts += [f"{short}-{value}" if short else value for short, value in named if value]
        name = "_".join(parts)
        key = re.sub(r"[^A-Za-z0-9_-]", "-", name)
        if len(key) <= LONGEST_KEY:
            return key
        return f"{key[: LONGEST_KEY - 13]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"

    @property
    def says_mni(self) -> bool:
        """Whether the scan is in MNI space according to the cohort file or the BIDS name of the file."""
        return self.space == "MNI" or re.search(r"(^|_)space-MNI", self.bold.name) is not None

    @property
    def person(self) -> tuple[str, str]:
        """The subject: equal for the same subject in cohorts with the same `people`."""
        return self.people or self.cohort, self.subject


LONGEST_KEY = 180  # characters; file names made from a key stay below 255 bytes
