"""Divide the cases of a task into training, validation and test rows, and check that each side has enough subjects.

A task may be scored with few-shot shares of its training and validation subjects. The subjects of a smaller share are
among those of a larger one. Classes, or quarters of the values, have the same share each, as nearly as whole subjects
allow, and families stay together. Test subjects are the same for all shares.

All of it depends on the seed and the subjects alone.

Legend: N rows; S subjects; F families.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.conversion.splits import SPLITS
from shards.core.errors import ConfigError, DatasetError
from slim.evaluation.splits import Split, divide, strata
from slim.evaluation.task import Cases, Task

Splits = list[list[Split]]  # repeats, each a list of splits

# Smallest number of subjects of a class (in a regression, of all) in each set of a split. Without a validation set, the
# training set is divided again to select the penalty.
_LEAST = {
    "training": {"classification": 2, "state": 2, "regression": 4},
    "validation": {"classification": 1, "state": 1, "regression": 2},
    "test": {"classification": 1, "state": 1, "regression": 3},
}


def least_scored(task: Task) -> int:
    """Smallest number of subjects that a task can be scored on; of each class, if it has classes."""
    return 2 if task.type == "fingerprint" else _LEAST["test"][task.type]


def make_splits(task: Task, cases: Cases, where: str | Path) -> Splits:
    """Rows for training, validation and test: a list of repeats, each a list of splits.

    Splits depend only on the seed and the subjects, so all methods get the same splits. No subject and no family is on
    two sides, except with `all`, for which nothing is trained.

    Raises
    ------
    ConfigError
        If a class has one subject, all have the same value, or a side of a split has too few subjects of a class.
    DatasetError
        If the dataset itself has a subject in two splits.
    """
    rows = np.arange(len(cases.sessions))
    if task.type == "fingerprint" and len(cases.subjects) < 2:
        raise ConfigError(where, "", f"{len(cases.subjects)} subjects with two sessions", "at least 2")
    if task.split.kind == "all":
        _check_gallery(task, cases, rows, where)
        return [[Split(rows, rows[:0], rows)]]
    if task.split.kind == "dataset":
        side_N = np.array([session.split for session in cases.sessions])
        repeats = [[Split(rows[side_N != "test"], rows[:0], rows[side_N == "test"])]]
    elif task.split.kind == "listed":
        side_N = cases.group_S[cases.subject_N]
        repeats = [[Split(*(rows[side_N == side] for side in SPLITS))]]
    elif task.split.kind == "sites":
        site_N, sites = cases.group_S[cases.subject_N], np.unique(cases.group_S)
        if len(sites) < 2:
            raise ConfigError(where, "split.column", f"one value, {sites[0]}", "two or more sites")
        repeats = [[Split(rows[site_N != site], rows[:0], rows[site_N == site]) for site in sites]]
    else:
        families = len(np.unique(cases.family_S))
        if task.split.kind == "folds" and task.split.folds > families:
            most = f"at most {families}, the number of {'families' if task.split.family else 'subjects'}"
            raise ConfigError(where, "split.folds", task.split.folds, most)
        repeats = divide(task.split, task.type, cases.truth_S, cases.family_S, cases.subject_N)
    _check_answers(task, cases, where)
    for splits in repeats:
        for split in splits:
            _apart(cases, split, where)
            if task.type != "fingerprint":
                _check_training(task, cases, split, where)
        scored = np.concatenate([split.test for split in splits])
        if task.type == "fingerprint":
            if len(np.unique(cases.subject_N[scored])) < 2:
                raise ConfigError(where, "split", "fewer than 2 test subjects", "2", "Use split.kind: all")
            _check_gallery(task, cases, scored, where)
        else:
            _enough(task, cases, scored, "test", where)
    return repeats


def divide_shares(task: Task, cases: Cases, splits: Splits, where: str | Path) -> dict[float, Splits]:
    """The splits with each share of `task.split.share`, ascending; those of share 1 are `splits`.

    Parameters
    ----------
    task, cases
    splits : list of list of Split
        Result of `make_splits`.
    where : str or Path
        File of the task, named in errors.

    Raises
    ------
    ConfigError
        If a share has too few training or validation subjects of a class, or all have the same value.
    """
    found: dict[float, Splits] = {share: [] for share in task.split.share if share < 1}
    for repeat, parts in enumerate(splits):
        for split_of in found.values():
            split_of.append([])
        for number, split in enumerate(parts):
            ranks = [
                _ranks(task, cases, rows, (task.split.seed, repeat, number, side))
                for side, rows in enumerate((split.train, split.val))
            ]
            for share, split_of in found.items():
                less = Split(_first(split.train, ranks[0], share), _first(split.val, ranks[1], share), split.test)
                _check_training(task, cases, less, where, share)
                split_of[-1].append(less)
    return {**found, 1.0: splits}


def _ranks(task: Task, cases: Cases, rows: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """The rank of each row's family in the order in which shares take them, from 0, int (N,)."""
    family_N = cases.family_S[cases.subject_N[rows]]
    _, first, number_N = np.unique(family_N, return_index=True, return_inverse=True)
    if not len(first):
        return number_N
    stratum_F = strata(cases.truth_S[cases.subject_N[rows[first]]], task.type)
    rng = np.random.default_rng((*seed, 3))
    place_F, size_F = np.empty(len(stratum_F)), np.empty(len(stratum_F))
    for stratum in np.unique(stratum_F):
        of_stratum = np.flatnonzero(stratum_F == stratum)
        place_F[of_stratum] = (rng.permutation(len(of_stratum)) + 0.5) / len(of_stratum)
        size_F[of_stratum] = len(of_stratum)
    rank_F = np.empty(len(place_F), np.int64)
    # of families at the same place of two strata, that of the smaller stratum is first
    rank_F[np.lexsort((rng.random(len(place_F)), size_F, place_F))] = np.arange(len(place_F))
    return rank_F[number_N]


def _first(rows: np.ndarray, rank_N: np.ndarray, share: float) -> np.ndarray:
    """The rows of the first families that make up this share, at least of one."""
    families = rank_N.max() + 1 if len(rank_N) else 0
    return rows[rank_N < max(1, int(share * families + 0.5))]


def _check_training(task: Task, cases: Cases, split: Split, where: str | Path, share: float = 1.0) -> None:
    """Refuse a split whose training or validation subjects are too few, or all have the same value.

    Parameters
    ----------
    task, cases, split
    where : str or Path
        File of the task.
    share : float
        Share of the training subjects that the split was reduced to.
    """
    remark = ""
    if task.split.kind == "sites":
        remark = f" without the site {cases.group_S[cases.subject_N[split.test[0]]]}"
    # without validation subjects, families are divided again, to select the penalty
    _enough(task, cases, split.train, "training", where, share, families=not len(split.val), remark=remark)
    _check_spread(task, cases, split.fitted, "training ", where)
    if len(split.val):
        _enough(task, cases, split.val, "validation", where, share)


def _check_gallery(task: Task, cases: Cases, tested: np.ndarray, where: str | Path) -> None:
    """Refuse a gallery of more people than are tested."""
    people = len(np.unique(cases.subject_N[tested]))
    if task.gallery is not None and task.gallery > people:
        got = f"{task.gallery} with {people} test people of two or more sessions"
        hint = "Lower it, test more people, or use split.kind: all if nobody was seen in pretraining"
        raise ConfigError(where, "gallery", got, f"2 to {people}", hint)


def _check_answers(task: Task, cases: Cases, where: str | Path) -> None:
    """Refuse labels that no split of the subjects can test.

    Raises
    ------
    ConfigError
        If there is only one class, a class has one subject, or all subjects have the same value.
    """
    field = (task.label and "label") or "events"
    if task.type in ("classification", "state"):
        if len(cases.classes) < 2:
            got = f"only {cases.classes[0]} in {task.label or 'the events'}"
            raise ConfigError(where, field, got, "two or more classes")
        people = people_of(cases, np.arange(len(cases.sessions)))
        alone = [name for name, count in people.items() if count == 1]
        if alone:
            others = ", ".join(f"{name} {count}" for name, count in people.items())
            got = f"1 person of class {alone[0]} (people of each class: {others})"
            hint = "Leave that class out, or join classes, by `classes` in the task"
            raise ConfigError(where, field, got, "several people of every class", hint if task.label else "")
    _check_spread(task, cases, np.arange(len(cases.sessions)), "", where)


def _check_spread(task: Task, cases: Cases, rows: np.ndarray, side: str, where: str | Path) -> None:
    """Refuse a regression if all subjects of these rows have the same value."""
    if task.type != "regression":
        return
    value_S = cases.truth_S[np.unique(cases.subject_N[rows])]
    if len(value_S) and value_S.min() == value_S.max():
        got = f"the same value {value_S[0]:g} of {task.label} for all {len(value_S)} {side}people"
        hint = "Take another column" if not side else "Use other folds or shares, or more subjects"
        raise ConfigError(where, "label", got, "values that differ", hint)


def people_of(cases: Cases, rows: np.ndarray, unit_S: np.ndarray | None = None) -> dict[str, int]:
    """Number of subjects of each class in these rows; of families, if `unit_S` is the family of each subject."""
    answer, unit = cases.answer_N[rows], cases.subject_N[rows]
    if unit_S is not None:
        unit = unit_S[unit]
    return {name: len(np.unique(unit[answer == index])) for index, name in enumerate(cases.classes)}


def _apart(cases: Cases, split: Split, where: str | Path) -> None:
    """Raise DatasetError if a subject or a family is on two sides."""
    sides = [np.unique(cases.family_S[cases.subject_N[rows]]) for rows in (split.train, split.val, split.test)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        shared = np.intersect1d(sides[one], sides[other])
        if len(shared):
            name = cases.subjects[int(np.flatnonzero(cases.family_S == shared[0])[0])][1]
            raise DatasetError(where, "split", f"subject {name} on both sides", "each subject on one")


def _enough(
    task: Task,
    cases: Cases,
    rows: np.ndarray,
    side: str,
    where: str | Path,
    share: float = 1.0,
    families: bool = False,
    remark: str = "",
) -> None:
    """Refuse a side of a split that has too few subjects, or families."""
    least = _LEAST[side][task.type]
    families = families and task.split.family is not None
    unit_S = cases.family_S if families else np.arange(len(cases.subjects))
    counts = {"": len(np.unique(unit_S[cases.subject_N[rows]]))}
    if cases.classes:
        whole = people_of(cases, np.arange(len(cases.sessions)), unit_S)
        counts = {f" of class {name} ({whole[name]} in all)": n for name, n in people_of(cases, rows, unit_S).items()}
    for what, count in counts.items():
        if count < least:
            got = f"{count} {side} {'families' if families else 'subjects'}{what}{remark}"
            if share < 1:
                got, hint = f"{share:g}, which leaves {got}", "Use a larger share, or more subjects"
                raise ConfigError(where, "split.share", got, f"at least {least}", hint)
            hint = "Use other folds or shares, or more subjects"
            if task.split.kind == "sites":
                hint = "Join sites in the column, or use another split.kind"
            raise ConfigError(where, "split", got, f"at least {least}", hint)
