"""Linear probes of frozen features and baselines, with confidence intervals and permutation tests.

The methods are our weights, random weights with the same pooling, functional connectivity of the whole scan and of the
kept windows, the mean image, the parcel means of a window (to decode states), and the confounds, if any are named. All
use the same splits and the same steps: features are standardised; ridge or logistic regression is fitted, with a
penalty selected on the validation subjects, or by cross-validation inside the training subjects
(`slim.evaluation.linear`, which also fits attentive pooling); each test subject gets one prediction (the mean over its
sessions), or each window.

Intervals resample subjects, not sessions or windows. They are paired: all methods are scored on the same draws. They
describe the choice of the test subjects, not that of the training subjects. p values come from permutations: the labels
of the test subjects are shuffled (of windows within their subject, of subjects within their site if sites are left
out), and the predictions are kept.

Legend: N rows, sessions or windows (m of test); S subjects; U what is scored, subjects or windows; P features; K
classes or 1; D the score and its draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from shards.format.reader import Dataset
from slim.checkpoints.run_folder import PROBE
from slim.evaluation import baselines as baseline
from slim.evaluation import display, draws, gallery, metrics
from slim.evaluation.attentive import Attentive
from slim.evaluation.division import make_splits, people_of
from slim.evaluation.gallery import Galleries
from slim.evaluation.linear import Linear
from slim.evaluation.results import (
    OURS,
    Draws,
    Estimate,
    Estimates,
    Report,
    ShareResult,
    SiteResult,
    SplitFacts,
    TaskFacts,
    TaskResult,
    averaged,
)
from slim.evaluation.splits import Fold, Split
from slim.evaluation.task import Cases, Task
from slim.inference.slim_brain import Features
from slim.inference.vectors import COMPONENTS, common_places, pool, windows
from slim.model.pooling import FITTED

# Methods whose paired difference to ours is reported.
COMPARED = ("random", "connectome", "connectome_kept", "parcel_means")


class Method(Protocol):
    """Predicts from the sessions of a task: a pooling and a linear model, fitted on training rows only."""

    def predict(self, fold: Fold) -> np.ndarray:
        """Probabilities (m, K) or values (m, 1) of the test rows."""
        ...


def predict(
    task: Task, cases: Cases, splits: list[Split], method: Method, repeat: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions of one repeat for all test rows.

    Parameters
    ----------
    task, cases
    splits : list of Split
        Of the repeat.
    method : Method
    repeat : int
        Number of the repeat, from 0, for methods that store results of each.

    Returns
    -------
    subject_U, truth_U, guess_UK
        The subject, a row of `cases.subjects`; its label, for a regression z-scored with the mean and SD of the
        training subjects; and the prediction, for a subject the mean over its sessions.
    """
    subject_U, truth_U, guess_UK = [], [], []
    for number, split in enumerate(splits):
        fold, answer_N = make_fold(task, cases, split, number, repeat)
        guess_mK = method.predict(fold)
        if cases.window_N is not None:
            subject_U.append(cases.subject_N[split.test])
            truth_U.append(answer_N[split.test])
            guess_UK.append(guess_mK)
            continue
        of_m = cases.subject_N[split.test]
        tested, first = np.unique(of_m, return_index=True)
        subject_U.append(tested)
        truth_U.append(answer_N[split.test][first])
        guess_UK.append(np.stack([guess_mK[of_m == subject].mean(axis=0) for subject in tested]))
    order = np.argsort(np.concatenate(subject_U), kind="stable")
    joined = [np.concatenate(part)[order] for part in (subject_U, truth_U, guess_UK)]
    return joined[0], joined[1], joined[2]


def make_fold(task: Task, cases: Cases, split: Split, number: int = 0, repeat: int = 0) -> tuple[Fold, np.ndarray]:
    """A split as a method gets it, and the labels of all rows; values are z-scored over the training subjects.

    Parameters
    ----------
    task, cases, split
    number : int
        Number of the split in its repeat; it seeds the random draws.
    repeat : int
        Number of the repeat in the task.
    """
    fitted, answer_N = split.fitted, cases.answer_N
    if task.type == "regression":
        mean, sd = scale_of(cases, fitted)
        answer_N = (answer_N - mean) / sd
    fold = Fold(
        "regression" if task.type == "regression" else "classification",
        len(cases.classes),
        fitted,
        split.test,
        answer_N[fitted],
        cases.family_S[cases.subject_N[fitted]],
        task.split.seed + number,
        np.isin(fitted, split.val) if len(split.val) else None,
        repeat,
    )
    return fold, answer_N


def scale_of(cases: Cases, rows: np.ndarray) -> tuple[float, float]:
    """Mean and SD of the values of these rows' subjects, each counted once."""
    truth_S = cases.truth_S[np.unique(cases.subject_N[rows])]
    return float(truth_S.mean()), float(max(truth_S.std(), 1e-12))


class Scores(NamedTuple):
    """Scores of one method.

    Attributes
    ----------
    draws : Draws
        Of each metric the score, then its bootstrap draws.
    shuffled : Draws
        Of each metric the scores under shuffled answers.
    of_sites : dict of site to Draws
        Scores of the people of each site alone, for the split `sites`.
    """

    draws: Draws
    shuffled: Draws
    of_sites: dict[str, Draws]


def score(task: Task, cases: Cases, splits: list[list[Split]], method: Method) -> Draws:
    """Each metric of one method, (D,): the score, then its bootstrap draws. See `score_and_permute`."""
    return score_and_permute(task.model_copy(update={"permutations": 0}), cases, splits, method).draws


def score_and_permute(task: Task, cases: Cases, splits: list[list[Split]], method: Method) -> Scores:
    """Each metric of one method, (D,): the score, then its bootstrap draws; and under shuffled answers.

    A metric is computed for each repeat over all test rows, then averaged over repeats. Predictions of repeats are not
    averaged, because that would score an ensemble.
    """
    if task.type == "fingerprint":
        ((split,),) = splits
        assert isinstance(method, Linear)  # `Task` refuses a pooling that is trained
        return _fingerprint(task, method.vectors(split.fitted)[split.test], cases.subject_N[split.test])
    seed = task.split.seed
    scores: list[Draws] = []
    shuffled: list[Draws] = []
    of_sites: dict[str, Draws] = {}
    for repeat, parts in enumerate(splits):
        subject_U, truth_U, guess_UK = predict(task, cases, parts, method, repeat)
        tested, number_U = np.unique(subject_U, return_inverse=True)
        weight_DS = metrics.bootstrap_weights(len(tested), task.bootstrap, seed)
        group_U = _exchangeable(task, cases, subject_U, number_U)
        scores.append(_measure(task, guess_UK, weight_DS, number_U)(truth_U))
        orders = metrics.shuffles(group_U, task.permutations, seed)
        measure = _measure(task, guess_UK, np.ones((1, len(tested))), number_U)
        shuffled.append(metrics.permuted(measure, truth_U, orders))
        if task.split.kind == "sites":  # one repeat
            of_sites = _by_site(task, cases, subject_U, truth_U, guess_UK)
    return Scores(averaged(scores), averaged(shuffled), of_sites)


def _by_site(
    task: Task, cases: Cases, subject_U: np.ndarray, truth_U: np.ndarray, guess_UK: np.ndarray
) -> dict[str, Draws]:
    """Scores of the people of each site alone."""
    site_U, found = cases.group_S[subject_U], {}
    for site in np.unique(site_U):
        here_U = site_U == site
        tested, number_U = np.unique(subject_U[here_U], return_inverse=True)
        weight_DS = metrics.bootstrap_weights(len(tested), task.bootstrap, task.split.seed)
        found[str(site)] = _measure(task, guess_UK[here_U], weight_DS, number_U)(truth_U[here_U])
    return found


def _exchangeable(task: Task, cases: Cases, subject_U: np.ndarray, number_U: np.ndarray) -> np.ndarray:
    """The group of each scored unit whose labels are exchanged in a permutation test, int (U,).

    All subjects; those of a site, because sites differ in their shares of classes and have models of their own; the
    windows of a subject.
    """
    if cases.window_N is not None:
        return number_U
    if task.split.kind == "sites":
        return np.unique(cases.group_S[subject_U], return_inverse=True)[1]
    return np.zeros_like(number_U)


def _fingerprint(task: Task, vector_NP: np.ndarray, who_N: np.ndarray) -> Scores:
    """Scores of a fingerprint from the vectors of the test sessions: each among all, or among those of a gallery."""
    seed = task.split.seed
    weight_DS = metrics.bootstrap_weights(len(np.unique(who_N)), task.bootstrap, seed)
    orders = metrics.shuffles(np.zeros_like(who_N), task.permutations, seed)
    if task.gallery is not None:
        # a vector without variance is similar to none
        similar_NN = np.nan_to_num(metrics.similarity(vector_NP), nan=-np.inf)
        return _reidentification(task.gallery, seed, similar_NN, who_N, weight_DS, orders)
    ranked_NN = metrics.ranking(vector_NP)
    of_subject = metrics.found_again(ranked_NN, who_N)
    found = {name: weight_DS @ value_S / weight_DS.sum(axis=1) for name, value_S in of_subject.items()}

    def again(shuffled_N: np.ndarray) -> Draws:
        return {name: value_S.mean()[None] for name, value_S in metrics.found_again(ranked_NN, shuffled_N).items()}

    return Scores(found, metrics.permuted(again, who_N, orders), {})


def _reidentification(
    size: int,
    seed: int,
    similar_NN: np.ndarray,
    who_N: np.ndarray,
    weight_DS: np.ndarray,
    orders: Iterable[np.ndarray],
) -> Scores:
    """Scores in random galleries of `size` people."""
    galleries = Galleries.draw(who_N, size, seed)
    # another seed than that of the people, whose number may be the same
    weight_DR = metrics.bootstrap_weights(len(galleries.person_Rn), len(weight_DS) - 1, seed + 1)
    values = galleries.values(similar_NN)
    found = {name: galleries.means(value_Rn, weight_DS, weight_DR) for name, value_Rn in values.items()}

    def again(order_N: np.ndarray) -> Draws:
        return {name: value_Rn.mean()[None] for name, value_Rn in galleries.values(similar_NN, order_N).items()}

    return Scores(found, metrics.permuted(again, np.arange(len(who_N)), orders), {})


def _measure(
    task: Task, guess_UK: np.ndarray, weight_DS: np.ndarray, number_U: np.ndarray
) -> Callable[[np.ndarray], Draws]:
    """A function from labels (U,) to the metrics of these predictions; `number_U` is the weight column of each."""
    if task.type == "regression":
        weight_DU = weight_DS[:, number_U]
        return lambda truth_U: metrics.regression(truth_U, guess_UK[:, 0], weight_DU)
    return metrics.Classification(guess_UK, weight_DS, number_U)


def baselines(task: Task, cases: Cases, dataset: Dataset) -> dict[str, Method]:
    """The baselines of a task that need no encoder."""
    methods: dict[str, Method] = {}
    sessions = cases.distinct()
    at = {session.key: row for row, session in enumerate(sessions)}
    row_N = np.array([at[session.key] for session in cases.sessions])
    if cases.window_N is not None:
        methods["parcel_means"] = _fixed(baseline.parcel_means(dataset, cases.sessions, cases.window_N))
    else:
        whole_NE, kept_NE = baseline.connectomes(dataset, sessions)
        methods["connectome"] = _fixed(whole_NE[row_N])
        if not np.array_equal(whole_NE, kept_NE):  # where all windows are kept they are the same
            methods["connectome_kept"] = _fixed(kept_NE[row_N])
    methods["mean_image"] = _fixed(baseline.mean_image(dataset, sessions)[row_N])
    if task.confounds:
        methods["confounds"] = _fixed(baseline.confounds(cases.sessions, task.confounds))
    return methods


def encoder_method(
    task: Task, cases: Cases, features: Mapping[str, Features], device: torch.device | str = "cpu"
) -> Method:
    """The probe of an encoder under the task's pooling, given the features of every session by key."""
    mine = [features[session.key] for session in cases.sessions]
    if cases.window_N is not None:
        return _fixed(window_vectors([features[s.key] for s in cases.distinct()], cases, task.pooling))
    if task.pooling == "attentive":
        return Attentive(mine, device)
    if task.pooling in FITTED:
        return Linear(partial(pool, mine, task.pooling, task.components))
    return _fixed(pool(mine, task.pooling, task.components, np.arange(0)))  # nothing is fitted


def window_vectors(features: Sequence[Features], cases: Cases, pooling: str) -> np.ndarray:
    """A vector for each row's window, float32 (N, P): its tokens, place by place (`location`) or their mean.

    Parameters
    ----------
    features : sequence of Features
        Of the sessions, each once.
    cases : Cases
        Of windows.
    pooling : "location" or "mean"
    """
    assert cases.window_N is not None
    place_L = common_places(features)
    start_of = {item.key: windows(item, place_L) for item in features}
    rows = []
    for session, start in zip(cases.sessions, cases.window_N, strict=True):
        start_W, x_WLC = start_of[session.key]
        x_LC = x_WLC[int(np.argmin(np.abs(start_W - start)))]
        rows.append(x_LC.ravel() if pooling == "location" else x_LC.mean(axis=0))
    return np.stack(rows)


def _fixed(vector_NP: np.ndarray) -> Linear:
    return Linear(lambda train: vector_NP)


def run_task(task: Task, cases: Cases, methods: Mapping[str, Method], where: str | Path) -> TaskResult:
    """All methods on one task, `ours` among them: `score_and_permute`, then `summarise`."""
    splits = make_splits(task, cases, where)
    each = {name: [score_and_permute(task, cases, splits, method)] for name, method in methods.items()}
    return summarise(task, cases, splits, each)


def summarise(
    task: Task, cases: Cases, splits: list[list[Split]], scored: Mapping[str, Sequence[Scores]]
) -> TaskResult:
    """The result of one task for the report.

    Parameters
    ----------
    task, cases, splits
    scored : mapping of method to one Scores a training seed
        Several seeds are averaged draw by draw. The interval then describes the mean score of the recipe under another
        choice of test subjects.
    """
    estimates, differences = _estimates(scored)
    facts = task_facts(task, cases, splits).with_facts(differences=differences)
    if task.split.kind == "sites":
        facts = facts.with_facts(sites=_sites(cases, scored))
    ours = averaged([one.draws for one in scored[OURS]]) if OURS in scored else {}
    return TaskResult(name=task.name, estimates=estimates, facts=facts, draws=ours)


def summarise_shares(
    task: Task,
    cases: Cases,
    shares: Mapping[float, list[list[Split]]],
    scored: Mapping[float, Mapping[str, Sequence[Scores]]],
) -> TaskResult:
    """The result of one task with few-shot shares of the training subjects.

    Parameters
    ----------
    task, cases
    shares : mapping of share to list of list of Split
        Result of `slim.evaluation.division.divide_shares`.
    scored : mapping of share to mapping of method to one Scores a training seed
    """
    whole = summarise(task, cases, shares[1.0], scored[1.0])
    if len(shares) == 1:
        return whole
    found = []
    for share, repeats in shares.items():
        fitted = [split.fitted for splits in repeats for split in splits]
        people = [len(np.unique(cases.subject_N[rows])) for rows in fitted]
        of_class = [people_of(cases, rows) for rows in fitted]
        spans = {name: _span([each[name] for each in of_class]) for name in cases.classes}
        one = ShareResult(share=share, subjects=_span(people), **({"classes": spans} if spans else {}))
        if share < 1:
            estimates, differences = _estimates(scored[share])
            one = one.model_copy(update={"estimates": estimates, "differences": differences})
        found.append(one)
    return replace(whole, facts=whole.facts.with_facts(shares=found))


def _sites(cases: Cases, scored: Mapping[str, Sequence[Scores]]) -> dict[str, SiteResult]:
    """The people and the estimates of each site."""
    found = {}
    for site, people in zip(*np.unique(cases.group_S, return_counts=True), strict=True):
        estimates: Estimates = {}
        for name, each in scored.items():
            of_site = [one.of_sites[str(site)] for one in each]
            estimates[name] = {metric: Estimate.of_draws(*[one[metric] for one in of_site]) for metric in of_site[0]}
        found[str(site)] = SiteResult(people=int(people), estimates=estimates)
    return found


def _span(counts: Sequence[int]) -> tuple[int, int]:
    return min(counts), max(counts)


def _estimates(scored: Mapping[str, Sequence[Scores]]) -> tuple[Estimates, Estimates]:
    """The estimates of all methods, and the paired differences of ours to those in `COMPARED`."""
    means: dict[str, Draws] = {}
    estimates: Estimates = {}
    for name, each in scored.items():
        means[name], shuffled = averaged([one.draws for one in each]), averaged([one.shuffled for one in each])
        estimates[name] = {
            metric: Estimate.of_draws(
                *[one.draws[metric] for one in each], p=metrics.p_value(metric, mean_D[0], shuffled[metric])
            )
            for metric, mean_D in means[name].items()
        }
    differences = {
        name: draws.difference(means[OURS], means[name]) for name in COMPARED if name in means and OURS in means
    }
    return estimates, differences


def task_facts(task: Task, cases: Cases, splits: list[list[Split]]) -> TaskFacts:
    """Facts about the task that hold for all methods."""
    tested = np.unique(np.concatenate([cases.subject_N[split.test] for split in splits[0]]))
    facts = TaskFacts(
        type=task.type,
        label=task.label,
        split=SplitFacts.model_validate(task.split.facts()),
        pooling=task.pooling,
        components=(task.components or COMPONENTS[task.pooling]) if task.pooling in COMPONENTS else None,
        bootstrap=task.bootstrap,
        permutations=task.permutations,
        confounds=task.confounds,
        sessions=len(cases.distinct()),
        subjects=len(cases.subjects),
        test_subjects=len(tested),
        tested=draws.tested(task, cases, splits),
        left_out=cases.left_out,
    )
    if cases.unscanned is not None:
        facts = facts.with_facts(listed_without_scan=cases.unscanned)
    if task.gallery is not None:
        return facts.with_facts(gallery=task.gallery, chance=gallery.chance(task.gallery))
    if task.type == "fingerprint":
        return facts.with_facts(chance=metrics.fingerprint_chance(cases.subject_N[splits[0][0].test]))
    if task.type == "regression":
        return facts
    answered = cases.truth_S[tested]
    if task.type == "state":
        answered = cases.answer_N[np.concatenate([split.test for split in splits[0]])]
        facts = facts.with_facts(windows=len(cases.sessions))
    return facts.with_facts(classes={name: int((answered == k).sum()) for k, name in enumerate(cases.classes)})


def write_report(folder: Path, results: Iterable[TaskResult]) -> Report:
    """Add these tasks to `folder/report.json` and `folder/draws.npz`, and draw `folder/NAME.png` and, of shares,
    `folder/NAME_shares.png`.

    Raises
    ------
    ConfigError
        If the existing file is not a report.
    """
    report = Report.read(folder / PROBE)
    folder.mkdir(parents=True, exist_ok=True)
    results = list(results)
    draws.write(folder, results)
    for result in results:
        whole = report.add(result)
        display.save_forest(whole, folder / f"{whole.name}.png")
        display.save_shares(whole, folder / f"{whole.name}_shares.png")
    report.write(folder)
    return report
