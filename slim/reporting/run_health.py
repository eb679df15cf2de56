"""Results of probes and explanations on the page of a run: findings, tables and figures.

They are read from `report/report.json` of `slim-brain probe` and `report/explain/` of `slim-brain explain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shards.core.findings import Finding, bad, good, look
from shards.reporting import html
from slim.evaluation import display, metrics
from slim.evaluation.results import OURS, Estimate, Report, TaskResult
from slim.explain.explanation import Explanation, find_views, unreadable

_METHODS = {
    OURS: "this run",
    "finetuned": "this run, fine-tuned",
    "random": "same encoder, random weights",
    "scratch": "same encoder, trained only on the task",
    "connectome": "functional connectivity",
    "connectome_kept": "connectivity, kept windows",
    "parcel_means": "parcel means",
    "mean_image": "mean image",
    "confounds": "confounds only",
}
_EXPLORE = (
    "A click loads a map into the frame; move through it with the mouse. Maps are smoothed for display, and the "
    "largest tenth is coloured."
)


def read_tasks(path: Path) -> list[TaskResult]:
    """Read the tasks of a probe report, with the methods in the order in which they are shown; empty without the file.

    Raises
    ------
    ConfigError
        If the file is not a probe report.
    """
    found = []
    for task in Report.read(path).results.values():
        methods = [*_METHODS, *sorted(set(task.estimates) - set(_METHODS))]
        shown = task.only(method for method in methods if task.estimates.get(method))
        if shown.metrics:
            found.append(shown)
    return found


def verdict(tasks: Sequence[TaskResult]) -> list[Finding]:
    """Findings from the results of probes."""
    found = []
    better, worse, alike = _sorted(tasks, "random")
    compared = len(better) + len(worse) + len(alike)
    if compared:
        most = 2 * len(better) > compared
        words = f"Beats the same encoder with random weights on {len(better)} of {html.count(compared, 'task')}"
        found.append(Finding("random", "good" if most and not worse else "look", words + _listed(better, ": {}") + "."))
    if alike:
        found.append(
            look("random", f"No clear difference from random weights on {', '.join(alike)}; test more subjects.")
        )
    if worse:
        found.append(bad("random", f"Random weights are better on {', '.join(worse)}."))
    better, worse, alike = _sorted(tasks, "connectome")
    if worse:
        found.append(look("connectome", f"Functional connectivity is better on {', '.join(worse)}."))
    if better:
        found.append(good("connectome", f"Beats functional connectivity on {', '.join(better)}."))
    if alike:
        found.append(look("connectome", f"No clear difference from functional connectivity on {', '.join(alike)}."))
    for method, said in (("parcel_means", "Parcel means"), ("confounds", "Confounds")):
        _, worse, alike = _sorted(tasks, method)
        if worse or alike:
            found.append(look(method, f"{said} alone are equal or better on {', '.join(sorted([*worse, *alike]))}."))
    better, worse, _ = _sorted(tasks, "scratch", "finetuned")
    if better:
        found.append(good("finetuned", f"Fine-tuning beats training only on the task on {', '.join(better)}."))
    if worse:
        found.append(bad("finetuned", f"Training only on the task beats fine-tuning on {', '.join(worse)}."))
    unsure = [task.name for task in tasks if _p(task) is not None and (_p(task) or 0) >= 0.05]
    if unsure:
        found.append(look("chance", f"No better than chance on {', '.join(unsure)} (permutation p of .05 or more)."))
    return found


def _p(task: TaskResult) -> float | None:
    found = task.estimate(OURS, task.judged_by) if task.judged_by else None
    return None if found is None else found.p


def _sorted(tasks: Sequence[TaskResult], method: str, mine: str = OURS) -> tuple[list[str], list[str], list[str]]:
    """Names of the tasks on which `mine` is better than a method, worse, and not clearly different."""
    signs = {task.name: task.compare(method, mine) for task in tasks}
    better, worse, alike = ([name for name, sign in signs.items() if sign == wanted] for wanted in (1, -1, 0))
    return better, worse, alike


def _listed(names: Sequence[str], form: str) -> str:
    return form.format(", ".join(names)) if names else ""


def in_words(found: Estimate | None, digits: int = 3) -> str:
    """A value with its interval and p value: `0.71 [0.62, 0.80], p = 0.002`."""
    if found is None or found.value is None:
        return "–"
    ends = "" if found.interval is None else " [{:.{n}f}, {:.{n}f}]".format(*found.interval, n=digits)
    chance = "" if found.p is None else ", p < 0.001" if found.p < 0.001 else f", p = {found.p:.3f}"
    return f"{found.value:.{digits}f}{ends}{chance}"


def name_of(method: str) -> str:
    return _METHODS.get(method, method.replace("_", " "))


def probes(tasks: Sequence[TaskResult]) -> list[html.Part]:
    """A table of all tasks, then a figure of each task with intervals."""
    if not tasks:
        return []
    judged = [(task, metric) for task in tasks if (metric := task.judged_by) is not None]
    rows = [
        [name_of(method), *[in_words(task.estimate(method, metric), 2) for task, metric in judged]]
        for method in _METHODS
        if any(task.estimate(method, metric) for task, metric in judged)
    ]
    head = ["Features", *[f"{task.name}, {metrics.words(metric)}" for task, metric in judged]]
    return [
        html.Text(
            "Values with 95 % intervals over subjects; p values from shuffled labels, if requested. Pretraining is "
            "useful if this run beats the same encoder with random weights. For traits of subjects, it should also "
            "beat functional connectivity. The mean image contains anatomy, but no activity."
        ),
        *([html.Table(head, rows, numbers=True)] if len(judged) > 1 else []),
        *[part for task in tasks for part in _probe(task)],
    ]


def _about(task: TaskResult) -> str:
    """Description of a task, from the facts in the report."""
    facts, found = task.facts, []
    if facts.type:
        found.append(facts.type + (f" of {facts.label}" if facts.label else ""))
    if facts.test_subjects is not None:
        found.append(f"{facts.test_subjects} subjects tested")
    if facts.pooling:
        found.append(f"{facts.pooling} pooling")
    if facts.split is not None and facts.split.kind == "folds":
        found.append(f"{facts.split.folds} folds by subject, repeated {facts.split.repeats} times")
    elif facts.split is not None and facts.split.kind == "sites":
        sites = html.count(len(facts.sites), "site") + ", " if facts.sites else ""
        found.append(f"{sites}each site is tested once, by the others")
    elif facts.split is not None and facts.split.kind:
        found.append(f"split: {facts.split.kind}")
    if isinstance(facts.seeds, list):
        found.append(html.count(len(facts.seeds), "seed"))
    if facts.subjects_seen_in_pretraining:
        whom = "the" if facts.subjects is None else facts.subjects
        found.append(f"{facts.subjects_seen_in_pretraining} of {whom} subjects seen in pretraining, without labels")
    elif facts.says_unknown("subjects_seen_in_pretraining"):
        found.append("subjects seen in pretraining are not known (version 0.1)")
    words = "; ".join(found)
    return words[0].upper() + words[1:] + "." if words else ""


def _probe(task: TaskResult) -> list[html.Part]:
    names = task.metrics
    rows = [
        [name_of(method), *[in_words(cells.get(metric)) for metric in names]]
        for method, cells in task.estimates.items()
    ]
    for site, of_site in task.facts.sites.items():
        mine = of_site.estimates.get(OURS, {})
        rows.append([f"{name_of(OURS)}, {site} ({of_site.people})", *[in_words(mine.get(metric)) for metric in names]])
    for share in task.facts.shares:
        for method, cells in share.estimates.items():
            name = f"{name_of(method)}, {display.percent(share.share)}"
            rows.append([name, *[in_words(cells.get(metric)) for metric in names]])
    for method, cells in task.facts.differences.items():
        rows.append([f"this run minus {name_of(method)}", *[in_words(cells.get(metric)) for metric in names]])
    about = _about(task)
    return [
        html.Heading(task.name),
        *([html.Text(about)] if about else []),
        html.Table(["Features", *[metrics.words(metric) for metric in names]], rows, numbers=True),
        _drawn(task),
        *_shares(task),
    ]


def _shares(task: TaskResult) -> list[html.Part]:
    """The curves of the few-shot shares, and what each share had; empty without shares."""
    shares = task.facts.shares
    if not shares:
        return []
    had = "; ".join(f"{display.percent(one.share)}: {one.people_by_class}" for one in shares)
    figure = display.share_curves(task, name_of)
    return [html.Picture.of(figure, f"Probe results of {task.name} by share of the training people", f"People: {had}.")]


def _drawn(task: TaskResult) -> html.Picture:
    """A figure with one panel per metric, and one point with its interval per method."""
    figure = display.forest(task, name_of, (OURS, "finetuned"))
    caption = metrics.caption("Dashed", task.metrics, task.levels)
    return html.Picture.of(
        figure, f"Probe results of {task.name} with 95 % intervals", f"{caption}." if caption else ""
    )


def explanations(folder: Path, private: bool = False) -> list[html.Part]:
    """Where and when predictions come from, for every explained task.

    Parameters
    ----------
    folder : Path
        Folder of `slim-brain explain`.
    private : bool
        Whether sessions are numbered, and the picture that names them is left out.

    Raises
    ------
    ConfigError
        If a file of `slim-brain explain` cannot be read.
    """
    parts: list[html.Part] = []
    for path in sorted(folder.glob("*.json")):
        found = Explanation.read(path)
        try:
            maps, windows = (path.with_name(f"{path.stem}{ending}.png").read_bytes() for ending in ("", "_windows"))
        except OSError as error:
            raise unreadable(path, error) from None
        parts += _explanation(path.stem, found, maps, windows, private)
        if views := find_views(folder, path.stem):
            links = {name: f"{folder.name}/{file.name}" for name, file in views.items()}
            parts.append(html.Views(f"Explore the maps of {path.stem}", links, _EXPLORE))
    if not parts:
        return []
    intro = (
        "Integrated gradients divide the score of a probe into shares of all voxels and frames. The sum of the shares "
        "is the score minus the score at the start of the path. A share shows what the prediction depends on, not what "
        "causes the trait. If voxels contain the same information, the model determines how it is divided among them. "
        "The NIfTI maps are in the folder explain/ next to this page."
    )
    return [html.Text(intro), *parts]


def _explanation(name: str, found: Explanation, maps: bytes, windows: bytes, private: bool) -> list[html.Part]:
    start = {
        "still": "every voxel at its mean over the scan, with anatomy",
        "empty": "every voxel at its mean over the scan, without anatomy",
    }[found.start]
    rows = [[" ".join(f"{x:+g}" for x in place.mm), f"{place.value:.2g}"] for place in found.places]
    where = "MNI" if found.space == "MNI" else "grid, no standard space"
    about = (
        f"Explained: {found.score}, {found.pooling} pooling, in {html.count(len(found.sessions), 'session')} of "
        f"{html.count(len({one.subject for one in found.sessions}), 'subject')} not used to train the probe. "
        f"Start of the path: {start}."
    )
    off = [
        f"session {number}" if private else session.key
        for number, session in enumerate(found.sessions, 1)
        if not session.complete
    ]
    told = f" In {len(off)} of them the shares do not add up to the score, the first is {off[0]}." if off else ""
    in_time: html.Part = html.Text("The picture of the windows over time names sessions, and is left out of this page.")
    if not private:
        in_time = html.Picture(
            windows,
            f"Saliency of the windows, and their shares in {name}, over time",
            "Above, for some of the sessions: the saliency of the windows. Below: the mean absolute share of voxels in "
            "each kept window. The ranking does not use labels; if both rise together, the prediction depends on the "
            "windows that the ranking prefers. Orange: events, if they were given.",
        )
    return [
        html.Heading(name),
        html.Text(about + told),
        html.Picture(
            maps,
            f"Slices of the brain with the shares in {name}",
            "Mean over the sessions, smoothed for display, on their mean image; the largest tenth is coloured. Above: "
            "absolute shares. Below: red raises the score, blue lowers it. In cells of the model that contain little "
            "brain, as at its edge, each of the few voxels has a larger share.",
        ),
        html.Table([f"Strongest places: x y z, mm ({where})", "mean |share|"], rows),
        in_time,
    ]
