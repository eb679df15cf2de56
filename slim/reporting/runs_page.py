"""A page of several runs side by side: their state, curves, settings and probes.

    slim-brain report RUN RUN ... --out FILE

It reads the same files as the page of a run (`slim.reporting.run_page`), and writes one HTML file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from shards.core import files
from shards.core.errors import ConfigError
from shards.core.files import without_folders
from shards.core.findings import Finding, bad, good, look
from shards.reporting import html
from slim.checkpoints.run_folder import CONFIG, METRICS, PROBE, PROBES, REPORT
from slim.config import FinetuneSettings, PretrainSettings, load_run
from slim.evaluation import draws, metrics
from slim.evaluation.results import OURS, TaskResult
from slim.evaluation.validation import ValidationScore, read_scores
from slim.reporting import curves, run_health, run_page
from slim.training.compatibility import flat
from slim.training.metrics import MetricsLine, number, read_metrics

_COLOURS = (html.BLUE, html.ORANGE, html.GREEN, html.RED, html.PURPLE, html.SKY)
_STYLES = ("-", "--", ":")
MOST = len(_COLOURS) * len(_STYLES)  # runs that can be distinguished

# Fields that are drawn, if two runs logged them: label, title, caption.
_FIELDS = {
    "gain": ("gain", "Gain over the mean of each place", "Comparable if the data, the mask and the view are the same."),
    "loss": ("loss", "Loss", "The total. Comparable only if the objective and its coefficients are the same."),
    "loss_jepa": ("loss", "JEPA term", "Each model computes its own targets: compare the gain instead."),
    "loss_mae": ("loss", "MAE term", "About 1 is guessing the mean. Comparable if the view is the same."),
    "val_loss": ("loss", "Loss of the validation subjects", "Of fine-tunings of the same task."),
    "target_rank": (
        "rank",
        "Effective rank of the targets",
        "It falls in a collapse, while the gain stays at 0.",
    ),
    "context_rank": ("rank", "Effective rank of the context", "Dimensions that the features use."),
    "lr": ("learning rate", "Learning rate", "Of the first group of parameters."),
    "samples_per_s": ("samples/s", "Speed", "All processes together."),
}
_PLACES = ("run.out", "run.mirror")  # settings that always differ


@dataclass(frozen=True)
class _Run:
    """What is read of a run."""

    folder: Path
    name: str
    settings: PretrainSettings | FinetuneSettings
    lines: list[MetricsLine]
    steps: int | None
    tasks: list[TaskResult]
    scores: list[ValidationScore]
    colour: str
    style: str


def write(folders: Sequence[str | Path], out: str | Path, paths: bool = False, remote: bool = False) -> Path:
    """Write a page of several runs.

    Parameters
    ----------
    folders : sequence of str or Path
        Two runs or more.
    out : str or Path
        The HTML file.
    paths, remote : bool
        As in `slim.reporting.run_page.write`.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    UserError
        If a folder is not a run or is given twice, or there are too many.
    """
    if not 2 <= len(folders) <= MOST:
        raise ConfigError("report", "runs", len(folders), f"2 to {MOST} runs")
    runs = [_read(Path(folder), number, name, remote) for number, (folder, name) in enumerate(_named(folders))]
    with html.drawing():
        content = html.render(
            "runs.html",
            "slim.reporting",
            title=f"{len(runs)} runs",
            lead=", ".join(run.name for run in runs),
            findings=[*(_state(run) for run in runs)],
            sections=[
                html.Section("Now", [_now(runs)]),
                html.Section("Settings that differ", _settings(runs, paths)),
                html.Section("Probes", _probes(runs)),
                html.Section("Validation", _validation(runs)),
                html.Section("Curves", _curves(runs)),
            ],
        )
    path = Path(out)
    files.write_atomically(path, content)
    return path


def _named(folders: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """The runs with names that differ: the last parts of their paths that are needed."""
    whole = [Path(folder).resolve() for folder in folders]
    for folder in whole:
        if whole.count(folder) > 1:
            raise ConfigError(folder, "runs", "the same run twice", "different runs")
    depth = 1
    while len({folder.parts[-depth:] for folder in whole}) < len(whole):
        depth += 1
    return [(folder, "/".join(folder.parts[-depth:])) for folder in whole]


def _read(folder: Path, number: int, name: str, remote: bool) -> _Run:
    if not (folder / CONFIG).is_file():
        raise ConfigError(folder, "", "no config.yaml", "the folder of a run", "Give the run.out of each run")
    settings = load_run(folder / CONFIG)
    lines, _ = read_metrics(folder / METRICS)
    colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS)]
    steps = run_page.total_steps(settings, folder, lines, remote)
    tasks = run_health.read_tasks(folder / REPORT / PROBE)
    return _Run(folder, name, settings, lines, steps, tasks, read_scores(folder / PROBES), colour, style)


def _state(run: _Run) -> Finding:
    """One finding: where the run is, and whether something is wrong with it."""
    judged = [] if isinstance(run.settings, FinetuneSettings) else run_page.learned(run.lines, _is_over(run))
    found = run_page.verdict(run.lines, run.steps, judged)
    worst = next((one for one in found if one.severity == "bad"), None)
    if worst is not None:
        return bad(run.name, f"{run.name}: {worst.text}")
    make = good if _is_over(run) else look
    return make(run.name, f"{run.name}: {found[0].text}")


def _is_over(run: _Run) -> bool:
    return run_page.is_over(run.lines, run.steps)


def _now(runs: Sequence[_Run]) -> html.Part:
    """A row for each run: its last logged step."""
    head = ["Run", "step", "samples", "loss", "gain", "target rank", "samples/s", "GiB"]
    rows = []
    for run in runs:
        last = run.lines[-1] if run.lines else {}
        recent = {name: run_page.recent(run.lines, name) for name in ("gain", "target_rank", "samples_per_s")}
        memory = last.get("peak_memory_bytes")
        rows.append(
            [
                run.name,
                f"{last.get('step', 0)} of {run.steps or '?'}",
                "–" if "samples" not in last else f"{number(last, 'samples'):,.0f}",
                _short(last.get("loss")),
                *(_short(value) for value in recent.values()),
                "–" if memory is None else f"{memory / 2**30:.2f}",
            ]
        )
    return html.Table(head, rows, numbers=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _settings(runs: Sequence[_Run], paths: bool) -> list[html.Part]:
    """A row for each setting that is not the same in all runs."""
    trees = [flat(run.settings) for run in runs]
    keys = list(dict.fromkeys(key for tree in trees for key in tree if key not in _PLACES))
    rows = []
    for key in keys:
        values = [tree.get(key, "–") for tree in trees]
        if any(value != values[0] for value in values):
            shown = [str(value) for value in values]
            rows.append([key, *(shown if paths else map(without_folders, shown))])
    if not rows:
        return [html.Text("None: the runs differ only in their folders.")]
    return [html.Table(["Setting", *[run.name for run in runs]], rows)]


def _probes(runs: Sequence[_Run]) -> list[html.Part]:
    """A table of each task that two runs were probed on: the runs, then the methods that they share."""
    parts: list[html.Part] = []
    names = list(dict.fromkeys(task.name for run in runs for task in run.tasks))
    for name in names:
        found = [(run, task) for run in runs for task in run.tasks if task.name == name]
        if len(found) < 2:
            continue
        shown = [metric for metric in found[0][1].metrics if all(metric in task.metrics for _, task in found)]
        rows = [_row(run.name, task, OURS, shown) for run, task in found]
        for method in ("random", "connectome"):
            rows += [
                _row(f"{run_health.name_of(method)} ({run.name})", task, method, shown)
                for run, task in found
                if any(task.estimate(method, one) for one in shown)
            ]
        parts += [html.Heading(name), html.Table(["", *map(metrics.words, shown)], rows, numbers=True)]
        parts += _paired(found, shown)
        tested = {task.facts.test_subjects for _, task in found}
        if len(tested) > 1:
            parts.append(
                html.Text("The runs were tested on different numbers of subjects: do not compare these scores.")
            )
    if not parts:
        return []
    about = (
        "Values with 95 % intervals over subjects. The intervals are those of each run alone. That two of them overlap "
        "does not mean that the runs are alike: look at the difference on the same draws of subjects, whose interval "
        "is smaller."
    )
    return [html.Text(about), *parts]


def _paired(found: Sequence[tuple[_Run, TaskResult]], shown: Sequence[str]) -> list[html.Part]:
    """The differences of all runs to the first one, on the same draws of subjects."""
    (first, first_task), *others = found
    theirs = draws.read(first.folder / REPORT, first_task)
    rows, missing = [], []
    for run, task in others:
        ours = draws.read(run.folder / REPORT, task)
        if ours is None or theirs is None or task.facts.tested != first_task.facts.tested:
            missing.append(run.name)
            continue
        less = draws.difference(ours, theirs)
        rows.append([f"{run.name} less {first.name}", *(run_health.in_words(less.get(metric)) for metric in shown)])
    parts: list[html.Part] = []
    if rows:
        parts.append(html.Table(["on the same draws of subjects", *map(metrics.words, shown)], rows, numbers=True))
    if missing:
        parts.append(
            html.Text(
                f"No paired difference to {first.name}: {', '.join(missing)}. The subjects or their draws are not the "
                "same, or a report is of an earlier version, without draws: probe both again with the same task."
            )
        )
    return parts


def _row(name: str, task: TaskResult, method: str, shown: Sequence[str]) -> list[str]:
    return [name, *(run_health.in_words(task.estimate(method, metric)) for metric in shown)]


def _validation(runs: Sequence[_Run]) -> list[html.Part]:
    """The probes during training, a figure for each task."""
    parts: list[html.Part] = []
    pairs = dict.fromkeys((score.task, score.metric) for run in runs for score in run.scores)
    for task, metric in pairs:
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.subplots()
        for run in runs:
            shown = [score for score in run.scores if (score.task, score.metric) == (task, metric)]
            if shown:
                value = np.array([score.value for score in shown], float)
                step = [score.step for score in shown]
                axes.plot(step, value, color=run.colour, ls=run.style, lw=1.8, marker="o", ms=4, label=run.name)
        axes.set_ylabel(metrics.words(metric))
        _finish(figure)
        title = f"Probe of {task} during training"
        picture = html.Picture.of(figure, f"{title}, by optimizer step, of each run", "On validation subjects.")
        parts += [html.Heading(title), picture]
    return parts


def _curves(runs: Sequence[_Run]) -> list[html.Part]:
    """A figure of each field that two runs or more logged, in pairs."""
    groups: list[list[html.Part]] = []
    for field, (label, title, caption) in _FIELDS.items():
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes, drawn = figure.subplots(), 0
        for run in runs:
            step, _, mean, _ = curves.thin(curves.values(run.lines, "step"), curves.values(run.lines, field))
            if len(step):
                line = mean if field == "val_loss" else curves.smoothed(mean)
                axes.plot(step, line, color=run.colour, ls=run.style, lw=1.8, label=run.name)
                drawn += 1
        if drawn > 1:
            axes.set_ylabel(label)
            _finish(figure)
            groups.append(
                [html.Heading(title), html.Picture.of(figure, f"{title}, by optimizer step, of each run", caption)]
            )
    return [html.Text("Running means over a thirtieth of each curve."), html.Pairs(groups)] if groups else []


def _finish(figure: Figure) -> None:
    """The axis of steps, and the legend below it."""
    (axes,) = figure.axes
    axes.set_xlabel("optimizer step")
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
