"""What a probe is asked: a task from YAML, the sessions that can answer it, their splits by subject.

Legend: N sessions (n of training, m of test); S subjects.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from shards.errors import ConfigError, DatasetError
from shards.reader import Dataset
from shards.settings import Settings, load

Pooling = Literal["mean", "mean+sd", "location", "attentive", "cov"]

# Fewest subjects of a class (or, in a regression, of the whole) on each side of a split: the training side is
# itself divided once more to choose the penalty.
_LEAST_TRAIN = {"classification": 2, "regression": 4}
_LEAST_TEST = {"classification": 1, "regression": 3}
_INNER_FOLDS = 5


class SplitSettings(Settings):
    kind: Literal["folds", "dataset", "all"] = Field(
        default="folds", description="repeated k-fold by subject; the dataset's own test subjects; no split"
    )
    folds: int = Field(default=5, ge=2)
    repeats: int = Field(default=5, ge=1, description="times the subjects are dealt into folds anew")
    seed: int = Field(default=0, ge=0, description="of the folds and of the bootstrap")


class Task(Settings):
    """One question asked of frozen features."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    type: Literal["classification", "regression", "fingerprint"]
    label: str | None = Field(default=None, description="column of the participants table")
    split: SplitSettings = SplitSettings()
    pooling: Pooling = "cov"
    components: int = Field(default=3, ge=1, description="principal components of the tokens, for `cov`")
    bootstrap: int = Field(default=1000, ge=100, description="draws of subjects behind each interval")
    description: str = ""
    source: str = Field(default="", description="where the data come from, and under what licence")

    @field_validator("pooling")
    @classmethod
    def _learns_nothing(cls, pooling: Pooling, info: ValidationInfo) -> Pooling:
        if pooling == "attentive" and info.data.get("type") == "fingerprint":
            raise ValueError("mean, mean+sd, location or cov: a fingerprint trains nothing, attention is trained")
        return pooling

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if self.type == "fingerprint":
            if self.label is not None:
                raise ValueError("no label: a fingerprint asks who it is")
            if self.split.kind == "folds":
                raise ValueError("split.kind all or dataset: a fingerprint trains nothing")
        else:
            if self.label is None:
                raise ValueError(f"a label, the column that this {self.type} predicts")
            if self.split.kind == "all":
                raise ValueError(f"split.kind folds or dataset: a {self.type} is fitted")
        return self


def load_task(path: str | Path) -> Task:
    """A checked task from a YAML file; raises ConfigError with file, field, got and expected."""
    return load(Task, path)


@dataclass
class Cases:
    """The sessions of a task and whose they are.

    Attributes
    ----------
    sessions : list of dict, lines of the dataset
    subject_N : subject of each session, int, a row of `subjects`
    subjects : (cohort, subject) of each subject
    truth_S : class number or value of each subject (the mean over sessions where a value differs); 0 for
        a fingerprint
    classes : names of the classes, in order of their numbers
    left_out : how many sessions were left out, by reason
    """

    sessions: list[dict[str, Any]]
    subject_N: np.ndarray
    subjects: list[tuple[str, str]]
    truth_S: np.ndarray
    classes: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass
class Fold:
    """One fold as a method sees it: what the test sessions answer is not in it.

    Attributes
    ----------
    kind : "classification" or "regression"
    classes : K
    train, test : rows of the sessions, int (n,) and (m,)
    answer_n : class number of each training session, or its value, z-scored over the training subjects
    subject_n : whose each training session is
    seed : of all that is drawn
    """

    kind: str
    classes: int
    train: np.ndarray
    test: np.ndarray
    answer_n: np.ndarray
    subject_n: np.ndarray
    seed: int

    def inner(self) -> np.ndarray:
        """Inner fold of each training session, int (n,), for whatever is chosen rather than fitted.

        Sessions of one subject stay together, and every inner training side holds every class.
        """
        subjects, first = np.unique(self.subject_n, return_index=True)
        stratum_S = strata(self.answer_n[first], self.kind)
        rarest = np.unique(stratum_S, return_counts=True)[1].min() if self.kind == "classification" else len(subjects)
        fold_S = deal(stratum_S, int(min(_INNER_FOLDS, rarest)), np.random.default_rng(self.seed))
        return fold_S[np.searchsorted(subjects, self.subject_n)]


def find_cases(task: Task, dataset: Dataset, least_windows: int, where: str | Path) -> Cases:
    """The sessions of `dataset` that can be used for `task`.

    Parameters
    ----------
    task : Task
    dataset : Dataset
    least_windows : int
        Windows a session must have kept for the model to read it.
    where : str or Path
        The task's file, named in errors.

    Raises
    ------
    ConfigError
        If no session carries the label, a value cannot be what the task says, or a subject is of two classes.
    """
    left_out: Counter[str] = Counter()
    kept, values = [], []
    for session in dataset.sessions:
        value = None if task.label is None else session["labels"].get(task.label)
        if task.label is not None and _is_missing(value):
            left_out["without the label"] += 1
        elif session["n_kept"] < least_windows:
            left_out[f"fewer than {least_windows} windows"] += 1
        else:
            kept.append(session)
            values.append(value)
    if task.type == "fingerprint":
        count = Counter(_subject(session) for session in kept)
        left_out["only session of its subject"] = sum(count[_subject(session)] == 1 for session in kept)
        kept = [session for session in kept if count[_subject(session)] > 1]
        values = [0.0] * len(kept)
    if not kept:
        columns = sorted({name for session in dataset.sessions for name in session["labels"]})
        if task.label is not None and left_out["without the label"]:
            raise ConfigError(
                where,
                "label",
                f"{task.label}, which no session of {dataset.folder} has",
                f"one of {', '.join(columns) or 'the labels (the dataset has none)'}",
            )
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items() if number)
        raise ConfigError(where, "", f"no session of {dataset.folder} ({reasons})", "sessions of use")

    subjects = sorted({_subject(session) for session in kept})
    number = {subject: index for index, subject in enumerate(subjects)}
    subject_N = np.array([number[_subject(session)] for session in kept])
    classes: list[str] = []
    if task.type == "classification":
        classes = sorted({str(value) for value in values})
        value_N = np.array([classes.index(str(value)) for value in values])
        for index, subject in enumerate(subjects):
            found = sorted({classes[value] for value in value_N[subject_N == index]})
            if len(found) > 1:
                got = f"{' and '.join(found)} for subject {subject[1]} of {subject[0]}"
                raise ConfigError(where, "label", got, "one class for each subject")
        truth_S = np.array([value_N[subject_N == index][0] for index in range(len(subjects))])
    else:
        value_N = np.array([_number(value, task, where) for value in values])
        truth_S = np.array([value_N[subject_N == index].mean() for index in range(len(subjects))])
    reasons_found = {reason: number for reason, number in left_out.items() if number}
    return Cases(kept, subject_N, subjects, truth_S, classes, reasons_found)


def _subject(session: dict[str, Any]) -> tuple[str, str]:
    return session["cohort"], session["subject"]


def _is_missing(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return value is None or value.strip().lower() in ("", "n/a", "nan")
    return isinstance(value, float) and math.isnan(value)


def _number(value: Any, task: Task, where: str | Path) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            where,
            "label",
            f"{value!r} in column {task.label}",
            "a number",
            "Use type: classification, or another column",
        )
    return number


def deal(stratum_S: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Fold of each subject, int (S,): strata are shuffled and dealt one after another, like cards.

    Each stratum, and the whole, is spread over the folds as evenly as its size allows.
    """
    shuffled = rng.permutation(len(stratum_S))
    dealt = shuffled[np.argsort(stratum_S[shuffled], kind="stable")]
    fold_S = np.empty(len(stratum_S), np.int64)
    fold_S[dealt] = np.arange(len(dealt)) % folds
    return fold_S


def strata(truth_S: np.ndarray, kind: str) -> np.ndarray:
    """What folds are balanced by, int (S,): the class, or which quarter of the values."""
    if kind == "classification":
        return truth_S.astype(np.int64)
    return np.searchsorted(np.quantile(truth_S, (0.25, 0.5, 0.75)), truth_S)


def make_splits(task: Task, cases: Cases, where: str | Path) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Rows of training and test sessions: a list of repeats, each a list of folds.

    The seed and the subjects decide alone, so every method is given the same splits. No subject is on both
    sides, except under `all`, where nothing is trained.

    Raises
    ------
    ConfigError
        If a side of a split has too few subjects, or too few of one class.
    DatasetError
        If the dataset itself has a subject in two splits.
    """
    everyone = np.arange(len(cases.sessions))
    if task.type == "fingerprint" and len(cases.subjects) < 2:
        raise ConfigError(where, "", f"{len(cases.subjects)} subjects with two sessions", "at least 2")
    if task.split.kind == "all":
        return [[(everyone, everyone)]]
    if task.split.kind == "dataset":
        is_test_N = np.array([session["split"] == "test" for session in cases.sessions])
        repeats = [[(everyone[~is_test_N], everyone[is_test_N])]]
    else:
        if task.split.folds > len(cases.subjects):
            most = f"at most {len(cases.subjects)}, the number of subjects"
            raise ConfigError(where, "split.folds", task.split.folds, most)
        stratum_S = strata(cases.truth_S, task.type)
        repeats = []
        for repeat in range(task.split.repeats):
            fold_S = deal(stratum_S, task.split.folds, np.random.default_rng((task.split.seed, repeat)))
            fold_N = fold_S[cases.subject_N]
            repeats.append([(everyone[fold_N != fold], everyone[fold_N == fold]) for fold in range(task.split.folds)])
    if task.type == "classification" and len(cases.classes) < 2:
        raise ConfigError(where, "label", f"only {cases.classes[0]} in {task.label}", "two or more classes")
    for folds in repeats:
        for train, test in folds:
            shared = np.intersect1d(cases.subject_N[train], cases.subject_N[test])
            if len(shared):
                name = cases.subjects[shared[0]][1]
                raise DatasetError(where, "split", f"subject {name} on both sides", "each subject on one")
            if task.type != "fingerprint":
                _enough(task, cases, train, _LEAST_TRAIN, "training", where)
        scored = np.concatenate([test for _, test in folds])
        if task.type == "fingerprint":
            if len(np.unique(cases.subject_N[scored])) < 2:
                raise ConfigError(where, "split", "fewer than 2 test subjects", "2", "Use split.kind: all")
        else:
            _enough(task, cases, scored, _LEAST_TEST, "test", where)
    return repeats


def _enough(task: Task, cases: Cases, rows: np.ndarray, least: dict[str, int], side: str, where: str | Path) -> None:
    """Refuse a side of a split that has too few subjects."""
    present = np.unique(cases.subject_N[rows])
    counts = {"": len(present)}
    if task.type == "classification":
        counts = {
            f" of class {name}": int((cases.truth_S[present] == index).sum())
            for index, name in enumerate(cases.classes)
        }
    for what, count in counts.items():
        if count < least[task.type]:
            raise ConfigError(
                where,
                "split",
                f"{count} {side} subjects{what}",
                f"at least {least[task.type]}",
                "Use other folds, or more subjects",
            )
