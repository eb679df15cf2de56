"""Finding the runs of a cohort: BIDS derivatives, or file patterns with named fields.

A cohort file (YAML) says where the runs lie and what is known about them; `find_runs` lists them. Nothing is read but
names, sidecars and the participants table.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from nilearn.interfaces.bids import get_bids_files, parse_bids_filename
from pydantic import Field

from shards.errors import ConfigError, RunRefused
from shards.settings import Settings, load

FIELDS = ("subject", "session", "task", "run")
SUBJECT_COLUMNS = ("participant_id", "subject", "Subject", "SUB_ID", "subject_id")


class CohortSettings(Settings):
    """A cohort file. Relative paths are relative to it."""

    name: str = Field(pattern=r"^[A-Za-z0-9-]+$", description="short name, part of every sample's key")
    root: str
    layout: Literal["bids", "pattern"] = "bids"
    pattern: str | None = Field(None, description="layout: pattern; {subject} is required, globs allowed")
    mask: str | None = Field(None, description="a pattern or one file; absent: found beside a BIDS run, else computed")
    space: Literal["MNI", "native"] = "MNI"
    tr: float | None = Field(None, gt=0.05, le=20, description="seconds; overrides the header")
    participants: str | None = None
    filters: dict[str, str] = Field(default_factory=dict, description="layout: bids; entities to keep, {task: rest}")


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
    space: str
    mask: Path | None = None
    confounds: Path | None = None
    tr: float | None = None  # seconds, overrides the header
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The sample's key: unique in a dataset, free of dots and slashes (WebDataset splits names there)."""
        parts = [self.cohort, f"sub-{self.subject}"]
        parts += [
            f"{short}-{value}"
            for short, value in (("ses", self.session), ("task", self.task), ("run", self.run))
            if value
        ]
        return re.sub(r"[^A-Za-z0-9_-]", "-", "_".join(parts))


def find_runs(path: str | Path) -> list[RunSource]:
    """The runs of a cohort file, sorted by key.

    Raises
    ------
    ConfigError
        If the file or what it names is missing or malformed, nothing matches, or two files claim the same key.
    """
    path = Path(path)
    cohort = load(CohortSettings, path)
    _check_consistent(path, cohort)
    root = (path.parent / cohort.root).resolve()
    if not root.is_dir():
        raise ConfigError(path, "root", f"{root}, which is no folder", "the folder that holds the runs")
    labels = _read_participants(path, cohort, root)
    found = _find_bids(path, cohort, root) if cohort.layout == "bids" else _find_pattern(path, cohort, root)
    if not found:
        space = "*_space-MNI*" if cohort.space == "MNI" else "*"
        wanted = cohort.pattern or f"sub-*/[ses-*/]func/{space}_desc-preproc_bold.nii.gz"
        keys = "root and pattern" if cohort.pattern else "root, space and filters"
        raise ConfigError(path, "root", f"no run under {root}", f"files that match {wanted}", f"Check {keys}")

    runs: dict[str, RunSource] = {}
    for names, bold, confounds in found:
        subject = names["subject"]
        run = RunSource(
            cohort=cohort.name,
            subject=subject,
            session=names.get("session", ""),
            task=names.get("task", ""),
            run=names.get("run", ""),
            bold=bold,
            source=bold.relative_to(root).as_posix(),
            space=cohort.space,
            mask=_find_mask(path, cohort, root, names, bold),
            confounds=confounds,
            tr=cohort.tr,
            labels=labels.get(subject, {}),
        )
        if run.key in runs:
            raise ConfigError(
                path,
                "pattern" if cohort.pattern else "filters",
                f"{runs[run.key].source} and {run.source} for the same key {run.key}",
                "one file per key",
                "Narrow it, or name the field in which they differ",
            )
        runs[run.key] = run
    return [runs[key] for key in sorted(runs)]


def _check_consistent(path: Path, cohort: CohortSettings) -> None:
    if cohort.layout == "bids":
        if cohort.pattern is not None:
            raise ConfigError(path, "pattern", cohort.pattern, "none with layout: bids", "Set layout: pattern")
        return
    if cohort.pattern is None or "{subject}" not in cohort.pattern:
        raise ConfigError(path, "pattern", cohort.pattern or "nothing", "a pattern with {subject} in it")
    if cohort.filters:
        raise ConfigError(path, "filters", ", ".join(cohort.filters), "none with layout: pattern", "Narrow the pattern")


def sidecar(bold: Path) -> Path:
    """Where the BIDS sidecar of a run would lie."""
    return bold.with_name(bold.name.split(".nii")[0] + ".json")


def header_tr(run: RunSource, zoom: float, unit: str) -> float:
    """TR of a run in seconds: the cohort file's, else the BIDS sidecar's, else the header's.

    Parameters
    ----------
    run : RunSource
    zoom : float
        Fourth voxel size of the NIfTI header.
    unit : str
        Time unit of the header ("sec", "msec", "usec", "unknown"); "unknown" is read as seconds.
    """
    if run.tr is not None:
        return run.tr
    path = sidecar(run.bold)
    if path.is_file():
        try:
            value = json.loads(path.read_text()).get("RepetitionTime")
        except (OSError, ValueError, AttributeError):
            raise RunRefused(path, "", "unreadable JSON", "a BIDS sidecar", "Mend or remove it") from None
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RunRefused(path, "RepetitionTime", repr(value), "seconds", "Mend it") from None
            return float(value)
    # the header holds 32-bit numbers, in which 0.8 is a little more than 0.8
    return round(float(zoom) * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1.0), 6)


def _read_participants(path: Path, cohort: CohortSettings, root: Path) -> dict[str, dict[str, Any]]:
    """Labels by subject, from the participants table (tab- or comma-separated)."""
    if cohort.participants is None:
        return {}
    table_path = next((p for p in (path.parent / cohort.participants, root / cohort.participants) if p.is_file()), None)
    if table_path is None:
        raise ConfigError(
            path, "participants", f"{cohort.participants}, which is no file", "a table beside this file or under root"
        )
    try:
        with open(table_path, encoding="utf-8-sig") as file:
            separator = "\t" if "\t" in file.readline() else ","
        columns = list(pd.read_csv(table_path, sep=separator, nrows=0).columns)
        column = next((name for name in SUBJECT_COLUMNS if name in columns), None)
        if column is None:
            raise ConfigError(
                table_path,
                "header",
                f"columns {', '.join(map(str, columns))}",
                "a column participant_id",
                "Rename the column that names the subjects",
            )
        # the subject as text: 0050002 is not 50002
        table = pd.read_csv(table_path, sep=separator, dtype={column: str})
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise ConfigError(
            table_path, "", f"an unreadable table ({error})", "columns parted by tabs or commas", "Mend it"
        ) from None
    labels: dict[str, dict[str, Any]] = {}
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        subject = str(row.pop(column)).removeprefix("sub-")
        own = {str(name): value for name, value in row.items()}
        if labels.setdefault(subject, own) != own:
            raise ConfigError(
                table_path, column, f"two different rows for {subject}", "one row per subject", "Keep one of them"
            )
    return labels


Found = list[tuple[dict[str, str], Path, Path | None]]


def _find_bids(path: Path, cohort: CohortSettings, root: Path) -> Found:
    """Preprocessed runs of a BIDS derivative, with their confounds."""
    result: Found = []
    for name in sorted(
        get_bids_files(
            root, file_tag="bold", file_type="nii*", modality_folder="func", filters=list(cohort.filters.items())
        )
    ):
        bold = Path(name)
        entities = parse_bids_filename(bold)["entities"]
        in_mni = str(entities.get("space", "")).startswith("MNI")
        if entities.get("desc") != "preproc" or in_mni != (cohort.space == "MNI"):
            continue
        stem = "_".join(
            f"{key}-{entities[key]}"
            for key in ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo")
            if key in entities
        )
        confounds = bold.with_name(f"{stem}_desc-confounds_timeseries.tsv")
        names = {
            "subject": entities["sub"],
            "session": entities.get("ses", ""),
            "task": entities.get("task", ""),
            "run": entities.get("run", ""),
        }
        result.append((names, bold, confounds if confounds.is_file() else None))
    return result


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
    result: Found = []
    try:
        candidates = sorted(root.glob(re.sub(r"\{\w+\}", "*", cohort.pattern)))
    except (NotImplementedError, ValueError):  # an absolute path, or ** beside other characters
        raise ConfigError(
            path, "pattern", cohort.pattern, "a path relative to root, with ** as a whole folder name only"
        ) from None
    for bold in candidates:
        match = regex.match(bold.relative_to(root).as_posix())
        if match and bold.is_file():
            result.append((match.groupdict(), bold, None))
    return result


def _find_mask(path: Path, cohort: CohortSettings, root: Path, names: dict[str, str], bold: Path) -> Path | None:
    """The run's mask: the cohort's, or the one beside a BIDS run; None means it is computed from the run.

    A mask that the cohort file promises but that is not there is returned as the path that was expected, so that the
    run is refused by name and the rest of the cohort goes on.
    """
    if cohort.mask is None:
        if cohort.layout == "bids":
            mask = bold.with_name(bold.name.replace("_desc-preproc_bold", "_desc-brain_mask"))
            return mask if mask.is_file() else None
        return None
    try:
        relative = cohort.mask.format(**names)
        beside = [root / relative] if (root / relative).is_file() else sorted(root.glob(relative.lstrip("/")))
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ConfigError(path, "mask", cohort.mask, f"a path with the fields {', '.join(names)} or globs") from None
    matches = beside
    if not matches and (path.parent / relative).is_file():
        matches = [path.parent / relative]
    if len(matches) > 1:
        raise ConfigError(path, "mask", f"{len(matches)} files for {relative}", "one mask per run")
    return matches[0] if matches else root / relative
