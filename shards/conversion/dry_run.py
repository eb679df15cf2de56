"""The dry run of a conversion, `slim-brain make-shards --dry-run`: what it would find.

Headers, masks and tables are read, but no frames.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shards.cohorts.scan import RunSource
from shards.conversion.convert import Conversion
from shards.conversion.session import Survey, assumptions, survey
from shards.core.errors import RunRefused
from shards.core.files import printable
from shards.core.progress import progress


@dataclass(frozen=True, kw_only=True)
class CohortSurvey:
    """A summary of the scans of a cohort.

    Attributes
    ----------
    runs, subjects, sessions : int
    splits : dict of str to int
        Number of subjects in each split.
    tr, voxel_mm, masks : dict of str to int
        Number of readable scans with each TR (s), each voxel size (mm), and with given and computed masks.
    frames : list of int
        Smallest, median and largest number of frames of a scan; empty if no scan can be opened.
    confounds : int
        Number of scans with a confounds table.
    labels : dict of str to int
        Number of subjects with a value in each column.
    passed_over, notes : list of str
        Ignored files, and notes for the user.
    """

    runs: int
    subjects: int
    sessions: int
    splits: dict[str, int]
    tr: dict[str, int]
    voxel_mm: dict[str, int]
    frames: list[int]
    masks: dict[str, int]
    confounds: int
    labels: dict[str, int]
    passed_over: list[str]
    notes: list[str]


def look(conversion: Conversion) -> tuple[list[tuple[RunSource, Survey]], list[RunRefused]]:
    """Check the header, mask and tables of every scan; returns the facts, and the scans that will be refused."""

    def one(run: RunSource) -> Survey | RunRefused:
        try:
            return survey(run, conversion.settings)
        except RunRefused as refused:
            return refused

    found: list[tuple[RunSource, Survey]] = []
    refused: list[RunRefused] = []
    with (
        progress("look", len(conversion.runs), "runs") as advance,
        ThreadPoolExecutor(conversion.workers) as pool,
    ):
        for run, result in zip(conversion.runs, pool.map(one, conversion.runs), strict=True):
            if isinstance(result, RunRefused):
                refused.append(result)
            else:
                found.append((run, result))
            advance(1, run.key)
    return found, refused


def line(run: RunSource, facts: Survey, split: str) -> str:
    """Describe a scan in one line."""
    size = " x ".join(f"{edge:g}" for edge in facts.voxel_mm)
    moved = f", moved by {facts.centred_by_mm} mm" if facts.centred_by_mm is not None else ""
    notes = "".join(f"; {words}" for words in assumptions(facts))
    tr_source = "sidecar" if facts.tr_source.endswith(".json") else facts.tr_source
    return (
        f"{split:<5} {run.key}  {run.source}  {facts.frames} frames, TR {facts.tr:g} s ({tr_source}), "
        f"{size} mm, mask {'computed' if run.mask is None else 'given'}{moved}{notes}"
    )


def cohorts(conversion: Conversion, found: list[tuple[RunSource, Survey]]) -> dict[str, CohortSurvey]:
    """Summarise each cohort: counts of all scans, and TRs, voxel sizes, masks and frames of the readable ones."""
    opened: dict[str, list[Survey]] = defaultdict(list)
    for run, facts in found:
        opened[run.cohort].append(facts)
    result = {}
    for cohort in conversion.found:
        runs, facts_of = cohort.runs, opened[cohort.settings.name]
        labelled = Counter(
            column
            for labels in {run.person: run.labels for run in runs}.values()
            for column, value in labels.items()
            if value is not None
        )
        people = {run.person for run in runs}
        frames = sorted(facts.frames for facts in facts_of)
        result[cohort.settings.name] = CohortSurvey(
            runs=len(runs),
            subjects=len(people),
            sessions=len({(run.person, run.session) for run in runs}),
            splits=dict(Counter(conversion.splits.get(person, "refused") for person in sorted(people))),
            tr=_counts(f"{facts.tr:g}" for facts in facts_of),
            voxel_mm=_counts(" x ".join(f"{edge:g}" for edge in facts.voxel_mm) for facts in facts_of),
            frames=[frames[0], frames[len(frames) // 2], frames[-1]] if frames else [],
            masks=_counts("computed" if run.mask is None else "given" for run in runs),
            confounds=sum(run.confounds is not None for run in runs),
            labels=dict(sorted(labelled.items())),
            passed_over=[printable(path) for path in cohort.passed_over],
            notes=cohort.notes,
        )
    return result


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def words(name: str, facts: CohortSurvey) -> list[str]:
    """Describe a cohort in a few lines."""

    def listed(counts: dict[str, int], unit: str = "") -> str:
        return ", ".join(f"{value}{unit} ({count})" for value, count in counts.items())

    everybody = facts.subjects
    splits = ", ".join(f"{count} {split}" for split, count in facts.splits.items())
    lines = [f"{name}: {facts.runs} runs, {facts.sessions} sessions, {everybody} subjects ({splits})"]
    if facts.frames:
        least, middle, most = facts.frames
        lines += [
            f"  TR: {listed(facts.tr, ' s')}; frames: {least} to {most}, median {middle}",
            f"  voxels: {listed(facts.voxel_mm, ' mm')}",
        ]
    labels = [
        column if count == everybody else f"{column} (of {count} subjects)" for column, count in facts.labels.items()
    ]
    more = f" and {len(labels) - 20} more" if len(labels) > 20 else ""
    return [
        *lines,
        f"  masks: {listed(facts.masks)}; confounds tables: {facts.confounds}",
        f"  labels: {', '.join(labels[:20]) or 'none'}{more}",
    ]
