"""Several encoders on several tasks: the same splits, the same draws of subjects, means over training seeds.

Each variant is trained with several seeds. Their scores are averaged for each bootstrap draw, so the interval of the
mean shows the uncertainty from the choice of test subjects. The spread of the seeds is given separately.

Legend: D the score and its bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shards.core.files import atomically
from shards.format.reader import Dataset
from slim.evaluation import metrics, probe
from slim.evaluation.division import make_splits
from slim.evaluation.draws import difference
from slim.evaluation.results import Draws, Estimate, averaged
from slim.evaluation.task import Cases, Task, find_cases
from slim.inference.slim_brain import Features, SlimBrain


@dataclass(frozen=True)
class Question:
    """A task with the rows of a dataset that have its label."""

    task: Task
    cases: Cases
    where: str

    @property
    def metric(self) -> str:
        return metrics.HEADLINE[self.task.type]

    def draws(self, method: probe.Method) -> np.ndarray:
        """The headline score and its bootstrap draws, (D,)."""
        splits = make_splits(self.task, self.cases, self.where)
        return probe.score(self.task, self.cases, splits, method)[self.metric]


def ask(tasks: Mapping[str, Task], dataset: Dataset, event_root: Path) -> list[Question]:
    """The questions of the tasks; the keys of `tasks` are the files that the tasks were read from."""
    return [Question(task, find_cases(task, dataset, where, event_root), where) for where, task in tasks.items()]


def encode(model: SlimBrain, dataset: Dataset) -> dict[str, Features]:
    """Features of every session, by key."""
    return {session.key: model.encode_session(dataset, session) for session in dataset.sessions}


@torch.no_grad()
def shrink_positions(model: SlimBrain, seed: int) -> None:
    """Replace the position embeddings of an encoder by random ones with an SD of 0.02.

    The initial ones are as large as an embedded patch. This helps training, but in an untrained encoder they dominate
    the features; with small ones, it treats all patches nearly alike.
    """
    generator = torch.Generator().manual_seed(seed)
    for table in (model.encoder.space, model.encoder.time):
        table.copy_(torch.randn(table.shape, generator=generator) * 0.02)


def encoder_draws(
    features: Mapping[str, Features],
    questions: Sequence[Question],
    poolings: Mapping[str, Mapping[str, object]] | None = None,
) -> Draws:
    """Draws of an encoder by task, and by `task/NAME` for other poolings, given as changes of the task.

    Attentive pooling is trained on labels, so fingerprints are not scored with it.
    """
    found = {}
    for question in questions:
        task = question.task
        found[task.name] = question.draws(probe.encoder_method(task, question.cases, features))
        for name, changes in (poolings or {}).items():
            changed = task.model_copy(update=dict(changes))
            trained = task.type == "fingerprint" and changed.pooling == "attentive"
            if task.type == "state" or changed == task or trained:
                continue
            asked = Question(changed, question.cases, question.where)
            found[f"{task.name}/{name}"] = asked.draws(probe.encoder_method(changed, question.cases, features))
    return found


def baseline_draws(dataset: Dataset, questions: Sequence[Question], wanted: Sequence[str] = ()) -> dict[str, Draws]:
    """Draws of the baselines without an encoder, by method and task; of all, or of those wanted."""
    found: dict[str, Draws] = {}
    for question in questions:
        for name, method in probe.baselines(question.task, question.cases, dataset).items():
            if wanted and name not in wanted:
                continue
            found.setdefault(name, {})[question.task.name] = question.draws(method)
    return found


def save(path: Path, draws: Draws) -> None:
    """Save draws, atomically: the file is complete or does not exist."""
    with atomically(path) as file:
        np.savez(file, allow_pickle=False, **dict(draws))


def load(path: Path) -> Draws:
    with np.load(path) as arrays:
        return dict(arrays)


def summarise(seeds: Sequence[Draws]) -> dict[str, Estimate]:
    """Mean over seeds of each task's score, its 95 % interval over subjects, and the score of every seed.

    Scores that some seeds lack are left out.
    """
    return {
        name: Estimate.of_draws(*[draws[name] for draws in seeds])
        for name in seeds[0]
        if all(name in draws for draws in seeds)
    }


def differences(ours: Sequence[Draws], theirs: Sequence[Draws]) -> dict[str, Estimate]:
    """Differences between two means over seeds, with 95 % intervals. Both are scored on the same draws of subjects.

    Only tasks that all seeds of both have are compared.
    """
    everyone = [*ours, *theirs]
    names = [name for name in everyone[0] if all(name in draws for draws in everyone)]
    mine, its = (averaged([{name: draws[name] for name in names} for draws in seeds]) for seeds in (ours, theirs))
    return difference(mine, its)
