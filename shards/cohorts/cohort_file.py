"""Cohort files, and the scans they find: BIDS derivatives, or file patterns with named fields.

A cohort file (YAML) says where the scans are and what is known about them. `find_runs` lists the scans; it reads only
file names and the participants table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr, field_validator

from shards.cohorts import bids, patterns
from shards.cohorts.participants import Participants
from shards.cohorts.patterns import FIELDS, pattern_regex
from shards.cohorts.scan import RunSource
from shards.core.errors import ConfigError, RunRefused
from shards.core.files import printable
from shards.core.settings import PathText, Settings, Unit, load
from shards.format.session_record import Labels

__all__ = ["FIELDS", "Cohort", "CohortSettings", "RunSource", "find_cohort", "find_runs", "pattern_regex"]

_LISTED = 10  # number of names in a note

Label = StrictStr | StrictInt
Filter = Label | tuple[Label, ...] | None


class CohortSettings(Settings):
    """A cohort file. Relative paths are relative to it."""

    name: str = Field(pattern=r"^[A-Za-z0-9-]+$", description="short name, part of every sample's key")
    root: PathText = Field(description="folder of the runs")
    layout: Literal["bids", "pattern"] = Field("bids", description="bids: BIDS derivatives; pattern: any other layout")
    pattern: PathText | None = Field(None, description="layout: pattern; {subject} is required, globs allowed")
    mask: PathText | None = Field(
        None, description="a pattern or one file; absent: found beside a BIDS run, else computed"
    )
    confounds: PathText | None = Field(None, description="a pattern; absent: found beside a BIDS run")
    space: Literal["MNI", "native"] | None = Field(
        None, description="absent: MNI, if header and brain agree; native: centred by the mask"
    )
    orientation: str | None = Field(None, description="axis codes (LAS, RPI ...) of files whose header has none")
    tr: Annotated[float | None, Unit("s")] = Field(
        None, gt=0.05, le=20, description="repetition time; overrides the header"
    )
    dummy: Annotated[Literal["auto"] | int, Unit("volumes")] = Field(
        "auto", description="volumes to drop at the start; auto: those that are brighter"
    )
    participants: PathText | None = Field(None, description="table with a row for each subject")
    subject_column: str | None = Field(None, description="the participants column that names the subjects")
    labels: tuple[str, ...] | None = Field(
        None,
        description="columns of participants that travel with the scans, globs allowed; absent: all but those that "
        "look like names, dates of birth, addresses and the like; empty: none",
    )
    people: str | None = Field(None, description="cohorts of the same people share this name; absent: name")
    filters: dict[str, Filter] = Field(
        default_factory=dict,
        description="layout: bids; entities to keep: a label, a number, a glob, a list of them, or empty for none",
    )

    @field_validator("filters")
    @classmethod
    def _entities(cls, value: Mapping[str, Filter]) -> dict[str, Filter]:
        return {bids.entity_of(name): wanted for name, wanted in value.items()}

    @field_validator("orientation")
    @classmethod
    def _axes(cls, value: str | None) -> str | None:
        if value is not None and not (
            len(value) == 3 and all(sum(letter in pair for letter in value) == 1 for pair in ("LR", "AP", "IS"))
        ):
            raise ValueError("one letter each of L/R, A/P and I/S, such as LAS")
        return value

    @field_validator("dummy")
    @classmethod
    def _few(cls, value: str | int) -> str | int:
        if isinstance(value, int) and not 0 <= value <= 100:
            raise ValueError("auto or a number from 0 to 100")
        return value


@dataclass(frozen=True)
class Cohort:
    """The scans that a cohort file finds.

    Attributes
    ----------
    settings : CohortSettings
    runs : list of RunSource
        The scans, sorted by key.
    passed_over : list of Path
        Files that match the globs of the pattern, but not its fields.
    notes : list of str
        Further information for the user, such as subjects without a file in the chosen space or without labels.
    """

    settings: CohortSettings
    runs: list[RunSource]
    passed_over: list[Path]
    notes: list[str] = field(default_factory=list)


def find_runs(path: str | Path) -> list[RunSource]:
    """The scans of a cohort file, sorted by key; see `find_cohort`."""
    return find_cohort(path).runs


def find_cohort(path: str | Path, needed: Collection[str] = ()) -> Cohort:
    """Find the scans of a cohort file. Several files with the same key become one scan with a `problem`.

    Parameters
    ----------
    path : str or Path
    needed : collection of str
        Columns of the participants table that are kept regardless of `labels`, because a split needs them.

    Raises
    ------
    ConfigError
        If the file, or a file or folder it names, is missing or invalid, or no scan is found.
    """
    path = Path(path)
    cohort = load(CohortSettings, path)
    _check_consistent(path, cohort)
    root = (path.parent / cohort.root).resolve()
    if not root.is_dir():
        raise ConfigError(path, "root", f"{root}, which is not a folder", "the folder that contains the scans")
    found = (
        bids.find(path, cohort, root) if cohort.layout == "bids" else patterns.find(path, cohort.pattern or "", root)
    )
    people = Participants(path, cohort, root, {(item.subject, item.session) for item in found.items}, needed)
    runs: dict[str, list[RunSource]] = defaultdict(list)
    for item in found.items:
        run = _source(path, cohort, root, item, people.labels(item.subject, item.session))
        runs[run.key].append(run)
    notes = [*found.notes, *people.notes()]
    return Cohort(cohort, [_only(runs[key], cohort) for key in sorted(runs)], found.passed_over, notes)


def _source(path: Path, cohort: CohortSettings, root: Path, item: patterns.FoundScan, labels: Labels) -> RunSource:
    names = item.names()
    mask, confounds = bids.files_beside(item.bold) if cohort.layout == "bids" else (None, None)
    if cohort.confounds:
        named = patterns.beside(path, "confounds", cohort.confounds, root, names)
        confounds = named if named.is_symlink() or named.is_file() else None  # some scans have none
    # printable: a name that is not UTF-8 is refused by `_problem`, without stopping the others
    return RunSource(
        cohort=cohort.name,
        **{name: printable(value) for name, value in names.items()},
        variant=printable(item.variant),
        bold=item.bold,
        source=printable(item.bold.relative_to(root).as_posix()),
        space=cohort.space,
        people=cohort.people or cohort.name,
        mask=patterns.beside(path, "mask", cohort.mask, root, names) if cohort.mask else mask,
        confounds=confounds,
        orientation=cohort.orientation,
        tr=cohort.tr,
        dummy=cohort.dummy,
        labels=labels,
        problem=_problem(item, root),
    )


def _problem(item: patterns.FoundScan, root: Path) -> RunRefused | None:
    """Why a scan is refused because of its name or of other files; None if it is not."""
    source = item.bold.relative_to(root).as_posix()
    if printable(source) != source:
        got, hint = "a name with control characters or bytes that are not UTF-8", "Rename the file or its folder"
        return RunRefused(printable(source), "name", got, "printable text in UTF-8", hint)
    return item.problem


def _only(claims: list[RunSource], cohort: CohortSettings) -> RunSource:
    """The scan of a key. If several files have the same key, the first is refused, with the names of the others."""
    first = claims[0]
    names = {run.bold.name.lower() for run in claims}
    if (
        len(claims) == 2
        and len({run.bold.with_suffix("") for run in claims}) == 1
        and any(name.endswith(".hdr") for name in names)
    ):  # the two files of a NIfTI pair
        return next(run for run in claims if not run.bold.name.lower().endswith(".hdr"))
    if len(claims) == 1:
        return first
    others = ", ".join(run.source for run in claims[1:4]) + (" ..." if len(claims) > 4 else "")
    if len({run.bold.as_posix().removesuffix(".gz") for run in claims}) == 1:
        hint = "They are one image, with and without compression: delete one of the two"
    elif cohort.pattern:
        hint = "Narrow the pattern, or add a field for the part in which they differ"
    else:
        hint = "Narrow `filters` (space, res, desc ...)"
    got = f"{first.key} for {len(claims)} files, also {others}"
    return replace(first, problem=RunRefused(first.source, "key", got, "one file per key", hint))


def _check_consistent(path: Path, cohort: CohortSettings) -> None:
    if cohort.layout == "bids":
        if cohort.pattern is not None:
            hint = "Set layout: pattern, or remove the pattern"
            raise ConfigError(path, "pattern", cohort.pattern, "none with layout: bids", hint)
        return
    if cohort.pattern is None or "{subject}" not in cohort.pattern:
        raise ConfigError(path, "pattern", cohort.pattern or "nothing", "a pattern with {subject} in it")
    if cohort.filters:
        hint = "Remove the filters, and narrow the pattern"
        raise ConfigError(path, "filters", ", ".join(cohort.filters), "none with layout: pattern", hint)
