"""Divide subjects into training, validation and test sets. No subject and no family is in two of them.

Splits depend only on the seed and the subjects, so all methods use the same splits.

Legend: N rows (n of training, m of test); S subjects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from shards.conversion.splits import SPLITS, split_people
from shards.core.settings import Contradiction, Settings, Unit

_INNER_FOLDS = 5


class TaskSplitSettings(Settings):
    """How subjects are divided."""

    kind: Literal["folds", "holdout", "dataset", "listed", "sites", "all"] = Field(
        default="folds",
        description="folds: repeated k-fold by subject; holdout: train, validation and test by subject; dataset: the "
        "dataset's own test subjects; listed: lists of subjects in `column` or `file`; sites: each value of `column` "
        "is tested once; all: no split",
    )
    column: str | None = Field(
        default=None,
        description="column of the participants table: for kind: listed, train, validation or test; for kind: sites, "
        "the site",
    )
    file: str | None = Field(
        default=None,
        description="for kind: listed, a table with the columns subject and split, or JSON with a list of subjects for "
        "train, validation and test; relative to the task",
    )
    folds: Annotated[int, Unit("folds")] = Field(default=5, ge=2, description="for kind: folds")
    shares: Annotated[tuple[float, float, float], Unit("share")] = Field(
        default=(0.7, 0.1, 0.2),
        description="shares of the subjects for training, validation and test, for kind: holdout",
    )
    share: Annotated[tuple[float, ...], Unit("share")] = Field(
        default=(1.0,),
        max_length=10,
        description="few-shot: shares of the training (and validation) subjects, ascending to 1. The task is scored "
        "with each share, on the same test subjects",
    )
    repeats: Annotated[int, Unit("times")] = Field(default=5, ge=1, description="how often the subjects are divided")
    family: str | None = Field(default=None, description="column of the participants table; families stay together")
    seed: int = Field(default=0, ge=0, description="of the divisions, the bootstrap and the permutations")

    def facts(self) -> dict[str, object]:
        """The settings, for a report. `column`, `file` and `share` only if they are given."""
        unused = {name for name in ("column", "file") if getattr(self, name) is None}
        unused |= {"share"} if self.share == (1.0,) else set()
        return self.model_dump(exclude=unused)

    @field_validator("shares")
    @classmethod
    def _is_whole(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0 or abs(sum(value) - 1) > 1e-6:
            raise ValueError(f"shares above 0 that add up to 1, not to {sum(value):g}")
        return value

    @field_validator("share")
    @classmethod
    def _is_ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or list(value) != sorted(set(value)) or value[0] <= 0 or value[-1] != 1:
            raise ValueError("shares above 0, ascending to 1, such as [0.1, 0.5, 1]")
        return value

    @field_validator("family")
    @classmethod
    def _is_used(cls, value: str | None, others: ValidationInfo) -> str | None:
        if value is not None and others.data.get("kind") not in ("folds", "holdout", None):
            raise ValueError(f"split.kind folds or holdout: {others.data['kind']} divides nobody")
        return value

    @model_validator(mode="after")
    def _is_given(self) -> TaskSplitSettings:
        given = [name for name in ("column", "file") if getattr(self, name) is not None]
        if self.kind == "listed" and len(given) != 1:
            raise Contradiction("kind", "listed", "either split.column or split.file")
        if self.kind == "sites" and given != ["column"]:
            raise Contradiction("kind", "sites", "split.column, the column of the site")
        if self.kind == "all" and self.share != (1.0,):
            raise Contradiction("share", list(self.share), "nothing: split.kind all trains nobody", "Remove share")
        if self.kind not in ("listed", "sites") and given:
            raise Contradiction(given[0], "a value", f"nothing: split.kind {self.kind} draws the subjects")
        return self


@dataclass(frozen=True)
class Split:
    """Rows of the training, validation and test sets, as ascending int arrays.

    Hyperparameters are selected on `val` or, if it is empty, by cross-validation inside `train`.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    @property
    def fitted(self) -> np.ndarray:
        """The rows used for the final fit: training and validation rows."""
        return np.sort(np.concatenate([self.train, self.val]))


@dataclass
class Fold:
    """A split as a method gets it, without the labels of the test rows.

    Attributes
    ----------
    kind : "classification" or "regression"
    classes : int
        K.
    train, test : int arrays (n,) and (m,)
        Rows; `train` includes validation rows.
    answer_n : array
        Class number of each training row, or its value, z-scored over the training subjects.
    subject_n : int array
        Subject of each training row, or its family if families stay together.
    seed : int
        Seed of all random draws.
    val_n : bool array (n,) or None
        Training rows on which hyperparameters are selected; None for cross-validation.
    repeat : int
        Number of the repeat, from 0. Two repeats may test the same subjects.
    """

    kind: str
    classes: int
    train: np.ndarray
    test: np.ndarray
    answer_n: np.ndarray
    subject_n: np.ndarray
    seed: int
    val_n: np.ndarray | None = None
    repeat: int = 0

    def inner(self) -> np.ndarray:
        """Inner fold of each training row, int (n,), for the selection of hyperparameters; -1 if it is never held out.

        Rows of one group stay together, and every inner training set has all classes.
        """
        if self.val_n is not None:
            return np.where(self.val_n, 0, -1)
        is_class = self.kind == "classification"
        subjects, first, number_n = np.unique(self.subject_n, return_index=True, return_inverse=True)
        answers_S = np.bincount(np.unique(np.stack([number_n, self.answer_n]), axis=1)[0].astype(int))
        if is_class and answers_S.max() > 1:  # states: every subject has several classes
            stratum_S = np.zeros(len(subjects), np.int64)
            rarest = min(len(np.unique(number_n[self.answer_n == k])) for k in np.unique(self.answer_n))
        else:
            stratum_S = strata(self.answer_n[first], self.kind)
            rarest = np.unique(stratum_S, return_counts=True)[1].min() if is_class else len(subjects)
        fold_S = deal(stratum_S, int(max(2, min(_INNER_FOLDS, rarest))), np.random.default_rng(self.seed))
        return fold_S[number_n]


def deal(stratum_S: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Assign subjects to folds, int (S,): strata are shuffled, and their subjects assigned to the folds in turn.

    Each stratum, and all subjects together, are divided as evenly as possible.
    """
    shuffled = rng.permutation(len(stratum_S))
    dealt = shuffled[np.argsort(stratum_S[shuffled], kind="stable")]
    fold_S = np.empty(len(stratum_S), np.int64)
    fold_S[dealt] = np.arange(len(dealt)) % folds
    return fold_S


def strata(truth_S: np.ndarray, kind: str) -> np.ndarray:
    """The stratum of each subject, int (S,): its class, or the quarter of its value."""
    if kind == "classification":
        return truth_S.astype(np.int64)
    if kind == "state":
        return np.zeros(len(truth_S), np.int64)
    return np.searchsorted(np.quantile(truth_S, (0.25, 0.5, 0.75)), truth_S)


def divide(
    settings: TaskSplitSettings, kind: str, truth_S: np.ndarray, family_S: np.ndarray, subject_N: np.ndarray
) -> list[list[Split]]:
    """Divide subjects `settings.repeats` times; returns a list of repeats, each a list of splits.

    Parameters
    ----------
    settings : TaskSplitSettings
        With the kind `folds` or `holdout`.
    kind : str
        Type of the task. Classes, or quarters of the values, are divided in the same shares.
    truth_S : array
        Class or value of each subject.
    family_S : int array
        Family of each subject. A subject without a family is a family.
    subject_N : int array
        Subject of each row.
    """
    rows = np.arange(len(subject_N))
    stratum_S = strata(truth_S, kind)
    _, first, number_S = np.unique(family_S, return_index=True, return_inverse=True)
    repeats = []
    for repeat in range(settings.repeats):
        if settings.kind == "folds":
            rng = np.random.default_rng((settings.seed, repeat))
            fold_N = deal(stratum_S[first], settings.folds, rng)[number_S][subject_N]
            repeats.append([Split(rows[fold_N != k], rows[:0], rows[fold_N == k]) for k in range(settings.folds)])
        else:
            people = [("", f"{subject:09d}") for subject in range(len(truth_S))]
            of_stratum = {person: str(stratum) for person, stratum in zip(people, stratum_S, strict=True)}
            of_family = {person: int(number) for person, number in zip(people, number_S, strict=True)}
            seed = int(np.random.default_rng((settings.seed, repeat)).integers(2**31))
            side_of = split_people(of_stratum, settings.shares, seed, of_family)
            side_N = np.array([side_of[person] for person in people])[subject_N]
            repeats.append([Split(*(rows[side_N == side] for side in SPLITS))])
    return repeats
