"""The fine-tunings of a command line, which are the same on one machine and on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shards.core.errors import ConfigError
from shards.core.extras import require
from shards.core.presets import find
from shards.core.settings import check_keys, override, typed
from shards.format.reader import Dataset
from slim.checkpoints.run_folder import FINETUNE, REPORT
from slim.checkpoints.source import require_weights
from slim.config import FinetuneSettings, renamed_assignments
from slim.evaluation.division import make_splits
from slim.evaluation.task import find_cases, load_task, overrides_of_tasks

if TYPE_CHECKING:
    from slim.finetune.method import Finetuned

Train = Callable[[FinetuneSettings], None]


def report_of(method: Finetuned, args: argparse.Namespace) -> Path:
    """Folder of the report to which the scores are added."""
    return args.out or method.ours.results / REPORT


def open_call(args: argparse.Namespace, train: Train) -> Finetuned:
    """Make the fine-tunings of a command line, after checking all that can be checked before training.

    Raises
    ------
    UserError
        If the weights, the data, the task, a setting and an existing report do not fit together.
    """
    args.task = find("task", args.task, "--task")
    (words,), assignments = overrides_of_tasks([args.task], args.settings, FinetuneSettings.model_fields)
    task = load_task(args.task, words)
    check_keys(FinetuneSettings, override({}, renamed_assignments(assignments)))
    dataset = Dataset(args.data)
    require_weights(args.run)

    import torch

    from slim.finetune.method import FINETUNED, SCRATCH, check_report, refuse
    from slim.finetune.method import Finetuned as Method
    from slim.inference.slim_brain import SlimBrain

    with typed(words, args.task):
        refuse(task, args.task)
    ours = SlimBrain.from_pretrained(args.run, args.weights)
    ours.check_data(dataset)
    ours.check_unseen(dataset)
    with typed(words, args.task):
        cases = find_cases(task, dataset, args.task)
        splits = make_splits(task, cases, args.task)
        if not all(len(split.val) for repeat in splits for split in repeat):
            hint = "The best epoch is selected on validation subjects"
            raise ConfigError(args.task, "split", "no validation subjects in the lists", "some", hint)
    name = SCRATCH if args.from_scratch else FINETUNED
    method = Method(
        name=name,
        ours=ours,
        task=task,
        dataset=dataset,
        cases=cases,
        splits=splits,
        folder=(args.out or ours.results) / FINETUNE / f"{task.name}-{name}",
        assignments=assignments,
        train=train,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    for number in range(len(splits)):
        if method.settings(number).lora is not None:
            require("peft")
    check_report(report_of(method, args), task, cases, splits)
    return method
