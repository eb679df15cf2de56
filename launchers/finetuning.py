"""The arguments of a fine-tuning, which are the same on one machine and on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shards.core.cli import Parser
from shards.core.presets import find
from shards.core.settings import typed
from shards.format.reader import Dataset
from slim.checkpoints.run_folder import FINETUNE, REPORT
from slim.evaluation.task import find_cases, load_task, make_splits, overrides_of_tasks

if TYPE_CHECKING:
    from slim.config import FinetuneSettings
    from slim.finetune.method import Finetuned

Train = Callable[["FinetuneSettings"], None]


def add_arguments(parser: Parser) -> None:
    """Add the arguments of a fine-tuning."""
    add = parser.add_argument
    add("run", metavar="RUN_OR_WEIGHTS", help="a run, a checkpoint, an export, or OWNER/NAME on the hub")
    parser.add_settings("settings of the fine-tuning, such as run.epochs=50; NAME.key=value: of the task NAME")
    add("--data", required=True, metavar="DATASET", help="a dataset written by make-shards")
    add("--task", required=True, metavar="TASK", help="a task with split.kind holdout: a YAML file, or a name")
    add("--out", type=Path, metavar="FOLDER", help="folder of the report and the runs (default: in RUN)")
    add("--weights", choices=("encoder", "target"), help="online encoder or its moving average (default: encoder)")
    add("--from-scratch", action="store_true", help="start from random weights, to measure what pretraining adds")


def words_of(args: argparse.Namespace) -> list[str]:
    """The arguments of `add_arguments`, as words of a command line."""
    words = [args.run, "--data", args.data, "--task", str(args.task)]
    words += ["--out", str(args.out)] if args.out else []
    words += ["--weights", args.weights] if args.weights else []
    return [*words, *(["--from-scratch"] if args.from_scratch else []), *args.settings]


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
    from slim.config import FinetuneSettings

    (words,), assignments = overrides_of_tasks([args.task], args.settings, FinetuneSettings.model_fields)
    task = load_task(args.task, words)

    import torch

    from slim.finetune.method import FINETUNED, SCRATCH, check_report, refuse
    from slim.finetune.method import Finetuned as Method
    from slim.inference.slim_brain import SlimBrain

    with typed(words, args.task):
        refuse(task, args.task)
    dataset = Dataset(args.data)
    ours = SlimBrain.from_pretrained(args.run, args.weights)
    ours.check_data(dataset)
    ours.check_unseen(dataset)
    with typed(words, args.task):
        cases = find_cases(task, dataset, ours.settings.windows.k, args.task)
        splits = make_splits(task, cases, args.task)
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
        method.settings(number)
    check_report(report_of(method, args), task, cases, splits)
    return method
