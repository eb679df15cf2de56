"""The page people look at before they train: what is in a dataset, what was refused, and what it looks like.

    python tools/report.py DATASET        # also written at the end of make_shards.py

Numbers of all sessions are summarised; pictures are drawn of a handful, chosen by quality and by key, so the
page of thousands of sessions is as long as that of fifty.

Legend: X, Y, Z voxels of the grid (RAS+); R parcels; T frames; W windows; K kept windows; S sessions.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shards import html, layout, picture
from shards.reader import Dataset
from shards.split import SPLITS

Session = dict[str, Any]
Outlying = dict[str, dict[str, str]]  # key: field: words

_ROWS = 100  # refused or moved sessions listed one by one
_OUTLYING = 30  # outlying sessions named
_EXAMPLES, _MOST_EXAMPLES = 6, 12  # sessions drawn; more than six only where there are more than five cohorts
_DOTS = 150  # sessions drawn as dots per cohort
_LANES = 12  # cohorts with a lane of their own
_FEW = 8  # a cohort of fewer sessions is judged by the quartiles of the whole dataset


@dataclass(frozen=True)
class Measure:
    """A quality number: field of the session, title, unit, bad side, and the least spread taken as real."""

    field: str
    title: str
    unit: str
    bad: str
    least: float

    def of(self, session: Session) -> float:
        """Its value in `unit`; NaN where the session has none."""
        value = session.get(self.field)
        if value is None:
            return np.nan
        if self.field == "dvars_outliers":
            return 100 * value / max(session["frames"] - 1, 1)
        return 100 * value if self.unit == "%" else value


MEASURES = (
    Measure("tsnr", "Temporal signal-to-noise ratio", "", "low", 2),
    Measure("dvars_outliers", "Frames with an outlying DVARS", "%", "high", 2),
    Measure("mean_fd_mm", "Mean framewise displacement", "mm", "high", 0.05),
    Measure("brain_ml", "Brain volume", "ml", "both", 50),
    Measure("mask_outside_grid", "Brain mask outside the grid", "%", "high", 0.5),
)


def write(folder: str | Path) -> Path:
    """Write `DATASET/report/index.html`.

    Parameters
    ----------
    folder : str or Path
        A dataset.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    DatasetError
        If the folder is no whole dataset, or a sample that is to be drawn is damaged.
    """
    dataset = Dataset(folder)
    failed = layout.read_lines(dataset.folder / layout.FAILED)
    outlying = find_outlying(dataset.sessions)
    with html.drawing():
        content = html.page(
            f"Dataset {dataset.folder.resolve().name}",
            _lead(dataset, failed),
            html.notes(_first_look(dataset, failed, outlying)),
            html.facts(_facts(dataset)),
            html.section("Cohorts and splits", *_cohorts(dataset, failed)),
            html.section("Refused runs", *_refused(failed)),
            html.section("Quality", *_quality(dataset.sessions, outlying)),
            html.section("Native-space sessions", *_native(dataset.sessions)),
            html.section("Sessions to look at", *_examples(dataset, outlying)),
        )
    path = dataset.folder / layout.REPORT / "index.html"
    layout.write_atomically(path, content)
    return path


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _subjects(sessions: Sequence[Session]) -> int:
    return len({(session["cohort"], session["subject"]) for session in sessions})


def _lead(dataset: Dataset, failed: list[Session]) -> str:
    sessions = dataset.sessions
    hours = sum(session["frames"] * session["tr"] for session in sessions) / 3600
    cohorts = _count(len(dataset.manifest["cohorts"]), "cohort")
    return (
        f"{_count(len(sessions), 'session')} of {_count(_subjects(sessions), 'subject')} from {cohorts}, "
        f"{hours:.1f} hours; {_count(len(failed), 'run')} refused."
    )


def _first_look(dataset: Dataset, failed: list[Session], outlying: Outlying) -> list[tuple[str, str]]:
    """What a reader should know before anything else."""
    sessions, found = dataset.sessions, []
    homes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for session in sessions:
        homes[session["cohort"], session["subject"]].add(session["split"])
    torn = sorted("/".join(subject) for subject, splits in homes.items() if len(splits) > 1)
    if torn:
        found.append(
            (
                "bad",
                f"{_count(len(torn), 'subject')} in more than one split, first {torn[0]}: "
                "scores will be too good. Make the dataset anew.",
            )
        )
    empty = [split for split in SPLITS if not dataset.manifest["sessions"].get(split)]
    if empty:
        found.append(("look", f"No session in {' and '.join(empty)}: too few subjects for the shares."))
    if failed:
        found.append(
            (
                "look",
                f"{len(failed)} of {_count(len(failed) + len(sessions), 'run')} refused; "
                "reasons and remedies are below.",
            )
        )
    if outlying:
        found.append(("look", f"{_count(len(outlying), 'session')} of outlying quality, named below."))
    moved = sum("centred_by_mm" in session for session in sessions)
    if moved:
        found.append(
            (
                "look",
                f"{_count(moved, 'native-space session')} moved to the middle of the grid; "
                "nothing was registered, so a place does not mean the same structure in all "
                "of them.",
            )
        )
    whole = sum(session["n_kept"] == session["n_windows"] for session in sessions)
    if whole:
        found.append(
            (
                "look",
                f"In {whole} of {_count(len(sessions), 'session')} every window was kept, as "
                f"there are no more than {dataset.manifest['windows']['keep']}: the ranking "
                "orders them but drops none.",
            )
        )
    if not torn:
        found.append(("good", "No subject is in more than one split."))
    return found


def _facts(dataset: Dataset) -> dict[str, object]:
    manifest, grid, windows = dataset.manifest, dataset.grid, dataset.manifest["windows"]
    source_trs = sorted({round(session["source_tr"], 4) for session in dataset.sessions})
    trs = sorted({round(session["tr"], 4) for session in dataset.sessions})
    ranker = manifest["ranker"]["name"]
    learned = manifest["ranker"].get("extractor")
    size = sum(shard["bytes"] for shard in manifest["shards"])
    return {
        **{
            f"{split}: sessions (subjects)": f"{manifest['sessions'][split]} ({manifest['subjects'][split]})"
            for split in SPLITS
        },
        "Grid": f"{' × '.join(map(str, grid.shape))} voxels of {grid.mm:g} mm, RAS+",
        "Patch": f"{grid.patch} × {grid.patch} × {grid.patch} voxels",
        "TR": _range(trs, "s") + ("" if source_trs == trs else f", scanned at {_range(source_trs, 's')}"),
        "Windows": f"{windows['frames']} frames; the {windows['keep']} most salient kept",
        "Ranker": f"{ranker}, extractor {learned[:12]}" if learned else ranker,
        "Normalisation": manifest["normalisation"],
        "Shards": f"{_count(len(manifest['shards']), 'file')}, {size / 1e9:.3g} GB"
        if size >= 1e9
        else f"{_count(len(manifest['shards']), 'file')}, {size / 1e6:.3g} MB",
        "Format, configuration": f"{manifest['format']}, {manifest['configuration_hash'][:12]}",
    }


def _range(values: Sequence[float], unit: str) -> str:
    return f"{values[0]:g} {unit}" if len(values) == 1 else f"{values[0]:g}–{values[-1]:g} {unit}"


def _cohorts(dataset: Dataset, failed: list[Session]) -> list[str]:
    refused = Counter(line["cohort"] for line in failed)
    of_cohort: dict[str, list[Session]] = defaultdict(list)
    for session in dataset.sessions:
        of_cohort[session["cohort"]].append(session)

    def row(name: str, sessions: list[Session], refused: int) -> list[object]:
        parts = [[s for s in sessions if s["split"] == split] for split in SPLITS]
        return [
            name,
            *[f"{len(part)} ({_subjects(part)})" for part in parts],
            f"{len(sessions)} ({_subjects(sessions)})",
            refused,
        ]

    rows = [row(name, of_cohort[name], refused[name]) for name in dataset.manifest["cohorts"]]
    if len(rows) > 1:
        rows.append(row("all", dataset.sessions, len(failed)))
    return [
        html.text("Sessions, and in brackets the subjects they come from. Splits are by subject."),
        html.table(["Cohort", *SPLITS, "all", "refused"], rows, numbers=True),
    ]


def _refused(failed: list[Session]) -> list[str]:
    if not failed:
        return [html.text("None: every run that was found was converted.")]
    parts = []
    advice = [line["hint"] or "Look at the file: mend it, or leave it out of the cohort" for line in failed]
    # The reason repeats the hint at its end; in the table it has a column of its own.
    rows = [
        [line["key"], " ".join(line["reason"].removesuffix(line["hint"]).split()), what]
        for line, what in zip(failed, advice, strict=True)
    ]
    if len(failed) > _ROWS:
        groups = Counter((line["cohort"], what) for line, what in zip(failed, advice, strict=True))
        parts.append(
            html.table(
                ["Cohort", "What to do", "Runs"], [[*group, count] for group, count in groups.most_common(_ROWS)]
            )
        )
        parts.append(html.text(f"The first {_ROWS} of {len(failed)}; all are in {layout.FAILED}."))
    return [*parts, html.table(["Run", "Reason", "What to do"], rows[:_ROWS])]


def find_outlying(sessions: Sequence[Session]) -> Outlying:
    """Sessions whose quality lies outside that of their cohort, worst first.

    A number is outlying if it lies beyond the quartiles by more than 1.5 interquartile ranges (the box-plot
    rule), on its bad side. Quartiles are those of the cohort, or of all sessions for a cohort with fewer than
    eight.

    Returns
    -------
    dict of str to dict of str to str
        Key of the session to the fields that are outlying, each in words.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for number, session in enumerate(sessions):
        members[session["cohort"]].append(number)
    worst = np.zeros(len(sessions))
    words: dict[int, dict[str, str]] = defaultdict(dict)
    for measure in MEASURES:
        value_S = np.array([measure.of(session) for session in sessions])
        for part in members.values():
            judged_by = value_S[part] if len(part) >= _FEW else value_S
            judged_by = judged_by[np.isfinite(judged_by)]
            if not len(judged_by):
                continue
            low, high = np.percentile(judged_by, [25, 75])
            spread = max(high - low, measure.least)
            for number in part:
                value = value_S[number]
                below = (low - value) / spread if measure.bad != "high" else 0.0
                above = (value - high) / spread if measure.bad != "low" else 0.0
                beyond = max(below, above)
                if beyond > 1.5:
                    worst[number] = max(worst[number], beyond)
                    words[number][measure.field] = (
                        f"{measure.title} {_number(value, measure)} (middle half "
                        f"{_number(low, measure)} to {_number(high, measure)})"
                    )
    order = sorted(words, key=lambda number: (-worst[number], sessions[number]["key"]))
    return {sessions[number]["key"]: words[number] for number in order}


def _number(value: float, measure: Measure) -> str:
    return f"{value:.4g} {measure.unit}".rstrip()


def _quality(sessions: Sequence[Session], outlying: Outlying) -> list[str]:
    present = [measure for measure in MEASURES if any(np.isfinite(measure.of(s)) for s in sessions)]
    rows = []
    for measure in present:
        value_S = np.array([measure.of(session) for session in sessions])
        value_S = value_S[np.isfinite(value_S)]
        marks = [_number(mark, measure) for mark in np.percentile(value_S, [0, 5, 50, 95, 100])]
        rows.append([measure.title, len(value_S), *marks])
    parts = [
        html.table(["Number", "Sessions", "Lowest", "5 %", "Median", "95 %", "Highest"], rows, numbers=True),
        html.picture(
            _draw_quality(sessions, present, outlying),
            "Quality numbers of the sessions, a lane per cohort",
            "A dot per session (of large cohorts a selection), a lane per cohort; the line marks the median, "
            "the box the middle half. Orange diamonds are outlying sessions. Cohorts may differ in level "
            "(scanner, smoothing, voxel size); look at a session that is far from its own cohort.",
        ),
    ]
    if not outlying:
        return [*parts, html.text("No session lies outside its cohort by the box-plot rule.")]
    where = {session["key"]: session["split"] for session in sessions}
    named = [[key, where[key], "; ".join(outlying[key].values())] for key in list(outlying)[:_OUTLYING]]
    parts.append(
        html.text(
            f"{_count(len(outlying), 'session')} beyond the quartiles of the cohort by more than 1.5 "
            "interquartile ranges, worst "
            "first"
            + (f" (the first {_OUTLYING})." if len(outlying) > _OUTLYING else ".")
            + " They are in the dataset: decide whether to leave them out of the cohort."
        )
    )
    return [*parts, html.table(["Session", "Split", "What is outlying"], named)]


def _draw_quality(sessions: Sequence[Session], measures: Sequence[Measure], outlying: Outlying) -> Figure:
    sizes = Counter(session["cohort"] for session in sessions)
    names = [name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_LANES]]
    rest = "other cohorts"
    lanes = [*sorted(names), *([rest] if len(sizes) > len(names) else [])]
    figure = Figure(figsize=(11, 0.75 + 0.42 * len(lanes) + 0.9 * (len(lanes) == 1)), layout="constrained")
    row = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(row, measures, strict=True):
        for lane, name in enumerate(lanes):
            mine = [s for s in sessions if s["cohort"] == name or (name == rest and s["cohort"] not in names)]
            mine = [s for s in mine if np.isfinite(measure.of(s))]
            if not mine:
                continue
            mine.sort(key=lambda s: (measure.of(s), s["key"]))
            value_S = np.array([measure.of(s) for s in mine])
            far_S = np.array([measure.field in outlying.get(s["key"], ()) for s in mine])
            low, middle, high = np.percentile(value_S, [25, 50, 75])
            axes.fill_betweenx([lane - 0.34, lane + 0.34], low, high, color=html.PALE, alpha=0.6, lw=0)
            axes.plot([middle, middle], [lane - 0.34, lane + 0.34], color=html.INK, lw=2, zorder=4)
            shown = np.flatnonzero(~far_S)
            shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), _DOTS)).astype(int)]
            # golden-ratio steps spread the dots evenly without a random number
            height_S = lane + 0.6 * ((np.arange(len(value_S)) * 0.618034) % 1 - 0.5)
            axes.plot(value_S[shown], height_S[shown], ".", ms=5, color=html.SKY, alpha=0.8, mew=0)
            axes.plot(value_S[far_S], height_S[far_S], "D", ms=4.5, color=html.ORANGE, mec=html.INK, mew=0.5)
        lowest, highest = axes.dataLim.intervalx
        margin = max(0.06 * (highest - lowest), measure.least / 4)  # tiny differences are not blown up
        axes.set_xlim(max(lowest - margin, -margin / 4), highest + margin)  # none of the numbers is negative
        axes.set_title(_wrapped(measure.title), fontsize=9)
        axes.set_xlabel(measure.unit or "ratio")
        axes.grid(axis="x")
        axes.set_yticks(range(len(lanes)), [name if len(name) < 24 else name[:22] + "…" for name in lanes])
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    return figure


def _wrapped(words: str) -> str:
    """Broken in two lines at the space nearest to the middle."""
    spaces = [place for place, letter in enumerate(words) if letter == " "]
    if len(words) < 20 or not spaces:
        return words
    place = min(spaces, key=lambda space: abs(space - len(words) / 2))
    return f"{words[:place]}\n{words[place + 1 :]}"


def _native(sessions: Sequence[Session]) -> list[str]:
    moved = [session for session in sessions if "centred_by_mm" in session]
    if not moved:
        return []
    moved.sort(key=lambda session: (-np.linalg.norm(session["centred_by_mm"]), session["key"]))
    rows = []
    for session in moved[:_ROWS]:
        by_mm = session["centred_by_mm"]
        rows.append([session["key"], *[f"{mm:+g}" for mm in by_mm], f"{np.linalg.norm(by_mm):.1f}"])
    more = f" The {_ROWS} of {len(moved)} moved farthest:" if len(moved) > _ROWS else ""
    return [
        html.text(
            "The middle of each brain mask was moved to the middle of the grid. Nothing was "
            f"registered, turned or scaled.{more}"
        ),
        html.table(["Session", "right, mm", "front, mm", "up, mm", "distance, mm"], rows, numbers=True),
    ]


def choose_examples(sessions: Sequence[Session], outlying: Outlying) -> list[Session]:
    """The sessions that are drawn: the two of worst quality, then one cohort after the other.

    Within a cohort the order is that of a hash of the key: arbitrary, but the same every time.
    """
    of_key = {session["key"]: session for session in sessions}
    chosen = list(outlying)[:2]
    queues: dict[str, list[str]] = defaultdict(list)
    for key in sorted(of_key, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if key not in chosen:
            queues[of_key[key]["cohort"]].append(key)
    total = min(max(_EXAMPLES, len(queues) + len(chosen)), _MOST_EXAMPLES)
    turn = 0
    while len(chosen) < total and any(len(queue) > turn for queue in queues.values()):
        chosen += [queues[cohort][turn] for cohort in sorted(queues) if len(queues[cohort]) > turn]
        turn += 1
    return [of_key[key] for key in chosen[:total]]


def _examples(dataset: Dataset, outlying: Outlying) -> list[str]:
    parts = [
        html.text(
            "Left: the mean image with the outline of its brain mask (orange) and that of the MNI152 brain "
            "(blue, dashed); the two should agree in MNI space. The left of the picture is the left of the "
            "brain. Right, on one time axis: the parcels' signal, each z-scored; the saliency of every window; "
            "DVARS and global signal of the parcels' means. Faint blue bands repeat the most salient windows. A "
            "good ranking avoids spikes of DVARS and does not simply follow the global signal."
        )
    ]
    outline = picture.template()
    names = ("baseline", "brain", "patch", "roi", "scores", "start")
    for session in choose_examples(dataset.sessions, outlying):
        arrays = dataset.read(session, names)
        shown = picture.Shown(dataset.grid, dataset.frames, session, arrays)
        words = [
            f"{session['cohort']}, subject {session['subject']}, {session['split']}; "
            f"{session['frames']} frames of {session['tr']:g} s; tSNR {session['tsnr']:g}; "
            f"{_count(session['n_kept'], 'window')} of {session['n_windows']} kept.",
            shown.words(),
        ]
        if session["key"] in outlying:
            words.append(f"Outlying: {'; '.join(outlying[session['key']].values())}.")
        if "centred_by_mm" in session:
            moved = ", ".join(f"{mm:+g}" for mm in session["centred_by_mm"])
            words.append(f"Native space: moved by ({moved}) mm to the grid's middle; nothing was registered.")
        alt = f"Slices of the mean image, parcels, saliency, DVARS and global signal of {session['key']}"
        parts += [html.heading(session["key"]), html.picture(shown.draw(outline), alt, " ".join(words))]
    return parts
