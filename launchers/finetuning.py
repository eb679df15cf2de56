"""A fine-tuning as it is called, by its own command or through a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shards.format.reader import Dataset
from slim.checkpoints.run_folder import FINETUNE, REPORT
from slim.evaluation.task import find_cases, load_task, make_splits

if TYPE_CHECKING:
    from slim.config import FinetuneSettings
    from slim.finetune.method import Finetuned

Train = Callable[["FinetuneSettings"], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every fine-tuning is called with, wherever it runs."""
    add = parser.add_argument
    add("run", metavar="RUN_OR_WEIGHTS", help="as for probe")
    add("overrides", nargs="*", metavar="key=value", help="of the fine-tuning, such as run.epochs=50")
    add("--data", required=True, metavar="DATASET", help="of make-shards")
    add("--task", type=Path, required=True, metavar="TASK.yaml", help="with split.kind holdout")
    add("--out", type=Path, metavar="FOLDER", help="of the report and the runs (default: in RUN)")
    add("--weights", choices=("encoder", "target"), help="as for probe")
    add("--from-scratch", action="store_true", help="from random weights: what does pretraining add?")


def words_of(args: argparse.Namespace) -> list[str]:
    """The arguments that `add_arguments` took, to be typed again."""
    words = [args.run, "--data", args.data, "--task", str(args.task)]
    words += ["--out", str(args.out)] if args.out else []
    words += ["--weights", args.weights] if args.weights else []
    return [*words, *(["--from-scratch"] if args.from_scratch else []), *args.overrides]


def report_of(method: Finetuned, args: argparse.Namespace) -> Path:
    """Folder of the report that the scores join."""
    return args.out or method.ours.results / REPORT


def open_call(args: argparse.Namespace, train: Train) -> Finetuned:
    """The fine-tunings that a command line asks for, with everything looked at that can be wrong with them.

    Raises
    ------
    UserError
        If the weights, the data, the task, a setting or the report that is there do not fit.
    """
    task = load_task(args.task)

    import torch

    from slim.finetune.method import FINETUNED, SCRATCH, check_report, refuse
    from slim.finetune.method import Finetuned as Method
    from slim.inference.slim_brain import SlimBrain

    refuse(task, args.task)
    dataset = Dataset(args.data)
    ours = SlimBrain.from_pretrained(args.run, args.weights)
    ours.check_data(dataset)
    ours.check_unseen(dataset)
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
        assignments=args.overrides,
        train=train,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    for number in range(len(splits)):
        method.settings(number)
    check_report(report_of(method, args), task, cases, splits)
    return method
