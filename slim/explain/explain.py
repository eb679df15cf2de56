"""Explain the predictions of a task: where in the brain and when they come from, as NIfTI maps, figures and JSON.

    RUN/report/explain/
        TASK.nii.gz            mean over the sessions: signed share of each voxel; the sum is the mean of f(x) - f(x')
        TASK_absolute.nii.gz   mean over the sessions: mean over frames of the absolute shares
        TASK_anatomy.nii.gz    with `start: empty`: signed share of the mean of each voxel over the scan
        TASK/KEY.nii.gz ...    the same for each session
        TASK.png               both maps on the mean image;  TASK_windows.png  ranking and shares over time
        TASK_view.html ...     an interactive view of each map; in MNI space also TASK_view_surface.html ...
        TASK.json              facts: scores, gaps, windows, strongest places

Maps are on the grid of the dataset. A session is explained with the probe of a fold that did not train on its subject.
For decoded states, the mean over all windows of a session in one state is explained.

Legend: N rows of a task; K windows in time order; F frames; M patches; V voxels of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.core.errors import ConfigError
from shards.core.files import write_atomically
from shards.format.patches import scatter
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from shards.reporting import html, quality_figures
from slim.evaluation.division import make_splits
from slim.evaluation.probe import make_fold, scale_of
from slim.evaluation.splits import Fold
from slim.evaluation.task import Cases, Task
from slim.explain.differentiable_probe import Score, fit_score, fit_state_score
from slim.explain.explanation import ABSOLUTE, Explanation, SessionShares, Start, WindowShares
from slim.explain.integrated_gradients import TOLERANCE, Attribution, integrated_gradients
from slim.explain.maps import Maps, Mean, draw_maps, image, places, save, write_views
from slim.inference.slim_brain import SlimBrain
from slim.inference.vectors import Features

if TYPE_CHECKING:
    import pandas as pd

_DRAWN = 3  # number of sessions with drawn windows


@dataclass(frozen=True)
class ExplainedSession:
    """A session to explain, with a fold that does not train on its subject.

    Attributes
    ----------
    row : int
        A row of the task that belongs to the session.
    fold : Fold
    unit : float
        SD of the fold's labels, which converts z-scores to the unit of the label.
    start_w : array or None
        Starts (s) of the windows in the state; None for tasks with labels of sessions.
    """

    row: int
    fold: Fold
    unit: float
    start_w: np.ndarray | None = None


def check_task(task: Task, where: str | Path) -> None:
    """Check that a task fits a probe.

    Raises
    ------
    ConfigError
    """
    if task.type == "fingerprint":
        expected = "classification, regression or state, which fit a probe to explain"
        raise ConfigError(where, "type", task.type, expected)


def choose(task: Task, cases: Cases, where: str | Path, subjects: int, output: int = 0) -> list[ExplainedSession]:
    """Test sessions of the first repeat from this number of subjects, spread evenly over the classes or values.

    For decoded states: sessions with windows of the class `output`, of evenly spread subjects.
    """
    folds = _folds(task, cases, where)
    if cases.window_N is not None and cases.state_N is not None:
        in_state_N = cases.state_N == output
        tested = np.unique(cases.subject_N[np.concatenate([fold.test for fold, _ in folds])])
        chosen = _spread(tested[np.isin(tested, cases.subject_N[in_state_N])], subjects)
        asked = []
        for fold, unit in folds:
            rows = fold.test[in_state_N[fold.test] & np.isin(cases.subject_N[fold.test], chosen)]
            keys = np.array([cases.sessions[row].key for row in rows])
            for key in np.unique(keys):
                of_session = rows[keys == key]
                asked.append(ExplainedSession(int(of_session[0]), fold, unit, cases.window_N[of_session]))
        return asked
    tested = np.unique(np.concatenate([cases.subject_N[fold.test] for fold, _ in folds]))
    ordered = tested[np.argsort(cases.truth_S[tested], kind="stable")]
    chosen = _spread(ordered, subjects)
    return [
        ExplainedSession(int(row), fold, unit)
        for fold, unit in folds
        for row in fold.test
        if cases.subject_N[row] in chosen
    ]


def _spread(ordered: np.ndarray, count: int) -> np.ndarray:
    """Select `count` elements at equal distances."""
    return ordered[np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))]


def _folds(task: Task, cases: Cases, where: str | Path) -> list[tuple[Fold, float]]:
    """The folds of the first repeat, as in a probe, each with the SD of its labels."""
    found = []
    for number, split in enumerate(make_splits(task, cases, where)[0]):
        unit = 1.0
        if task.type == "regression":
            unit = scale_of(cases, split.fitted)[1]
        found.append((make_fold(task, cases, split, number)[0], unit))
    return found


def fitted_scores(
    task: Task, cases: Cases, asked: Sequence[ExplainedSession], features: Mapping[str, Features], output: int
) -> Iterator[tuple[SessionRecord, Score]]:
    """Iterate over the sessions to explain, each with the probe of its fold.

    Parameters
    ----------
    task, cases, asked
    features : mapping of str to Features
        Features of all sessions of the task, by key.
    output : int
        Class with the logit to explain; not used in a regression.
    """
    once, each = ([features[s.key] for s in rows] for rows in (cases.distinct(), cases.sessions))
    fold = None
    for item in asked:
        session = cases.sessions[item.row]
        if item.start_w is not None:
            if fold is not item.fold:
                of_windows = fit_state_score(once, cases, task.pooling, item.fold, output)
            score = of_windows(features[session.key], item.start_w)
        elif fold is not item.fold:
            score = fit_score(each, task.pooling, task.components, item.fold, output, item.unit)
        fold = item.fold
        yield session, score


def explain(
    model: SlimBrain,
    dataset: Dataset,
    scores: Iterable[tuple[SessionRecord, Score]],
    start: Start,
    tolerance: float = TOLERANCE,
) -> Iterator[tuple[SessionRecord, Attribution]]:
    """Iterate over sessions with their shares.

    Parameters
    ----------
    model, dataset
    scores : iterable
        Result of `fitted_scores`.
    start, tolerance : see `slim.explain.integrated_gradients.integrated_gradients`
    """
    for session, score in scores:
        yield session, integrated_gradients(model, dataset, session, score, start, tolerance)


def session_shares(dataset: Dataset, session: SessionRecord, found: Attribution) -> SessionShares:
    """A session for the facts."""
    arrays = dataset.read(session, ("brain", "scores"))
    inside_MV = arrays["brain"] > 0
    windows = tuple(
        WindowShares(
            start_s=round(float(start * session.tr), 3),
            saliency=float(arrays["scores"][start // dataset.frames]),
            mean_absolute=float(np.abs(value_FMV[:, inside_MV]).mean()),
            sum=float(value_FMV.sum(dtype=np.float64)),
        )
        for start, value_FMV in zip(found.start_K, found.value_KFMV, strict=True)
    )
    return SessionShares(
        key=session.key,
        subject=session.subject,
        score=found.score,
        at_start=found.at_start,
        sum=found.total,
        gap=found.gap,
        complete=found.complete,
        points=found.points,
        windows=windows,
    )


def write(
    folder: Path,
    dataset: Dataset,
    explained: Iterable[tuple[SessionRecord, Attribution]],
    about: Explanation,
    advance: Callable[[int, str], None],
    events: Callable[[SessionRecord], pd.DataFrame] | None = None,
) -> Explanation:
    """Write maps, figures and facts of a task while sessions are explained.

    Parameters
    ----------
    folder : Path
        RUN/report/explain.
    dataset : Dataset
    explained : iterable
        Result of `explain`.
    about : Explanation
        The explanation without places and sessions.
    advance : callable
        Called after each session.
    events : callable, optional
        Returns the events of a session, as from `slim.evaluation.events.read`, to draw them with its windows.

    Returns
    -------
    Explanation
        With places and sessions, as in TASK.json.
    """
    grid, registered, mean, under = dataset.grid, about.space == "MNI", Mean(), Mean()
    done: list[tuple[SessionRecord, SessionShares]] = []
    for session, found in explained:
        maps = Maps.of(found, grid, about.start).named()
        for ending, volume in maps.items():
            save(folder / about.task / f"{session.key}{ending}.nii.gz", image(volume, grid, registered))
        mean.add(maps)
        under.add({"": _mean_image(dataset, session)})
        done.append((session, session_shares(dataset, session, found)))
        advance(1, f"{session.key}, {found.points} points")
    done.sort(key=lambda one: one[1].key)
    images = {ending: image(volume, grid, registered) for ending, volume in mean.named().items()}
    for ending, made in images.items():
        save(folder / f"{about.task}{ending}.nii.gz", made)
    behind = image(under.named()[""], grid, registered)
    write_views(images, behind, registered, folder, about.task)
    with html.drawing():
        draw_maps(images, behind, folder / f"{about.task}.png")
        draw_windows(dataset, done, events, folder / f"{about.task}_windows.png")
    shares = tuple(one for _, one in done)
    whole = about.model_copy(update={"places": places(images[ABSOLUTE]), "sessions": shares})
    whole.write(folder)
    return whole


def _mean_image(dataset: Dataset, session: SessionRecord) -> np.ndarray:
    """The mean image of a session, (X, Y, Z); 0 outside the brain."""
    arrays = dataset.read(session, ("baseline", "brain", "patch"))
    baseline_MV = np.where(arrays["brain"] > 0, arrays["baseline"], 0)
    return scatter(baseline_MV, arrays["patch"], dataset.grid.shape, dataset.grid.patch)


def draw_windows(
    dataset: Dataset,
    explained: Sequence[tuple[SessionRecord, SessionShares]],
    events: Callable[[SessionRecord], pd.DataFrame] | None,
    path: Path,
) -> None:
    """Draw, for a few sessions, the scores of the ranker and below them the absolute shares of each kept window."""
    from matplotlib.figure import Figure

    spread = np.linspace(0, len(explained) - 1, min(_DRAWN, len(explained))).round().astype(int)
    drawn = [explained[index] for index in spread]
    figure = Figure(figsize=(11, 3.1 * len(drawn)), layout="constrained")
    parts = figure.subfigures(len(drawn), 1, squeeze=False)[:, 0]
    for part, (session, shares) in zip(parts, drawn, strict=True):
        above, below = part.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
        names = ("baseline", "brain", "carpet", "patch", "roi", "scores", "scores_space", "scores_time", "start")
        quality_figures.Shown(dataset.grid, dataset.frames, session, dataset.read(session, names)).draw_saliency(above)
        above.set_title(f"{shares.key}: saliency of the windows")
        width = dataset.frames * session.tr
        at = [window.start_s for window in shares.windows]
        size = [window.mean_absolute for window in shares.windows]
        below.bar(at, size, width, align="edge", color=html.GREEN, edgecolor=html.INK, linewidth=0.4)
        below.set_title("Mean size of a voxel's share in the prediction (kept windows)")
        below.set(
            ylabel="mean |share|",
            xlabel="time, s" if part is parts[-1] else "",
            xlim=(0, session.frames * session.tr),
        )
        for event in () if events is None else events(session).itertuples():
            for axes in (above, below):
                axes.axvspan(event.onset, event.end, color=html.ORANGE, alpha=0.3, lw=0)
            place = (event.onset, 0.98)
            below.annotate(event.state, place, xycoords=("data", "axes fraction"), va="top", fontsize=7, clip_on=True)
        below.set_ylim(0, 1.3 * max(size))  # room for the names of states
        below.ticklabel_format(axis="y", scilimits=(-2, 3))
        below.grid(axis="y")
    write_atomically(path, html.png(figure))
