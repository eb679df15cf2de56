"""Probes during training: a task fitted on training subjects and scored on validation subjects.

No test subject is read or encoded: its sessions are removed from the dataset before anything else. `RUN/probe.jsonl`
has a line for each probe, and `RUN/checkpoints/best` names the checkpoint with the highest score.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, ValidationError

from shards.core.errors import ConfigError
from shards.format.reader import Dataset
from shards.format.record import Number
from shards.format.session_record import SessionRecord
from shards.format.stream import generator
from slim.evaluation import metrics, probe
from slim.evaluation.division import Splits, least_scored, make_splits, people_of
from slim.evaluation.results import Estimate
from slim.evaluation.splits import TaskSplitSettings
from slim.evaluation.task import Cases, Task, find_cases, load_task
from slim.inference.slim_brain import SlimBrain


class ValidationScore(BaseModel):
    """A line of probe.jsonl.

    Attributes
    ----------
    step : int
        Optimizer step of the checkpoint.
    task, metric : str
    value : float or None
        The score; higher is better. None if it is undefined.
    low, high : float or None
        Ends of the 95 % interval over validation subjects.
    subjects : int
        Number of validation subjects.
    seconds : float
        How long the probe took.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    step: StrictInt
    task: StrictStr
    metric: StrictStr
    value: Number | None
    low: Number | None = None
    high: Number | None = None
    subjects: StrictInt = 0
    seconds: Number = 0

    def line(self) -> str:
        """The score in words."""
        if self.value is None:
            return f"step {self.step}: {metrics.words(self.metric)} undefined"
        between = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"step {self.step}: {metrics.words(self.metric)} {self.value:.3f}{between}"


def read_scores(path: Path) -> list[ValidationScore]:
    """The lines of a probe.jsonl by step, the last one of each step; unreadable lines are left out."""
    found: dict[int, ValidationScore] = {}
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                score = ValidationScore.model_validate(json.loads(text))
            except (ValueError, RecursionError, ValidationError):  # a killed run leaves an incomplete line
                continue
            found[score.step] = score
    return [found[step] for step in sorted(found)]


def best_of(scores: list[ValidationScore]) -> ValidationScore | None:
    """The highest score, the earliest if several are equal; None if there is none."""
    defined = [score for score in scores if score.value is not None]
    return max(defined, key=lambda score: (score.value or 0.0, -score.step), default=None)


@dataclass(frozen=True)
class Validation:
    """A task on the training and validation subjects of a dataset.

    Attributes
    ----------
    task : Task
        Its split is replaced by that of the dataset: training subjects are fitted on, validation subjects scored.
    dataset : Dataset
        Without the sessions of test subjects.
    cases : Cases
    splits : Splits
    """

    task: Task
    dataset: Dataset
    cases: Cases
    splits: Splits

    @classmethod
    def open(cls, path: str | Path, data: str, subjects: int | None) -> Validation:
        """Open a task and a dataset.

        Parameters
        ----------
        path : str or Path
            File of the task.
        data : str
            The dataset.
        subjects : int or None
            Most subjects of each side, drawn with the seed of the task's split; None for all.

        Raises
        ------
        UserError
            If the task cannot be scored on the validation subjects of this dataset.
        """
        task = load_task(path)
        split = TaskSplitSettings(kind="dataset", seed=task.split.seed)
        task = task.model_copy(update={"split": split})
        dataset = Dataset(data)
        if not dataset.of_split("val"):
            hint = "Convert with split.shares that leave some, or remove run.probe"
            raise ConfigError(data, "val", "no session", "validation subjects, on which run.probe scores", hint)
        fitted, scored = (_drawn(dataset.of_split(side), subjects, split.seed) for side in ("train", "val"))
        # A split of the kind `dataset` scores the side called test; here it is the validation side.
        dataset.sessions = [*fitted, *(one.model_copy(update={"split": "test"}) for one in scored)]
        cases = find_cases(task, dataset, path)
        _check_scored(task, cases, data)
        return cls(task, dataset, cases, make_splits(task, cases, path))

    def score(self, model: SlimBrain) -> ValidationScore:
        """Encode the sessions, fit the probe, and score it."""
        begun = time.monotonic()
        features = {one.key: model.encode_session(self.dataset, one) for one in self.cases.distinct()}
        method = probe.encoder_method(self.task, self.cases, features, model.device)
        metric = metrics.HEADLINE[self.task.type]
        found = Estimate.of_draws(probe.score(self.task, self.cases, self.splits, method)[metric])
        tested = {self.cases.subjects[self.cases.subject_N[row]] for row in self.splits[0][0].test}
        return ValidationScore(
            step=model.step,
            task=self.task.name,
            metric=metric,
            value=found.value,
            low=found.low,
            high=found.high,
            subjects=len(tested),
            seconds=round(time.monotonic() - begun, 2),
        )


def _check_scored(task: Task, cases: Cases, data: str) -> None:
    """Refuse a dataset with too few validation subjects for the task."""
    rows = np.array([row for row, session in enumerate(cases.sessions) if session.split == "test"], int)
    counts = {"": len(np.unique(cases.subject_N[rows]))}
    if cases.classes:
        people = people_of(cases, rows, np.arange(len(cases.subjects)))
        counts = {f" of class {name}": count for name, count in people.items()}
    for what, count in counts.items():
        if count < (least := least_scored(task)):
            expected = f"at least {least} for run.probe with {task.name}"
            hint = "Convert with a larger share of validation subjects (split.shares), or choose another task"
            raise ConfigError(data, "val", f"{count} validation subjects{what}", expected, hint)


def _drawn(sessions: list[SessionRecord], subjects: int | None, seed: int) -> list[SessionRecord]:
    """The sessions of at most so many subjects."""
    people = sorted({session.person for session in sessions})
    if subjects is None or len(people) <= subjects:
        return list(sessions)
    chosen = generator(seed, "probe").permutation(len(people))[:subjects]
    kept = {people[row] for row in chosen}
    return [session for session in sessions if session.person in kept]
