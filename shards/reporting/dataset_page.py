"""The report page of a dataset: what it contains, what was refused, and how sessions look.

    slim-brain report DATASET        # also written at the end of slim-brain make-shards

Quality measures of all sessions are summarised, and listed in a table that a browser sorts and filters. Some sessions,
chosen by quality and by key, are drawn (`shards.reporting.pictures`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.conversion.session import by_assumption
from shards.conversion.splits import SPLITS
from shards.core import files
from shards.core.findings import Finding, bad, good, look
from shards.format import layout
from shards.format.reader import Dataset
from shards.format.refusal import Refusal, read_refusals
from shards.format.session_record import SessionRecord
from shards.reporting import chosen_windows, html, pictures, session_table
from shards.reporting.anonymous import without_files, without_names
from shards.reporting.distribution import Outlying, describe, find_outlying
from shards.reporting.windows_view import Given

_ROWS = 100  # largest number of refused or moved sessions listed one by one
_TRS = 4  # more TRs in a cohort are shown as a range


def write(
    folder: str | Path,
    private: bool = False,
    embed: int | None = None,
    drawn: int | None = pictures.DRAWN,
    given: Given | None = None,
) -> Path:
    """Write `DATASET/report/index.html`, and the pictures and interactive views beside it.

    Parameters
    ----------
    folder : str or Path
        A dataset.
    private : bool
        Whether the names of people are replaced by numbers; see `shards.reporting.anonymous`.
    embed : int, optional
        Number of sessions with a picture in the page itself; see `shards.reporting.pictures.number_embedded`.
    drawn : int or None
        Number of sessions with a picture, in the page or beside it; None: all.
    given : Given, optional
        What is known beyond the dataset: parcels and events.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    DatasetError
        If the folder is not a complete dataset, or a sample to be drawn is damaged.
    """
    dataset = Dataset(folder)
    failed = read_refusals(dataset.folder / layout.FAILED)
    given = given or Given()
    if private:
        named = dataset.sessions
        dataset.sessions, failed = without_names(named), without_files(failed)
        given = given.of({hidden.key: one for hidden, one in zip(dataset.sessions, named, strict=True)})
    outlying = find_outlying(dataset.sessions)
    chosen = pictures.choose(dataset.sessions, outlying, embed, drawn)
    embedded = pictures.number_embedded(dataset.sessions, embed)
    path = dataset.folder / layout.REPORT / layout.PAGE
    with html.drawing():
        examples, shown = pictures.draw(dataset, outlying, chosen, embedded, path.parent, given)
        content = html.render(
            "dataset.html",
            scripts=[session_table.SCRIPT],
            pictures_beside=len(chosen) > embedded,
            title=f"Dataset {dataset.folder.resolve().name}",
            lead=_lead(dataset, failed),
            findings=_first_look(dataset, failed, outlying),
            facts=html.Facts(_facts(dataset)),
            cohorts=_cohorts(dataset, failed),
            refused=_refused(failed),
            to_check=_to_check(dataset.sessions),
            quality=describe(dataset.sessions, outlying),
            native=_native(dataset.sessions),
            table=session_table.make(dataset.sessions, dataset.grid, outlying, shown),
            chosen=chosen_windows.describe(dataset, given),
            examples=examples,
        )
    files.write_atomically(path, content)
    return path


def _subjects(sessions: Sequence[SessionRecord]) -> int:
    return len({(session.cohort, session.subject) for session in sessions})


def _lead(dataset: Dataset, failed: list[Refusal]) -> str:
    sessions = dataset.sessions
    hours = sum(session.frames * session.tr for session in sessions) / 3600
    cohorts = html.count(len(dataset.manifest.cohorts), "cohort")
    return (
        f"{html.count(len(sessions), 'session')} of {html.count(_subjects(sessions), 'subject')} from {cohorts}, "
        f"{hours:.1f} hours; {html.count(len(failed), 'scan')} refused."
    )


def _first_look(dataset: Dataset, failed: list[Refusal], outlying: Outlying) -> list[Finding]:
    """The findings at the top of the page."""
    sessions, found = dataset.sessions, []
    homes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for session in sessions:
        homes[session.cohort, session.subject].add(session.split)
    torn = sorted("/".join(subject) for subject, splits in homes.items() if len(splits) > 1)
    if torn:
        found.append(
            bad(
                "splits",
                f"{html.count(len(torn), 'subject')} in more than one split, first {torn[0]}: "
                "scores will be too good. Convert the dataset again.",
            )
        )
    empty = [split for split in SPLITS if not dataset.manifest.sessions.get(split)]
    if empty:
        why = "no share of the subjects, or too few subjects"
        found.append(look("splits_empty", f"No session in {' and '.join(empty)}: {why}."))
    if failed:
        found.append(
            look(
                "refused",
                f"{len(failed)} of {html.count(len(failed) + len(sessions), 'scan')} refused; "
                "see the reasons and what to do below.",
            )
        )
    if outlying:
        found.append(look("quality", f"{html.count(len(outlying), 'session')} of outlying quality, listed below."))
    moved = sum(session.centred_by_mm is not None for session in sessions)
    if moved:
        found.append(
            look(
                "native",
                f"{html.count(moved, 'native-space session')} centred in the grid, but not "
                "registered: a voxel is not the same brain structure in all of them.",
            )
        )
    for field, words in (
        ("space_assumed", "without a given space, or with a space that does not fit the image"),
        ("forms_disagree", "with different left and right in sform and qform; the sform was used"),
        ("dead_share", "with a mask that contains voxels without signal, which were left out"),
        ("repeated_frames", "with volumes that are copies of an earlier one; windows with them were not kept"),
    ):
        if number := sum(bool(getattr(session, field)) for session in sessions):
            found.append(look(field, f'{html.count(number, "session")} {words}: see "To check" below.'))
    assumed = Counter(session.orientation_assumed for session in sessions if session.orientation_assumed)
    for orientation, number in sorted(assumed.items()):
        found.append(
            look(
                "orientation",
                f"{html.count(number, 'session')} without orientation in the header; {orientation} was assumed. Left "
                "and right cannot be verified, and are marked with question marks.",
            )
        )
    whole = sum(session.n_kept == session.n_windows for session in sessions)
    if whole:
        found.append(
            look(
                "windows",
                f"In {whole} of {html.count(len(sessions), 'session')} all windows were kept"
                + ("" if (most := dataset.manifest.windows.keep) == "all" else f", because there are at most {most}")
                + ": the ranking sorts them, but does not drop any.",
            )
        )
    if not torn:
        found.append(good("splits", "No subject is in more than one split."))
    return found


def _facts(dataset: Dataset) -> dict[str, object]:
    manifest, grid, windows = dataset.manifest, dataset.grid, dataset.manifest.windows
    source_trs = sorted({round(session.source_tr, 4) for session in dataset.sessions})
    trs = sorted({round(session.tr, 4) for session in dataset.sessions})
    kept = "all kept" if windows.keep == "all" else f"the {windows.keep} most salient kept"
    ranker = manifest.ranker["name"]
    learned = manifest.ranker.get("extractor")
    size = sum(shard.bytes for shard in manifest.shards)
    return {
        **{
            f"{split}: sessions (subjects)": f"{manifest.sessions[split]} ({manifest.subjects[split]})"
            for split in SPLITS
        },
        "Grid": f"{' × '.join(map(str, grid.shape))} voxels of {grid.mm:g} mm, RAS+",
        "Patch": f"{grid.patch} × {grid.patch} × {grid.patch} voxels",
        "TR": _range(trs, "s") + ("" if source_trs == trs else f", scanned at {_range(source_trs, 's')}"),
        "Windows": f"{windows.frames} frames; {kept}",
        "Parcels": _parcels(dataset),
        "Ranker": f"{ranker}, extractor {learned[:12]}" if learned else ranker,
        "Normalisation": manifest.normalisation,
        "Shards": f"{html.count(len(manifest.shards), 'file')}, {size / 1e9:.3g} GB"
        if size >= 1e9
        else f"{html.count(len(manifest.shards), 'file')}, {size / 1e6:.3g} MB",
        "Format, configuration": f"{manifest.format}, {manifest.configuration_hash[:12]}",
    }


def _parcels(dataset: Dataset) -> str:
    image = dataset.manifest.configuration.get("settings", {}).get("parcels", {}).get("image")
    kind = f"{image['name']}, {image['sha256'][:12]}" if image else "cubes of the brain mask"
    numbers = sorted({session.n_parcels for session in dataset.sessions if session.n_parcels is not None})
    return f"{_range(numbers, 'parcels')}: {kind}" if numbers else kind


def _range(values: Sequence[float], unit: str) -> str:
    return f"{values[0]:g} {unit}" if len(values) == 1 else f"{values[0]:g}–{values[-1]:g} {unit}"


def _cohorts(dataset: Dataset, failed: list[Refusal]) -> list[html.Part]:
    refused = Counter(line.cohort for line in failed)
    of_cohort: dict[str, list[SessionRecord]] = defaultdict(list)
    for session in dataset.sessions:
        of_cohort[session.cohort].append(session)

    def row(name: str, sessions: list[SessionRecord], refused: int) -> list[object]:
        parts = [[s for s in sessions if s.split == split] for split in SPLITS]
        return [
            name,
            *[f"{len(part)} ({_subjects(part)})" for part in parts],
            f"{len(sessions)} ({_subjects(sessions)})",
            refused,
            _trs(sessions),
        ]

    rows = [row(name, of_cohort[name], refused[name]) for name in dataset.manifest.cohorts]
    if len(rows) > 1:
        rows.append(row("all", dataset.sessions, len(failed)))
    parts: list[html.Part] = [
        html.Text("Number of sessions, with the number of subjects in brackets. Splits are by subject."),
        html.Table(["Cohort", *SPLITS, "all", "refused", "TR of the scan, s"], rows, numbers=True),
    ]
    treated = Counter((session.cohort, words) for session in dataset.sessions for words in _treated(session))
    if treated:
        parts.append(html.Text("What was done to scans, or assumed, before harmonising:"))
        parts.append(html.Table(["Cohort", "Treatment", "Sessions"], [[*key, treated[key]] for key in sorted(treated)]))
    return parts


def _trs(sessions: Sequence[SessionRecord]) -> str:
    """TRs with the number of sessions, the most frequent first; without a number if all have the same TR."""
    found = Counter(round(session.source_tr, 4) for session in sessions).most_common()
    if len(found) > _TRS:
        return f"{min(found)[0]:g}–{max(found)[0]:g}"
    return ", ".join(f"{tr:g} ({number})" if len(found) > 1 else f"{tr:g}" for tr, number in found)


def _treated(session: SessionRecord) -> list[str]:
    """What was done to a scan in addition to harmonising, in texts that are equal for similar sessions."""
    found = []
    if session.dropped_frames:
        found.append(f"{html.count(session.dropped_frames, 'leading frame')} dropped")
    if session.orientation_assumed:
        found.append(f"orientation {session.orientation_assumed} assumed")
    if session.mask_source == "computed":
        found.append("brain mask computed from the scan")
    if session.cleaned:
        found.append(f"cleaned: {session.cleaned}")
    return found


def _refused(failed: list[Refusal]) -> list[html.Part]:
    if not failed:
        return [html.Text("None: all scans that were found were converted.")]
    parts: list[html.Part] = []
    advice = [line.hint or "Check the file, and repair it or leave it out of the cohort" for line in failed]
    # The reason ends with the hint, which has its own column in the table.
    rows = [
        [line.key, " ".join(line.reason.removesuffix(line.hint).split()), what]
        for line, what in zip(failed, advice, strict=True)
    ]
    if len(failed) > _ROWS:
        groups = Counter((line.cohort, what) for line, what in zip(failed, advice, strict=True))
        parts.append(
            html.Table(
                ["Cohort", "What to do", "Scans"], [[*group, count] for group, count in groups.most_common(_ROWS)]
            )
        )
        parts.append(html.Text(f"The first {_ROWS} of {len(failed)}; all are in {layout.FAILED}."))
    return [*parts, html.Table(["Scan", "Reason", "What to do"], rows[:_ROWS])]


def _to_check(sessions: Sequence[SessionRecord]) -> list[html.Part]:
    """What was assumed or left out, with the sessions."""
    rows = [[words, len(keys), html.first(keys, 8)] for words, keys in by_assumption(sessions).items()]
    if not rows:
        return []
    intro = "What was assumed about sessions, or left out. If it is wrong, correct the cohort file or the scans."
    return [html.Text(intro), html.Table(["What", "Sessions", "Which"], rows[:_ROWS])]


def _native(sessions: Sequence[SessionRecord]) -> list[html.Part]:
    moved = [(session, session.centred_by_mm) for session in sessions if session.centred_by_mm is not None]
    if not moved:
        return []
    moved.sort(key=lambda item: (-np.linalg.norm(item[1]), item[0].key))
    rows = []
    for session, by_mm in moved[:_ROWS]:
        rows.append([session.key, *[f"{mm:+g}" for mm in by_mm], f"{np.linalg.norm(by_mm):.1f}"])
    more = f" The {_ROWS} of {len(moved)} with the largest shifts:" if len(moved) > _ROWS else ""
    return [
        html.Text(
            "The centre of each brain mask was moved to the centre of the grid. Scans were not "
            f"registered, rotated or scaled.{more}"
        ),
        html.Table(["Session", "right, mm", "front, mm", "up, mm", "distance, mm"], rows, numbers=True),
    ]
