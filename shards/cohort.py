"""Finding the runs of a cohort: BIDS derivatives, or file patterns with named fields.

A cohort file (YAML) says where the runs lie and what is known about them; `find_runs` lists them. Nothing is read but
names and the participants table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from nilearn.interfaces.bids import get_bids_files, parse_bids_filename
from pydantic import Field, field_validator

from shards.errors import ConfigError, RunRefused
from shards.settings import Settings, load

FIELDS = ("subject", "session", "task", "run")
VARIANTS = ("acq", "ce", "rec", "dir", "echo")  # BIDS entities that tell runs apart beside session, task and run
SUBJECT_COLUMNS = ("participant_id", "subject", "Subject", "SUB_ID", "subject_id")
SESSION_COLUMNS = ("session_id", "session", "ses")


class CohortSettings(Settings):
    """A cohort file. Relative paths are relative to it."""

    name: str = Field(pattern=r"^[A-Za-z0-9-]+$", description="short name, part of every sample's key")
    root: str
    layout: Literal["bids", "pattern"] = "bids"
    pattern: str | None = Field(None, description="layout: pattern; {subject} is required, globs allowed")
    mask: str | None = Field(None, description="a pattern or one file; absent: found beside a BIDS run, else computed")
    confounds: str | None = Field(None, description="a pattern; absent: found beside a BIDS run")
    space: Literal["MNI", "native"] | None = Field(None, description="absent: MNI; native: centred by the mask")
    orientation: str | None = Field(None, description="axis codes (LAS, RPI ...) of files whose header has none")
    tr: float | None = Field(None, gt=0.05, le=20, description="seconds; overrides the header")
    dummy: Literal["auto"] | int = Field("auto", description="volumes to drop at the start; auto: brighter ones")
    participants: str | None = None
    subject_column: str | None = Field(None, description="the participants column that names the subjects")
    people: str | None = Field(None, description="cohorts of the same people share this name; absent: name")
    filters: dict[str, str] = Field(default_factory=dict, description="layout: bids; entities to keep, {task: rest}")

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
    labels: dict[str, Any] = field(default_factory=dict)
    problem: RunRefused | None = None  # why it cannot be converted, where its name alone tells

    @property
    def key(self) -> str:
        """The sample's key: unique in a dataset, free of dots and slashes (WebDataset splits names there)."""
        named = (("ses", self.session), ("task", self.task), ("", self.variant), ("run", self.run))
        parts = [self.cohort, f"sub-{self.subject}"]
        parts += [f"{short}-{value}" if short else value for short, value in named if value]
        return re.sub(r"[^A-Za-z0-9_-]", "-", "_".join(parts))

    @property
    def person(self) -> tuple[str, str]:
        """Who was scanned: equal for the same subject of cohorts that share people."""
        return self.people or self.cohort, self.subject


@dataclass(frozen=True)
class Cohort:
    """What a cohort file finds.

    Attributes
    ----------
    settings : CohortSettings
    runs : list of RunSource, sorted by key
    passed_over : list of Path
        Files that the globs of the pattern reach but its fields do not match.
    """

    settings: CohortSettings
    runs: list[RunSource]
    passed_over: list[Path]


def find_runs(path: str | Path) -> list[RunSource]:
    """The runs of a cohort file, sorted by key; see `find_cohort`."""
    return find_cohort(path).runs


def find_cohort(path: str | Path) -> Cohort:
    """Everything a cohort file finds. Files that claim the same key become one run with a `problem`.

    Raises
    ------
    ConfigError
        If the file or what it names is missing or malformed, or nothing matches.
    """
    path = Path(path)
    cohort = load(CohortSettings, path)
    _check_consistent(path, cohort)
    root = (path.parent / cohort.root).resolve()
    if not root.is_dir():
        raise ConfigError(path, "root", f"{root}, which is no folder", "the folder that holds the runs")
    people = Participants(path, cohort, root)
    found, passed_over = _find_bids(cohort, root) if cohort.layout == "bids" else _find_pattern(path, cohort, root)
    if not found:
        space = "*" if cohort.space == "native" else "*_space-MNI*"
        wanted = cohort.pattern or f"sub-*/[ses-*/]func/{space}_desc-preproc_bold.nii.gz"
        keys = "root and pattern" if cohort.pattern else "root, space and filters"
        hint = f"Check {keys}"
        if passed_over:
            hint += f"; {passed_over[0].name} is reached by its globs, but a field matches no _, . or /"
        raise ConfigError(path, "root", f"no run under {root}", f"files that match {wanted}", hint)

    runs: dict[str, list[RunSource]] = defaultdict(list)
    for names, bold in found:
        subject, session = names["subject"], names.get("session") or ""
        mask, confounds = files_beside(bold) if cohort.layout == "bids" else (None, None)
        if cohort.confounds:
            named = _beside(path, "confounds", cohort.confounds, root, names)
            confounds = named if named.is_file() else None  # some runs have none; --dry-run counts those that have
        run = RunSource(
            cohort=cohort.name,
            subject=subject,
            session=session,
            task=names.get("task") or "",
            run=names.get("run") or "",
            variant=names.get("variant") or "",
            bold=bold,
            source=bold.relative_to(root).as_posix(),
            space=cohort.space,
            people=cohort.people or cohort.name,
            mask=_beside(path, "mask", cohort.mask, root, names) if cohort.mask else mask,
            confounds=confounds,
            orientation=cohort.orientation,
            tr=cohort.tr,
            dummy=cohort.dummy,
            labels=people.labels(subject, session),
        )
        runs[run.key].append(run)
    return Cohort(cohort, [_only(runs[key], cohort) for key in sorted(runs)], passed_over)


def _only(claims: list[RunSource], cohort: CohortSettings) -> RunSource:
    """The one run of a key; of several, the first, which is refused and names the others."""
    first = claims[0]
    if len(claims) == 1:
        return first
    others = ", ".join(run.source for run in claims[1:4]) + (" ..." if len(claims) > 4 else "")
    narrow = "the pattern" if cohort.pattern else "`filters` (space, res, desc ...)"
    problem = RunRefused(
        first.source,
        "key",
        f"{first.key} for {len(claims)} files, also {others}",
        "one file per key",
        f"Narrow {narrow}, or name the field in which they differ",
    )
    return replace(first, problem=problem)


def _check_consistent(path: Path, cohort: CohortSettings) -> None:
    if cohort.layout == "bids":
        if cohort.pattern is not None:
            raise ConfigError(path, "pattern", cohort.pattern, "none with layout: bids", "Set layout: pattern")
        return
    if cohort.pattern is None or "{subject}" not in cohort.pattern:
        raise ConfigError(path, "pattern", cohort.pattern or "nothing", "a pattern with {subject} in it")
    if cohort.filters:
        raise ConfigError(path, "filters", ", ".join(cohort.filters), "none with layout: pattern", "Narrow the pattern")


class Participants:
    """Labels by subject, or by subject and session, from the participants table (tab- or comma-separated).

    Raises
    ------
    ConfigError
        If the table is missing, unreadable, names no subjects, or has different rows for one subject (and session).
    """

    def __init__(self, path: Path, cohort: CohortSettings, root: Path):
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        self._by_number: dict[int, set[str]] = defaultdict(set)
        if cohort.participants is None:
            return
        places = (path.parent / cohort.participants, root / cohort.participants)
        table_path = next((place for place in places if place.is_file()), None)
        if table_path is None:
            got = f"{cohort.participants}, which is no file"
            raise ConfigError(path, "participants", got, "a table beside this file or under root")
        table, column = self._read(table_path, path, cohort)
        sessions = next((name for name in SESSION_COLUMNS if name in table and name != column), None)
        for row in table.astype(object).where(table.notna(), None).to_dict("records"):
            subject = str(row.pop(column)).strip().removeprefix("sub-")
            own = {str(name): value for name, value in row.items()}
            session = str(own[sessions] or "").removeprefix("ses-") if sessions else ""
            if self._rows.setdefault((subject, session), own) != own:
                who = f"{subject}, session {session}" if session else subject
                raise ConfigError(
                    table_path, column, f"two different rows for {who}", "one row per subject", "Keep one of them"
                )
            self._rows.setdefault((subject, ""), own)
            if subject.isdigit():
                self._by_number[int(subject)].add(subject)

    @staticmethod
    def _read(table_path: Path, path: Path, cohort: CohortSettings) -> tuple[pd.DataFrame, str]:
        try:
            with open(table_path, encoding="utf-8-sig") as file:
                separator = "\t" if "\t" in file.readline() else ","
            columns = [str(name) for name in pd.read_csv(table_path, sep=separator, nrows=0).columns]
            wanted = (cohort.subject_column,) if cohort.subject_column else SUBJECT_COLUMNS
            column = next((name for name in wanted if name in columns), None)
            if column is None:
                raise ConfigError(
                    table_path,
                    "header",
                    f"columns {', '.join(columns)}",
                    f"a column {cohort.subject_column or 'participant_id'}",
                    f"Name the column of the subjects as `subject_column` in {path.name}",
                )
            # the subject as text: 0050002 is not 50002; sessions likewise
            texts = dict.fromkeys((column, *SESSION_COLUMNS), str)
            return pd.read_csv(table_path, sep=separator, dtype=texts), column
        except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
            raise ConfigError(
                table_path, "", f"an unreadable table ({error})", "columns parted by tabs or commas", "Mend it"
            ) from None

    def labels(self, subject: str, session: str) -> dict[str, Any]:
        """The row of a subject's session, else the subject's; empty where there is none.

        A subject that is not in the table by its name is looked up by its number (0050002 for 50002), if only one
        subject has that number.
        """
        if (subject, "") not in self._rows and subject.isdigit():
            same = self._by_number.get(int(subject), set())
            subject = next(iter(same)) if len(same) == 1 else subject
        return self._rows.get((subject, session)) or self._rows.get((subject, "")) or {}


Found = tuple[list[tuple[dict[str, str], Path]], list[Path]]


def _find_bids(cohort: CohortSettings, root: Path) -> Found:
    """Preprocessed runs of a BIDS derivative."""
    found = []
    filters = list(cohort.filters.items())
    for name in sorted(
        get_bids_files(root, file_tag="bold", file_type="nii*", modality_folder="func", filters=filters)
    ):
        bold = Path(name)
        entities = parse_bids_filename(bold)["entities"]
        in_mni = str(entities.get("space", "")).startswith("MNI")
        if entities.get("desc") != "preproc" or in_mni == (cohort.space == "native"):
            continue
        names = {
            "subject": entities["sub"],
            "session": entities.get("ses", ""),
            "task": entities.get("task", ""),
            "run": entities.get("run", ""),
            "variant": "_".join(f"{entity}-{entities[entity]}" for entity in VARIANTS if entity in entities),
        }
        found.append((names, bold))
    return found, []


def files_beside(bold: Path) -> tuple[Path | None, Path | None]:
    """Mask and confounds that fMRIPrep wrote beside a run (those of old versions too); None where there is none."""
    if "_desc-preproc_bold" not in bold.name:
        return None, None
    stem = re.sub(r"_(space|res|desc)-.*", "", bold.name)
    mask = bold.with_name(bold.name.replace("_desc-preproc_bold", "_desc-brain_mask"))
    tables = [bold.with_name(f"{stem}_desc-confounds_{word}.tsv") for word in ("timeseries", "regressors")]
    return next((f for f in [mask] if f.is_file()), None), next((f for f in tables if f.is_file()), None)


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """A file pattern as a regular expression over relative paths.

    `{name}` inside a file or folder name matches letters, digits and hyphens; where it is a whole folder name it
    matches anything. A field that occurs again must match the same text. `*`, `?` and `**` are globs.
    """
    out, seen, at = "", set(), 0
    for token in re.finditer(r"\{(\w+)\}|\*\*/?|\*|\?", pattern):
        out += re.escape(pattern[at : token.start()])
        at = token.end()
        name = token.group(1)
        if name:
            whole = pattern[: token.start()].endswith(("/",)) or token.start() == 0
            whole = whole and (pattern[at : at + 1] == "/")
            out += f"(?P={name})" if name in seen else f"(?P<{name}>{'[^/]+' if whole else '[^/_.]+'})"
            seen.add(name)
        else:
            out += {"*": "[^/]*", "?": "[^/]", "**": ".*", "**/": "(?:.*/)?"}[token.group()]
    return re.compile(out + re.escape(pattern[at:]) + r"\Z")


def _find_pattern(path: Path, cohort: CohortSettings, root: Path) -> Found:
    assert cohort.pattern is not None
    unknown = set(re.findall(r"\{(\w+)\}", cohort.pattern)) - set(FIELDS)
    if unknown:
        raise ConfigError(path, "pattern", f"{{{sorted(unknown)[0]}}}", f"only {{{'}, {'.join(FIELDS)}}}")
    regex = pattern_regex(cohort.pattern)
    found, passed_over = [], []
    try:
        candidates = sorted(root.glob(re.sub(r"\{\w+\}", "*", cohort.pattern)))
    except (NotImplementedError, ValueError):  # an absolute path, or ** beside other characters
        raise ConfigError(
            path, "pattern", cohort.pattern, "a path relative to root, with ** as a whole folder name only"
        ) from None
    for bold in candidates:
        match = regex.match(bold.relative_to(root).as_posix())
        if bold.is_dir():
            continue
        if match:  # a link to nothing as well (datalad): its run is refused by name
            found.append((match.groupdict(), bold))
        else:
            passed_over.append(bold)
    return found, passed_over


def _beside(path: Path, key: str, pattern: str, root: Path, names: dict[str, str]) -> Path:
    """The file of a run that a pattern of the cohort file names, below the root or beside the cohort file.

    A file that is promised but not there is returned as the path that was expected, so that the run is refused by name
    and the rest of the cohort goes on.
    """
    try:
        relative = pattern.format(**names)
        matches = [root / relative] if (root / relative).is_file() else sorted(root.glob(relative.lstrip("/")))
    except (KeyError, IndexError, ValueError, AttributeError):
        fields = ", ".join(name for name in names if name in FIELDS)
        raise ConfigError(path, key, pattern, f"a path with the fields {fields} or globs") from None
    if not matches and (path.parent / relative).is_file():
        matches = [path.parent / relative]
    if len(matches) > 1:
        raise ConfigError(path, key, f"{len(matches)} files for {relative}", "one file per run")
    return matches[0] if matches else root / relative
