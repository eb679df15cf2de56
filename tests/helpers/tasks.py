"""Tasks, and something like a dataset for them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from helpers.records import session_record
from shards.core.settings import check
from slim.evaluation.task import Cases, Task, find_cases

GROUP = {
    "name": "g",
    "type": "classification",
    "label": "group",
    "bootstrap": 100,
    "permutations": 99,
    "split": {"folds": 4, "repeats": 2},
}

SCORE = GROUP | {"name": "s", "type": "regression", "label": "score"}

WHO = {"name": "f", "type": "fingerprint", "bootstrap": 100, "permutations": 99, "split": {"kind": "all"}}


def task(tree: dict, **changes: Any) -> Task:
    return check(Task, tree | changes, "task.yaml")


def sessions(subjects: int, each: int = 2, **labels: Callable[[int], Any]) -> Any:
    """Something like a dataset: sessions, labels by subject."""
    lines = [
        session_record(
            key=f"{subject}-{visit}",
            subject=str(subject),
            split=("train", "train", "val", "test")[subject % 4],
            labels={name: label(subject) for name, label in labels.items()},
        )
        for subject in range(subjects)
        for visit in range(each)
    ]
    return SimpleNamespace(sessions=lines, folder="data")


def cases_of(chosen: Task, dataset: Any) -> Cases:
    return find_cases(chosen, dataset, "task.yaml")


def groups(subjects: int = 24, each: int = 2) -> tuple[Task, Cases]:
    chosen = task(GROUP)
    return chosen, cases_of(chosen, sessions(subjects, each, group=lambda subject: "AB"[subject % 2]))
