"""Linear probes of frozen features beside the baselines, with intervals that a reviewer accepts.

Every method (our weights, random weights with the same pooling, functional connectivity, the mean image) goes
through the same lines with the same splits: standardise, ridge or logistic regression whose penalty was chosen
by a cross-validation inside the training subjects (`slim.linear`; attentive pooling is itself fitted there), one
prediction for each test subject (the mean over its sessions).

Intervals resample subjects, never sessions, and are paired: all methods are scored on the same draws. They
carry the chance of which subjects were tested, not that of training on other ones.

Legend: N sessions (m of test); S subjects; P features; K classes or 1; D the score and its draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from shards.errors import ConfigError
from shards.layout import dump, write_atomically
from shards.reader import Dataset
from slim import baseline, metrics
from slim.attentive import Attentive
from slim.brain import Features
from slim.linear import Linear
from slim.pooling import pool
from slim.task import Cases, Fold, Task, make_splits

OURS = "ours"
COMPARED = ("random", "connectome")  # methods whose paired difference to ours is reported


class Method(Protocol):
    """From the sessions of a task to predictions: a pooling and a linear model, fitted on training rows alone."""

    def predict(self, fold: Fold) -> np.ndarray:
        """Probabilities (m, K) or values (m, 1) of the test sessions."""
        ...


def predict(
    task: Task, cases: Cases, folds: list[tuple[np.ndarray, np.ndarray]], method: Method
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions of one repeat for every subject that is in a test fold.

    Returns
    -------
    subject_S, truth_S, guess_SK
        Rows of `cases.subjects`; the truth, in a regression z-scored by the mean and SD of the subjects it
        was trained on; and the prediction, the mean over the subject's sessions.
    """
    subject_S, truth_S, guess_SK = [], [], []
    for number, (train, test) in enumerate(folds):
        truth = cases.truth_S
        if task.type == "regression":
            of_train = truth[np.unique(cases.subject_N[train])]
            truth = (truth - of_train.mean()) / max(of_train.std(), 1e-12)
        of_n, of_m = cases.subject_N[train], cases.subject_N[test]
        fold = Fold(task.type, len(cases.classes), train, test, truth[of_n], of_n, task.split.seed + number)
        guess_mK = method.predict(fold)
        tested = np.unique(of_m)
        subject_S.append(tested)
        truth_S.append(truth[tested])
        guess_SK.append(np.stack([guess_mK[of_m == subject].mean(axis=0) for subject in tested]))
    order = np.argsort(np.concatenate(subject_S))
    joined = [np.concatenate(part)[order] for part in (subject_S, truth_S, guess_SK)]
    return joined[0], joined[1], joined[2]


def score(
    task: Task, cases: Cases, splits: list[list[tuple[np.ndarray, np.ndarray]]], method: Method
) -> dict[str, np.ndarray]:
    """Each metric of one method, (D,): the score, then its bootstrap draws.

    A metric is taken for each repeat over all test subjects, then averaged over repeats: predictions of
    repeats are never averaged, which would score an ensemble.
    """
    if task.type == "fingerprint":
        ((train, test),) = splits[0]
        assert isinstance(method, Linear)  # `Task` refuses a pooling that is trained
        of_subject = metrics.fingerprint(method.vectors(train)[test], cases.subject_N[test])
        weight_DS = metrics.bootstrap_weights(len(of_subject["top1"]), task.bootstrap, task.split.seed)
        return {name: weight_DS @ value_S / weight_DS.sum(axis=1) for name, value_S in of_subject.items()}
    scores: list[dict[str, np.ndarray]] = []
    for folds in splits:
        subject_S, truth_S, guess_SK = predict(task, cases, folds, method)
        weight_DS = metrics.bootstrap_weights(len(subject_S), task.bootstrap, task.split.seed)
        if task.type == "classification":
            scores.append(metrics.classification(truth_S, guess_SK, weight_DS))
        else:
            scores.append(metrics.regression(truth_S, guess_SK[:, 0], weight_DS))
    return {name: np.mean([each[name] for each in scores], axis=0) for name in scores[0]}


def make_methods(
    task: Task,
    cases: Cases,
    dataset: Dataset,
    encoded: Mapping[str, Mapping[str, Features]],
    device: torch.device | str = "cpu",
) -> dict[str, Method]:
    """The methods of a task: the encoders under the task's pooling, then the baselines.

    Parameters
    ----------
    task, cases, dataset
    encoded : mapping of method to mapping of session key to Features
        `ours` and `random`.
    device : torch.device or str
        Where attention is trained.
    """
    methods: dict[str, Method] = {}
    for name, features in encoded.items():
        mine = [features[session["key"]] for session in cases.sessions]
        if task.pooling == "attentive":
            methods[name] = Attentive(mine, device)
        elif task.pooling == "cov":
            methods[name] = Linear(partial(pool, mine, "cov", task.components))
        else:  # nothing is fitted
            methods[name] = _fixed(pool(mine, task.pooling, task.components, np.arange(0)))
    methods["connectome"] = _fixed(baseline.connectome(dataset, cases.sessions))
    methods["mean_image"] = _fixed(baseline.mean_image(dataset, cases.sessions))
    return methods


def _fixed(vector_NP: np.ndarray) -> Linear:
    return Linear(lambda train: vector_NP)


def run_task(
    task: Task,
    cases: Cases,
    methods: dict[str, Method],
    where: str | Path,
    advance: Callable[[int, str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All methods on one task.

    Parameters
    ----------
    task, cases
    methods : dict of str to Method
        With `ours` among them.
    where : str or Path
        The task's file, named in errors.
    advance : callable, optional
        Told after each method.

    Returns
    -------
    results, facts : dict
        `results[method][metric]` is {"value", "low", "high"}, the 95 % interval over subjects; `facts` says
        what was done, with `differences[method][metric]` of ours minus that method, on the same draws.
    """
    splits = make_splits(task, cases, where)
    scores = {}
    for name, method in methods.items():
        scores[name] = score(task, cases, splits, method)
        if advance:
            advance(1, f"{task.name}: {name}")
    tested = np.unique(np.concatenate([cases.subject_N[test] for _, test in splits[0]]))
    facts: dict[str, Any] = {
        "type": task.type,
        "label": task.label,
        "split": task.split.model_dump(),
        "pooling": task.pooling,
        "components": task.components if task.pooling == "cov" else None,
        "bootstrap": task.bootstrap,
        "sessions": len(cases.sessions),
        "subjects": len(cases.subjects),
        "test_subjects": len(tested),
        "left_out": cases.left_out,
        "differences": {
            name: {metric: metrics.interval(scores[OURS][metric] - value_D) for metric, value_D in scores[name].items()}
            for name in COMPARED
            if name in scores
        },
    }
    if task.type == "classification":
        facts["classes"] = {name: int((cases.truth_S[tested] == k).sum()) for k, name in enumerate(cases.classes)}
    if task.type == "fingerprint":
        ((_, test),) = splits[0]
        facts["chance"] = metrics.fingerprint_chance(cases.subject_N[test])
    return {
        name: {metric: metrics.interval(value_D) for metric, value_D in values.items()}
        for name, values in scores.items()
    }, facts


def write_report(folder: Path, tasks: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Put these tasks into `folder/report.json`, beside those that are there, and draw `folder/NAME.png`.

    Returns
    -------
    dict
        The whole report: {"tasks": {name: results}, "facts": {name: facts}}.

    Raises
    ------
    ConfigError
        If the file there is no such report.
    """
    path = folder / "report.json"
    report: dict[str, Any] = {"tasks": {}, "facts": {}}
    if path.exists():
        try:
            old = json.loads(path.read_text())
            report = {part: dict(old[part]) for part in report}
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise ConfigError(
                path,
                "",
                "no report of probes",
                "a report.json that probe.py wrote",
                "Move it away, or give another --out",
            ) from None
    report["tasks"] |= tasks
    report["facts"] |= facts
    for name, results in tasks.items():
        folder.mkdir(parents=True, exist_ok=True)
        plot(name, results, facts[name], folder / f"{name}.png")
    write_atomically(path, dump(report) + "\n")
    return report


def chance(facts: dict[str, Any], metric: str) -> float | None:
    """What guessing scores; None where that depends on the data."""
    if facts["type"] == "fingerprint":
        return facts["chance"][metric]
    if metric in ("auroc", "r"):
        return 0.5 if metric == "auroc" else 0.0
    if metric == "balanced_accuracy":
        return 1 / len(facts["classes"])
    return {"r2": 0.0, "mse": 1.0}.get(metric)


def plot(name: str, results: dict[str, Any], facts: dict[str, Any], path: Path) -> None:
    """One panel a metric: a point and its interval for each method, and a dotted line at chance; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods, names = list(results), list(results[OURS])
    figure = Figure(figsize=(1.4 + 2.5 * len(names), 1.5 + 0.36 * len(methods)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, metric in zip(panels, names, strict=True):
        for row, method in enumerate(methods):
            value = results[method][metric]
            colour = "tab:blue" if method == OURS else "0.35"
            if value["low"] is not None:
                axis.plot([value["low"], value["high"]], [row, row], color=colour, lw=2)
            if value["value"] is not None:
                axis.plot(value["value"], row, "o", color=colour, ms=6)
        level = chance(facts, metric)
        if level is not None:
            axis.axvline(level, color="tab:red", ls=":", lw=1)
        better = " (lower is better)" if metric == "mse" else ""
        axis.set_title(metric.replace("_", " ") + better, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(methods)), [method.replace("_", " ") for method in methods])
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.suptitle(
        f"{name}: {facts['test_subjects']} test subjects, {facts['pooling']} pooling, "
        "95 % intervals over subjects; dotted: chance",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
