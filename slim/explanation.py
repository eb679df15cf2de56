"""Looking inside: where in the brain, and when, the predictions of a task come from; as NIfTI, pictures and facts.

    RUN/report/explain/
        TASK.nii.gz            mean over the sessions: share of each voxel, signed; its sum is the mean of f(x) - f(x')
        TASK_absolute.nii.gz   mean over the sessions: mean over frames of the size of the shares
        TASK_anatomy.nii.gz    with `start: empty`: share of each voxel's run mean, signed
        TASK/KEY.nii.gz ...    the same of each session
        TASK.png               both maps on the mean image;  TASK_windows.png  ranking and shares over time
        TASK.json              facts: scores, gaps, windows, strongest places

Maps lie on the grid of the dataset. A session is explained by the probe of the fold that its subject was not in. Where
states are decoded, what is explained is the mean over all windows of a session that are in one state.

Legend: X, Y, Z voxels of the grid; K windows in time order; F frames; M patches; V voxels of a patch.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter

from shards import html, picture
from shards.errors import ConfigError
from shards.grid import Grid
from shards.layout import dump, write_atomically
from shards.patches import scatter
from shards.reader import Dataset
from slim.attribution import TOLERANCE, Attribution, Start, integrated_gradients
from slim.brain import SlimBrain
from slim.pooling import Features
from slim.probe import make_fold, scale_of
from slim.score import fit_score, fit_state_score
from slim.splits import Fold
from slim.task import Cases, Task, make_splits

FOLDER = "explain"
ABSOLUTE, ANATOMY = "_absolute", "_anatomy"
_DRAWN = 3  # sessions whose windows are drawn
_PLACES, _APART_MM = 5, 20.0  # strongest places that are named, and how far apart they lie
_FWHM_MM = 8.0  # of the smoothing of pictures and places; never of the maps themselves
_SLICES = 7
_SHOWN = 90  # percentile of the map above which a picture colours it


@dataclass(frozen=True)
class Asked:
    """A session to explain, and the probe that has not seen its subject.

    Attributes
    ----------
    row : of the task, one of the session
    fold : Fold
    unit : what one of the fold's z-scored answers is in the unit of the label
    start_w : starts (s) of the windows in the state; None where sessions answer
    """

    row: int
    fold: Fold
    unit: float
    start_w: np.ndarray | None = None


def check_task(task: Task, where: str | Path) -> None:
    """Refuse a task that fits no probe.

    Raises
    ------
    ConfigError
    """
    if task.type == "fingerprint":
        expected = "classification, regression or state: the prediction of a probe is what is explained"
        raise ConfigError(where, "type", task.type, expected)


def choose(task: Task, cases: Cases, where: str | Path, subjects: int, output: int = 0) -> list[Asked]:
    """Test sessions of the first repeat: those of so many subjects, spread evenly over the classes or values.

    Where states are decoded: sessions with windows of the class `output`, of subjects spread evenly over all.
    """
    folds = _folds(task, cases, where)
    if cases.window_N is not None and cases.state_N is not None:
        in_state_N = cases.state_N == output
        tested = np.unique(cases.subject_N[np.concatenate([fold.test for fold, _ in folds])])
        chosen = _spread(tested[np.isin(tested, cases.subject_N[in_state_N])], subjects)
        asked = []
        for fold, unit in folds:
            rows = fold.test[in_state_N[fold.test] & np.isin(cases.subject_N[fold.test], chosen)]
            keys = np.array([cases.sessions[row]["key"] for row in rows])
            for key in np.unique(keys):
                of_session = rows[keys == key]
                asked.append(Asked(int(of_session[0]), fold, unit, cases.window_N[of_session]))
        return asked
    tested = np.unique(np.concatenate([cases.subject_N[fold.test] for fold, _ in folds]))
    ordered = tested[np.argsort(cases.truth_S[tested], kind="stable")]
    chosen = _spread(ordered, subjects)
    return [Asked(int(row), fold, unit) for fold, unit in folds for row in fold.test if cases.subject_N[row] in chosen]


def _spread(ordered: np.ndarray, count: int) -> np.ndarray:
    """So many of them, at even distances."""
    return ordered[np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))]


def _folds(task: Task, cases: Cases, where: str | Path) -> list[tuple[Fold, float]]:
    """The folds of the first repeat, as a probe has them, each with what one of its z-scored answers is worth."""
    found = []
    for number, split in enumerate(make_splits(task, cases, where)[0]):
        unit = 1.0
        if task.type == "regression":
            unit = scale_of(cases, split.fitted)[1]
        found.append((make_fold(task, cases, split, number)[0], unit))
    return found


def explain(
    model: SlimBrain,
    dataset: Dataset,
    task: Task,
    cases: Cases,
    asked: Sequence[Asked],
    features: Mapping[str, Features],
    output: int,
    start: Start,
    tolerance: float = TOLERANCE,
) -> Iterator[tuple[dict[str, Any], Attribution]]:
    """The sessions asked for, one after another, with their shares.

    Parameters
    ----------
    features : mapping of str to Features
        Of all sessions of the task, by key.
    output : int
        Class whose logit is explained; not used in a regression.
    start, tolerance : see `slim.attribution.integrated_gradients`
    """
    once, each = ([features[s["key"]] for s in rows] for rows in (cases.distinct(), cases.sessions))
    fold = None
    for item in asked:
        session = cases.sessions[item.row]
        if item.start_w is not None:
            if fold is not item.fold:
                of_windows = fit_state_score(once, cases, task.pooling, item.fold, output)
            score = of_windows(features[session["key"]], item.start_w)
        elif fold is not item.fold:
            score = fit_score(each, task.pooling, task.components, item.fold, output, item.unit)
        fold = item.fold
        yield session, integrated_gradients(model, dataset, session, score, start, tolerance)


@dataclass
class Maps:
    """Maps of one session, or their mean, (X, Y, Z) on the dataset's grid; 0 outside the brain.

    Attributes
    ----------
    signed : sum over frames of the shares of the fluctuation
    absolute : mean over frames of their sizes
    anatomy : shares of the run means; None where the anatomy stayed
    """

    signed: np.ndarray
    absolute: np.ndarray
    anatomy: np.ndarray | None

    @classmethod
    def of(cls, found: Attribution, grid: Grid, start: Start) -> Maps:
        def volume(value_MV: np.ndarray) -> np.ndarray:
            return scatter(value_MV.astype(np.float32), found.patch_M3, grid.shape, grid.patch)

        signed_MV = found.value_KFMV.sum(axis=(0, 1), dtype=np.float64)
        absolute_MV = np.abs(found.value_KFMV).mean(axis=(0, 1), dtype=np.float64)
        anatomy = volume(found.anatomy_MV) if start == "empty" else None
        return cls(volume(signed_MV), volume(absolute_MV), anatomy)

    def named(self) -> dict[str, np.ndarray]:
        """The maps by the ending of their files."""
        maps = {"": self.signed, ABSOLUTE: self.absolute}
        return maps if self.anatomy is None else maps | {ANATOMY: self.anatomy}


@dataclass
class Mean:
    """A mean over sessions, added up one by one."""

    count: int = 0
    total: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, maps: Mapping[str, np.ndarray]) -> None:
        self.count += 1
        for name, volume in maps.items():
            self.total[name] = self.total.get(name, 0) + volume.astype(np.float64)

    def named(self) -> dict[str, np.ndarray]:
        return {name: (volume / self.count).astype(np.float32) for name, volume in self.total.items()}


def image(volume_XYZ: np.ndarray, grid: Grid, registered: bool) -> nib.Nifti1Image:
    """A map as NIfTI on the dataset's grid; in MNI space if its sessions are, else aligned with nothing but itself."""
    made = nib.Nifti1Image(volume_XYZ, grid.affine)
    code = "mni" if registered else "aligned"
    made.set_sform(grid.affine, code)
    made.set_qform(grid.affine, code)
    made.header.set_xyzt_units("mm")
    return made


def save(path: Path, made: nib.Nifti1Image) -> None:
    """Write `.nii.gz` atomically; equal maps give equal bytes."""
    write_atomically(path, gzip.compress(made.to_bytes(), compresslevel=6, mtime=0))


def smooth(made: nib.Nifti1Image) -> np.ndarray:
    """A map smoothed inside the brain (its voxels that are not 0), for the eye: shares of single voxels are noisy."""
    volume_XYZ = np.asarray(made.dataobj, np.float64)
    inside_XYZ = (volume_XYZ != 0).astype(np.float64)
    mm = float(abs(made.affine[0, 0]))
    sigma = max(_FWHM_MM, 1.5 * mm) / 2.355 / mm
    whole_XYZ = np.maximum(gaussian_filter(inside_XYZ, sigma), 1e-12)
    return np.where(inside_XYZ > 0, gaussian_filter(volume_XYZ, sigma) / whole_XYZ, 0)


def places(absolute: nib.Nifti1Image) -> list[dict[str, Any]]:
    """The strongest places of a smoothed map that lie apart: mm (three) and value, largest first."""
    smooth_XYZ = smooth(absolute)
    index_N3 = np.argwhere(smooth_XYZ > 0)
    mm_N3, value_N = apply_affine(absolute.affine, index_N3), smooth_XYZ[tuple(index_N3.T)]
    found: list[dict[str, Any]] = []
    while len(found) < _PLACES and (value_N > 0).any():
        best = int(value_N.argmax())
        found.append({"mm": [round(float(x), 1) for x in mm_N3[best]], "value": float(value_N[best])})
        value_N = np.where(((mm_N3 - mm_N3[best]) ** 2).sum(axis=1) < _APART_MM**2, 0, value_N)
    return found


def window_facts(dataset: Dataset, session: dict[str, Any], found: Attribution) -> list[dict[str, float]]:
    """Each kept window, in time order: start (s), saliency, mean size of its brain voxels' shares, and their sum."""
    arrays = dataset.read(session, ("brain", "scores"))
    inside_MV = arrays["brain"] > 0
    return [
        {
            "start_s": round(float(start * session["tr"]), 3),
            "saliency": float(arrays["scores"][start // dataset.frames]),
            "mean_absolute": float(np.abs(value_FMV[:, inside_MV]).mean()),
            "sum": float(value_FMV.sum(dtype=np.float64)),
        }
        for start, value_FMV in zip(found.start_K, found.value_KFMV, strict=True)
    ]


def write(
    folder: Path,
    dataset: Dataset,
    task: Task,
    cases: Cases,
    explained: Iterator[tuple[dict[str, Any], Attribution]],
    start: Start,
    facts: dict[str, Any],
    advance: Callable[[int, str], None],
    events: Callable[[dict[str, Any]], pd.DataFrame] | None = None,
) -> dict[str, Any]:
    """Write maps, pictures and facts of a task as the sessions come.

    Parameters
    ----------
    folder : Path
        RUN/report/explain.
    explained : iterator
        Of `explain`.
    facts : dict
        What is known before; written with the rest.
    advance : callable
        Told after each session.
    events : callable, optional
        The events of a session, as `slim.events.read` gives them, to be drawn with its windows.

    Returns
    -------
    dict
        The facts, as TASK.json holds them.
    """
    grid, mean, under, sessions = dataset.grid, Mean(), Mean(), []
    registered = all(session["space"] != "native" for session in cases.sessions)
    for session, found in explained:
        maps = Maps.of(found, grid, start).named()
        for ending, volume in maps.items():
            save(folder / task.name / f"{session['key']}{ending}.nii.gz", image(volume, grid, registered))
        mean.add(maps)
        arrays = dataset.read(session, ("baseline", "brain", "patch"))
        baseline_MV = np.where(arrays["brain"] > 0, arrays["baseline"], 0)
        under.add({"": scatter(baseline_MV, arrays["patch"], grid.shape, grid.patch)})
        sessions.append(
            {
                "key": session["key"],
                "subject": session["subject"],
                "score": found.score,
                "at_start": found.at_start,
                "sum": found.total,
                "gap": found.gap,
                "complete": found.complete,
                "points": found.points,
                "windows": window_facts(dataset, session, found),
            }
        )
        advance(1, f"{session['key']}, {found.points} points")
    images = {ending: image(volume, grid, registered) for ending, volume in mean.named().items()}
    for ending, made in images.items():
        save(folder / f"{task.name}{ending}.nii.gz", made)
    facts = facts | {"space": "MNI" if registered else "native", "places": places(images[ABSOLUTE])}
    facts["sessions"] = sorted(sessions, key=lambda line: line["key"])
    with html.drawing():
        draw_maps(images, image(under.named()[""], grid, registered), folder / f"{task.name}.png")
        draw_windows(dataset, facts, cases, events, folder / f"{task.name}_windows.png")
    write_atomically(folder / f"{task.name}.json", dump(facts) + "\n")
    return facts


def draw_maps(images: dict[str, nib.Nifti1Image], under: nib.Nifti1Image, path: Path) -> None:
    """Axial slices of each map, smoothed, on the mean image of the sessions; a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from nilearn.plotting import plot_stat_map

    titles = {
        ABSOLUTE: "Size of the shares, mean over frames",
        "": "Shares of the fluctuation, sum over frames",
        ANATOMY: "Shares of the anatomy",
    }
    shown = [ending for ending in titles if ending in images]
    height_N = np.argwhere(np.asarray(under.dataobj) != 0)[:, 2]  # of the voxels of the brain
    low, high = np.percentile(height_N, [8, 92])
    cuts = under.affine[2, 3] + under.affine[2, 2] * np.linspace(low, high, _SLICES).round()
    figure = plt.figure(figsize=(11, 2.4 * len(shown)))
    try:
        for number, ending in enumerate(shown):
            volume_XYZ = smooth(images[ending])
            size = np.abs(volume_XYZ[volume_XYZ != 0])
            top = 1 - number / len(shown)
            figure.text(0.01, top - 0.01, titles[ending], va="top", weight="bold")
            plot_stat_map(
                nib.Nifti1Image(volume_XYZ.astype(np.float32), images[ending].affine),
                under,
                display_mode="z",
                cut_coords=cuts,
                figure=figure,
                axes=(0, top - 1 / len(shown), 1, 0.88 / len(shown)),
                threshold=float(np.percentile(size, _SHOWN)) if len(size) else 0.0,
                vmax=float(size.max()) if len(size) else 1.0,
                cmap="inferno" if ending == ABSOLUTE else "RdBu_r",
                symmetric_cbar=ending != ABSOLUTE,
                black_bg=False,
                draw_cross=False,
                cbar_tick_format="%.1g",
                resampling_interpolation="nearest",
            )
        write_atomically(path, html.png(figure))
    finally:
        plt.close(figure)


def draw_windows(
    dataset: Dataset,
    facts: dict[str, Any],
    cases: Cases,
    events: Callable[[dict[str, Any]], pd.DataFrame] | None,
    path: Path,
) -> None:
    """For a few sessions: the ranker's scores over the run, and below them the size of each kept window's shares."""
    from matplotlib.figure import Figure

    of_key = {session["key"]: session for session in cases.sessions}
    spread = np.linspace(0, len(facts["sessions"]) - 1, min(_DRAWN, len(facts["sessions"]))).round().astype(int)
    drawn = [facts["sessions"][index] for index in spread]
    figure = Figure(figsize=(11, 3.1 * len(drawn)), layout="constrained")
    for part, line in zip(figure.subfigures(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
        session = of_key[line["key"]]
        above, below = part.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
        names = ("baseline", "brain", "carpet", "patch", "roi", "scores", "scores_space", "scores_time", "start")
        picture.Shown(dataset.grid, dataset.frames, session, dataset.read(session, names)).draw_saliency(above)
        above.set_title(f"{line['key']}: saliency of the windows")
        width = dataset.frames * session["tr"]
        at = [window["start_s"] for window in line["windows"]]
        size = [window["mean_absolute"] for window in line["windows"]]
        below.bar(at, size, width, align="edge", color=html.GREEN, edgecolor=html.INK, linewidth=0.4)
        below.set_title("Mean size of a voxel's share in the prediction (kept windows)")
        below.set(
            ylabel="mean |share|",
            xlabel="time, s" if line is drawn[-1] else "",
            xlim=(0, session["frames"] * session["tr"]),
        )
        for event in () if events is None else events(session).itertuples():
            for axes in (above, below):
                axes.axvspan(event.onset, event.end, color=html.ORANGE, alpha=0.3, lw=0)
            place = (event.onset, 0.98)
            below.annotate(event.state, place, xycoords=("data", "axes fraction"), va="top", fontsize=7, clip_on=True)
        below.set_ylim(0, 1.3 * max(size))  # room for the names
        below.ticklabel_format(axis="y", scilimits=(-2, 3))
        below.grid(axis="y")
    write_atomically(path, html.png(figure))


def remarks(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What to know before the maps are believed: (`good`, `look` or `bad`, words)."""
    lines = facts["sessions"]
    off = [line["key"] for line in lines if not line["complete"]]
    if off:
        return [
            (
                "look",
                f"In {len(off)} of {html.count(len(lines), 'session')} the shares do not sum to the score within the "
                f"tolerance, first {off[0]}: read those maps with care.",
            )
        ]
    return [
        (
            "good",
            f"Complete: in {html.count(len(lines), 'session')} the shares of all voxels sum to the score less that at "
            f"the start, within {facts['tolerance']:.0%} of that difference or of the score's SD over people.",
        )
    ]
