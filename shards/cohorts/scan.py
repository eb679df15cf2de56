"""One scan of a cohort: where its files are, and what is known of it."""

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
    """One BOLD run as it lies on disk, before anything of it is read."""

    cohort: str
    subject: str
    session: str
    task: str
    run: str
    bold: Path
    source: str  # `bold` relative to the cohort's root
    space: str | None  # None: not stated
    variant: str = ""  # what else tells runs apart in BIDS, such as acq-mb3_dir-AP
    people: str = ""  # whose subjects they are; the cohort's own where empty
    mask: Path | None = None
    confounds: Path | None = None
    orientation: str | None = None
    tr: float | None = None  # seconds, overrides the header
    dummy: Literal["auto"] | int = "auto"
    labels: Labels = field(default_factory=dict)
    stated: str = "in the cohort file"  # where what is said of the run is written, for hints
    problem: RunRefused | None = None  # why it cannot be converted, where its name alone tells

    @property
    def key(self) -> str:
        """The sample's key: unique in a dataset, free of dots and slashes (WebDataset splits names there)."""
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
        """Whether the cohort file, or the name of the file as BIDS has it, says that the run is in MNI space."""
        return self.space == "MNI" or re.search(r"(^|_)space-MNI", self.bold.name) is not None

    @property
    def person(self) -> tuple[str, str]:
        """Who was scanned: equal for the same subject of cohorts that share people."""
        return self.people or self.cohort, self.subject


LONGEST_KEY = 180  # characters: names of files made of a key stay below 255 bytes
