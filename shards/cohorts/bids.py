"""Find the preprocessed scans of a BIDS derivative (fMRIPrep, XCP-D, tedana ...) by their file names.

A name consists of `entity-label` pairs and a suffix, separated by `_`:
`sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold`. Labels with hyphens are accepted: BIDS forbids them, but
many datasets have them. Scans that are left out are reported with the reason.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pathspec import GitIgnoreSpec

from shards.cohorts.patterns import Found, FoundScan, Search, glob_regex, listed
from shards.core.errors import ConfigError, RunRefused
from shards.core.files import printable

if TYPE_CHECKING:
    from shards.cohorts.cohort_file import CohortSettings, Filter

VARIANTS = ("acq", "ce", "rec", "dir", "echo")  # distinguish scans, besides session, task and run
ENDINGS = (".nii.gz", ".nii")
_NAMES = {
    "subject": "sub",
    "session": "ses",
    "acquisition": "acq",
    "ceagent": "ce",
    "reconstruction": "rec",
    "direction": "dir",
    "resolution": "res",
    "density": "den",
    "description": "desc",
}
_SHORT = (
    "sub",
    "ses",
    "task",
    "acq",
    "ce",
    "rec",
    "dir",
    "run",
    "echo",
    "part",
    "space",
    "cohort",
    "res",
    "den",
    "desc",
)
_EXTENSION = "extension"
_SETTLED = 2 * 10**9  # ns until a change of a folder is visible in its modification time, on all file systems
_LEAST = ("desc", "res", "den", "space", "cohort")  # entities of derivatives, which do not distinguish scans


@dataclass(frozen=True)
class Name:
    """The parts of a BIDS file name."""

    path: Path
    entities: Mapping[str, str]
    suffix: str
    extension: str

    def label(self, entity: str) -> str | None:
        return self.extension if entity == _EXTENSION else self.entities.get(entity)

    def without(self, *entities: str) -> tuple[tuple[str, str], ...]:
        """The other entities, which are equal for files that differ only in the given ones."""
        return tuple((name, label) for name, label in self.entities.items() if name not in entities)


def entity_of(name: str) -> str:
    """The short name of an entity, such as `ses` for `session` and `ses`.

    Raises
    ------
    ValueError
        If the entity does not exist.
    """
    short = _NAMES.get(name, name)
    if short not in (*_SHORT, _EXTENSION):
        raise ValueError(f"BIDS entities such as {', '.join(_SHORT)} or {_EXTENSION}, not {name}")
    return short


def parse(path: Path) -> Name:
    """Parse a file name. Parts that are not pairs of entity and label are ignored."""
    ending = next((ending for ending in (*ENDINGS, ".json") if path.name.endswith(ending)), path.suffix)
    *pairs, suffix = path.name.removesuffix(ending).split("_")
    parted = (pair.partition("-") for pair in pairs)
    return Name(path, {entity: label for entity, sign, label in parted if sign}, suffix, ending)


def top_folder(path: Path) -> Path:
    """The folder that contains the folders of the subjects; without these, the folder of the file."""
    subject = next((folder for folder in path.parents if folder.name.startswith("sub-")), None)
    return path.parent if subject is None else subject.parent


def sidecars(bold: Path) -> list[Path]:
    """JSON files that describe a scan, the nearest first: its own, then inherited ones (BIDS inheritance principle).

    A file in the folder of the scan or above it, up to the dataset folder, describes all scans with its entities.
    """
    name = parse(bold)
    own = bold.with_name(bold.name.removesuffix(name.extension) + ".json")
    found, top = [own], top_folder(bold)
    for folder in bold.parents:
        here = []
        for other in _descriptions(folder):
            path = other.path
            fits = other.entities.items() <= name.entities.items() and other.suffix == name.suffix
            if fits and path != own and not path.name.startswith("."):
                here.append((-len(other.entities), path))
        found += [path for _, path in sorted(here)]
        if folder == top:
            break
    return found


def _descriptions(folder: Path) -> tuple[Name, ...]:
    """The `*bold.json` files of a folder.

    This is called many times for the dataset folder, which may have thousands of entries, so a folder is listed again
    only after it has changed.
    """
    try:
        changed = folder.stat().st_mtime_ns
    except OSError:
        return ()
    if time.time_ns() - changed < _SETTLED:  # another change may have the same modification time
        return _listed_descriptions(folder)
    return _descriptions_since(folder, changed)


def _listed_descriptions(folder: Path) -> tuple[Name, ...]:
    return tuple(parse(path) for path in folder.glob("*bold.json"))


@lru_cache(maxsize=1024)
def _descriptions_since(folder: Path, changed: int) -> tuple[Name, ...]:
    return _listed_descriptions(folder)


def files_beside(bold: Path) -> tuple[Path | None, Path | None]:
    """Mask and confounds that fMRIPrep (also old versions) wrote next to a scan; None for a missing file.

    A link to content that is not on this machine is returned, too; it is refused when it is read.
    """
    name = parse(bold)
    if name.suffix != "bold" or "desc" not in name.entities:
        return None, None
    described = f"_desc-{name.entities['desc']}_bold"
    stem = re.sub(r"_(space|res|den|desc)-.*", "", bold.name)
    masks = [bold.name.replace(described, "_desc-brain_mask")]
    masks += [masks[0].removesuffix(name.extension) + ending for ending in ENDINGS if ending != name.extension]
    tables = [f"{stem}_desc-confounds_{word}.tsv" for word in ("timeseries", "regressors")]
    return _first(bold, masks), _first(bold, tables)


def _first(bold: Path, names: Iterable[str]) -> Path | None:
    paths = (bold.with_name(name) for name in names)
    return next((path for path in paths if path.is_file() or path.is_symlink()), None)


def find(path: Path, cohort: CohortSettings, root: Path) -> Found:
    """Find the preprocessed scans under a root that match the space and filters of a cohort file.

    Raises
    ------
    ConfigError
        If there is none. It says what was found instead.
    """
    search = Search()
    subjects, files = _bold_files(search, root)
    files, notes = _not_ignored(root, files)
    kept, left = [], Counter[str]()
    wanted: dict[str, Filter] = {"desc": "preproc", **cohort.filters}
    for name in files:
        reason = _why_not(name, cohort, wanted)
        if reason is None:
            kept.append(name)
        else:
            left[reason] += 1
    if not kept:
        raise _nothing(path, cohort, root, subjects, files, wanted)
    without = sorted(subjects - {name.entities["sub"] for name in kept})
    if without:
        what = "native" if cohort.space == "native" else "MNI"
        spaces = _labels("space", (name for name in files if name.entities["sub"] in without))
        there = f" (spaces found: {spaces})" if spaces else ""
        notes.append(
            f"no scan in {what} space that matches the filters, for {len(without)} subjects{there}: {listed(without)}"
        )
    items, more = _scans(kept, cohort, root)
    return Found(items, [], [*notes, *more, *search.notes])


def _bold_files(search: Search, root: Path) -> tuple[set[str], list[Name]]:
    """Labels of the subjects that have a folder, and all their BOLD images."""
    subjects, found = set(), []
    for subject in (folder for folder in search.folders(root) if folder.name.startswith("sub-")):
        subjects.add(subject.name.removeprefix("sub-"))
        for pattern in ("func/*_bold.nii", "func/*_bold.nii.gz", "ses-*/func/*_bold.nii", "ses-*/func/*_bold.nii.gz"):
            names = (parse(path) for path in search.files(subject, pattern))
            found += [name for name in names if name.entities.get("sub")]
    return subjects, sorted(found, key=lambda name: name.path)


def _not_ignored(root: Path, files: list[Name]) -> tuple[list[Name], list[str]]:
    """Leave out the files that `.bidsignore` names; returns the others and a note."""
    path = root / ".bidsignore"
    if not path.is_file():
        return files, []
    spec = GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8", errors="replace").split("\n"))
    kept = [name for name in files if not spec.match_file(name.path.relative_to(root).as_posix())]
    ignored = len(files) - len(kept)
    return kept, [f"{ignored} images are left out by .bidsignore"] if ignored else []


def _why_not(name: Name, cohort: CohortSettings, wanted: Mapping[str, Filter]) -> str | None:
    """The entity because of which an image is left out; None if it is kept."""
    if name.entities.get("part") == "phase" and "part" not in wanted:
        return "part"
    in_mni = str(name.entities.get("space", "")).startswith("MNI")
    if in_mni == (cohort.space == "native"):
        return "space"
    return next((entity for entity, value in wanted.items() if not _fits(entity, name.label(entity), value)), None)


def _fits(entity: str, label: str | None, wanted: Filter) -> bool:
    if isinstance(wanted, tuple):
        return any(_fits(entity, label, each) for each in wanted)
    if wanted is None or wanted == "":
        return label is None
    if label is None:
        return False
    if isinstance(wanted, int):  # YAML reads 01 as the number 1
        return label.isdecimal() and int(label) == wanted
    return glob_regex(wanted.removeprefix(f"{entity}-")).fullmatch(label) is not None


def _labels(entity: str, names: Iterable[Name]) -> str:
    found = Counter(name.label(entity) or "none" for name in names)
    return ", ".join(f"{printable(label)} ({count})" for label, count in sorted(found.items())[:8])


def _nothing(
    path: Path,
    cohort: CohortSettings,
    root: Path,
    subjects: set[str],
    files: list[Name],
    wanted: Mapping[str, Filter],
) -> ConfigError:
    """Why no scan was found: the first entity because of which all are left out, and the labels that exist."""
    under = f"no scan under {printable(root)}"
    inner = next(iter(sorted(root.glob("derivatives/*/sub-*/"))), None)
    elsewhere = inner and f"Preprocessed data seem to be in {printable(inner.parent)}: give that folder as `root`"
    if not files:
        space = "*" if cohort.space == "native" else "*_space-MNI*"
        expected = f"files that match sub-*/[ses-*/]func/{space}_desc-{_shown(wanted['desc'])}_bold.nii.gz"
        hint = "Check root, space and filters" if subjects else "Give the folder that contains the folders sub-*"
        return ConfigError(path, "root", under, expected, elsewhere or hint)
    left, asked = files, {"space": "no MNI space" if cohort.space == "native" else "an MNI space"}
    asked |= {entity: _shown(value) for entity, value in wanted.items()}
    for entity in asked:
        kept = [
            name for name in left if _why_not(name, cohort, {e: w for e, w in wanted.items() if e == entity}) is None
        ]
        if not kept:
            break
        left = kept
    hint = "Correct `filters`" if entity in cohort.filters else ""
    if entity == "space":
        hint = elsewhere or "Set `space: native` to convert scans that are not in an MNI space"
    elif entity == "desc" and "desc" not in cohort.filters:
        raw = all(name.label("desc") is None for name in left)
        hint = "Choose the preprocessed scans with `filters: {desc: ...}`"
        raw_hint = "These look like raw data: preprocess them first, for example with fMRIPrep"
        hint = elsewhere or (raw_hint if raw else hint)
    got = f"{under} with {entity} as in `{'filters' if entity in cohort.filters else 'space'}`"
    if entity == "desc" and "desc" not in cohort.filters:
        got = f"{under} with desc-preproc"
    return ConfigError(path, "root", f"{got} (found: {_labels(entity, left)})", f"{entity}: {asked[entity]}", hint)


def _shown(value: Filter) -> str:
    return "|".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _scans(names: list[Name], cohort: CohortSettings, root: Path) -> tuple[list[FoundScan], list[str]]:
    """One item for each scan. Echoes are left out if their combination exists; otherwise they are refused."""
    notes = []
    groups: dict[tuple[tuple[str, str], ...], list[Name]] = defaultdict(list)
    for name in names:
        groups[name.without("echo", *_LEAST)].append(name)
    items, dropped = [], 0
    for group in groups.values():
        echoes = [name for name in group if "echo" in name.entities]
        combined = [name for name in group if "echo" not in name.entities]
        if combined and echoes and "echo" not in cohort.filters:
            dropped += len(echoes)
            group = combined
        elif len({name.entities["echo"] for name in echoes}) > 1 and "echo" not in cohort.filters:
            source = printable(echoes[0].path.relative_to(root).as_posix())
            got = f"{len(echoes)} echoes of one scan without a combined image"
            hint = "Combine them (for example with fMRIPrep or tedana), or choose one: `filters: {echo: 2}`"
            problem = RunRefused(source, "echo", got, "one image per scan", hint)
            items.append(replace(_item(echoes[0]), problem=problem))
            continue
        items += [_item(name) for name in group]
    if dropped:
        notes.append(f"{dropped} single echoes of combined scans are left out (choose one with `filters: {{echo: N}}`)")
    return items, notes


def _item(name: Name) -> FoundScan:
    entities = name.entities
    return FoundScan(
        subject=entities["sub"],
        session=entities.get("ses", ""),
        task=entities.get("task", ""),
        run=entities.get("run", ""),
        variant="_".join(f"{entity}-{entities[entity]}" for entity in VARIANTS if entity in entities),
        bold=name.path,
    )
