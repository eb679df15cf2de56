"""Finding the preprocessed runs of a BIDS derivative (fMRIPrep, XCP-D, tedana ...), by the names of its files.

A name is `entity-label` pairs and a suffix, parted by `_`: `sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold`.
A label may hold hyphens, which BIDS forbids and many datasets have. What is left out, and why, is told.
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

from shards.cohorts.patterns import Found, Item, Search, glob_regex, listed
from shards.core.errors import ConfigError, RunRefused
from shards.core.files import printable

if TYPE_CHECKING:
    from shards.cohorts.cohort_file import CohortSettings, Filter

VARIANTS = ("acq", "ce", "rec", "dir", "echo")  # entities that tell runs apart beside session, task and run
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
_SETTLED = 2 * 10**9  # ns after which a change of a folder shows in its time, on coarse file systems too
_LEAST = ("desc", "res", "den", "space", "cohort")  # entities of derivatives: they make no other scan


@dataclass(frozen=True)
class Name:
    """A BIDS file name, taken apart."""

    path: Path
    entities: Mapping[str, str]
    suffix: str
    extension: str

    def label(self, entity: str) -> str | None:
        return self.extension if entity == _EXTENSION else self.entities.get(entity)

    def without(self, *entities: str) -> tuple[tuple[str, str], ...]:
        """Its other entities: equal for files that differ in these alone."""
        return tuple((name, label) for name, label in self.entities.items() if name not in entities)


def entity_of(name: str) -> str:
    """The short name of an entity: `ses` for `session` and `ses`.

    Raises
    ------
    ValueError
        If there is no such entity.
    """
    short = _NAMES.get(name, name)
    if short not in (*_SHORT, _EXTENSION):
        raise ValueError(f"BIDS entities such as {', '.join(_SHORT)} or {_EXTENSION}, not {name}")
    return short


def parse(path: Path) -> Name:
    """A file name taken apart; what is no pair of entity and label is left out."""
    ending = next((ending for ending in (*ENDINGS, ".json") if path.name.endswith(ending)), path.suffix)
    *pairs, suffix = path.name.removesuffix(ending).split("_")
    parted = (pair.partition("-") for pair in pairs)
    return Name(path, {entity: label for entity, sign, label in parted if sign}, suffix, ending)


def top_folder(path: Path) -> Path:
    """The folder that holds the subjects' folders, or, where a file is in none, the file's own."""
    subject = next((folder for folder in path.parents if folder.name.startswith("sub-")), None)
    return path.parent if subject is None else subject.parent


def sidecars(bold: Path) -> list[Path]:
    """JSON files that describe a run, the nearest first: its own, then those it inherits (BIDS inheritance principle).

    A file in the run's folder or above it, up to the folder of the dataset, describes all runs that have its entities.
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
    """The `*bold.json` of a folder.

    The folder of a dataset is asked about for each of its runs, many times over, and may hold thousands of entries: it
    is listed again only once it has changed.
    """
    try:
        changed = folder.stat().st_mtime_ns
    except OSError:
        return ()
    if time.time_ns() - changed < _SETTLED:  # the next change may get the same time
        return _listed_descriptions(folder)
    return _descriptions_since(folder, changed)


def _listed_descriptions(folder: Path) -> tuple[Name, ...]:
    return tuple(parse(path) for path in folder.glob("*bold.json"))


@lru_cache(maxsize=1024)
def _descriptions_since(folder: Path, changed: int) -> tuple[Name, ...]:
    return _listed_descriptions(folder)


def files_beside(bold: Path) -> tuple[Path | None, Path | None]:
    """Mask and confounds that fMRIPrep wrote beside a run (those of old versions too); None where there is none.

    A link to content that is not on this machine counts: it is refused when it is read.
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
    """The preprocessed runs under a root that a cohort file's space and filters keep.

    Raises
    ------
    ConfigError
        If there is none, with what there is instead.
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
            f"no run in {what} space that the filters keep, for {len(without)} subjects{there}: {listed(without)}"
        )
    items, more = _scans(kept, cohort, root)
    return Found(items, [], [*notes, *more, *search.notes])


def _bold_files(search: Search, root: Path) -> tuple[set[str], list[Name]]:
    """Labels of the subjects that have a folder, and all BOLD images of theirs."""
    subjects, found = set(), []
    for subject in (folder for folder in search.folders(root) if folder.name.startswith("sub-")):
        subjects.add(subject.name.removeprefix("sub-"))
        for pattern in ("func/*_bold.nii", "func/*_bold.nii.gz", "ses-*/func/*_bold.nii", "ses-*/func/*_bold.nii.gz"):
            names = (parse(path) for path in search.files(subject, pattern))
            found += [name for name in names if name.entities.get("sub")]
    return subjects, sorted(found, key=lambda name: name.path)


def _not_ignored(root: Path, files: list[Name]) -> tuple[list[Name], list[str]]:
    """The files that `.bidsignore` does not name."""
    path = root / ".bidsignore"
    if not path.is_file():
        return files, []
    spec = GitIgnoreSpec.from_lines(path.read_text(encoding="utf-8", errors="replace").split("\n"))
    kept = [name for name in files if not spec.match_file(name.path.relative_to(root).as_posix())]
    ignored = len(files) - len(kept)
    return kept, [f"{ignored} images are left out by .bidsignore"] if ignored else []


def _why_not(name: Name, cohort: CohortSettings, wanted: Mapping[str, Filter]) -> str | None:
    """The entity by which an image is left out; None if it is kept."""
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
    """Why no run is left: the first entity by which all are left out, with the labels there are."""
    under = f"no run under {printable(root)}"
    inner = next(iter(sorted(root.glob("derivatives/*/sub-*/"))), None)
    elsewhere = inner and f"Preprocessed data seem to lie in {printable(inner.parent)}: give that folder as `root`"
    if not files:
        space = "*" if cohort.space == "native" else "*_space-MNI*"
        expected = f"files that match sub-*/[ses-*/]func/{space}_desc-{_shown(wanted['desc'])}_bold.nii.gz"
        hint = "Check root, space and filters" if subjects else "Give the folder that holds the folders sub-*"
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
        hint = elsewhere or "Set `space: native` to convert runs that are in no MNI space"
    elif entity == "desc" and "desc" not in cohort.filters:
        raw = all(name.label("desc") is None for name in left)
        hint = "Name the preprocessed one: `filters: {desc: ...}`"
        hint = elsewhere or ("These look like raw data: preprocess them first, as with fMRIPrep" if raw else hint)
    got = f"{under} whose {entity} fits `{'filters' if entity in cohort.filters else 'space'}`"
    if entity == "desc" and "desc" not in cohort.filters:
        got = f"{under} with desc-preproc"
    return ConfigError(path, "root", f"{got} (found: {_labels(entity, left)})", f"{entity}: {asked[entity]}", hint)


def _shown(value: Filter) -> str:
    return "|".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _scans(names: list[Name], cohort: CohortSettings, root: Path) -> tuple[list[Item], list[str]]:
    """A run for each scan: echoes beside their combination are none of their own; alone, they are refused."""
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
            got = f"{len(echoes)} echoes of one scan, and no combination of them"
            hint = "Combine them (fMRIPrep and tedana do), or choose one: `filters: {echo: 2}`"
            problem = RunRefused(source, "echo", got, "one image per scan", hint)
            items.append(replace(_item(echoes[0]), problem=problem))
            continue
        items += [_item(name) for name in group]
    if dropped:
        notes.append(
            f"{dropped} single echoes beside the combined scan are left out (choose one by `filters: {{echo: N}}`)"
        )
    return items, notes


def _item(name: Name) -> Item:
    entities = name.entities
    return Item(
        subject=entities["sub"],
        session=entities.get("ses", ""),
        task=entities.get("task", ""),
        run=entities.get("run", ""),
        variant="_".join(f"{entity}-{entities[entity]}" for entity in VARIANTS if entity in entities),
        bold=name.path,
    )
