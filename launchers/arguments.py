"""Arguments of a conversion and of a fine-tuning, which are the same on one machine and on a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shards.core.cli import Parser
from shards.core.presets import find

if TYPE_CHECKING:
    from shards.conversion.settings import ConvertSettings

STEPS = ("find", "harmonise", "rank", "pack")  # of a conversion


def add_conversion(parser: Parser) -> None:
    """Add the arguments of a conversion."""
    add = parser.add_argument
    add("cohorts", nargs="+", metavar="COHORT", help="cohort files or names of cohorts")
    parser.add_settings("settings of the conversion, such as grid.mm=3")
    add("--out", required=True, type=Path, metavar="DATASET", help="folder of the dataset")
    add("--ranker", default="mutual", metavar="NAME", help="method that scores windows (default: mutual)")
    about = "version of its scores (default: that of the dataset in --out, else the newest)"
    add("--ranker-version", type=int, metavar="N", help=about)
    add("--extractor", type=Path, metavar="PATH", help="trained temporal extractor (default: train one)")
    add("--retry-refused", action="store_true", help="try scans again that were refused before")


def checked_conversion(args: argparse.Namespace) -> tuple[list[Path], ConvertSettings]:
    """The cohort files and the settings in the arguments of a conversion.

    Raises
    ------
    ConfigError
        If a setting is wrong, or a file is missing.
    """
    from shards.conversion.settings import ConvertSettings
    from shards.core.settings import check, override

    settings = check(ConvertSettings, override({}, args.settings), "command line")
    return [find("cohort", name, "COHORT") for name in args.cohorts], settings


def add_finetuning(parser: Parser) -> None:
    """Add the arguments of a fine-tuning."""
    add = parser.add_argument
    add("run", metavar="RUN_OR_WEIGHTS", help="a run, a checkpoint, an export, or OWNER/NAME on the hub")
    parser.add_settings("settings of the fine-tuning, such as run.epochs=50; NAME.key=value: of the task NAME")
    add("--data", required=True, metavar="DATASET", help="a dataset written by make-shards")
    add("--task", required=True, metavar="TASK", help="a task with split.kind holdout: a YAML file, or a name")
    add("--out", type=Path, metavar="FOLDER", help="folder of the report and the runs (default: in RUN)")
    add("--weights", choices=("encoder", "target"), help="online encoder or its moving average (default: encoder)")
    add("--from-scratch", action="store_true", help="start from random weights, to measure what pretraining adds")


def words_of_finetuning(args: argparse.Namespace) -> list[str]:
    """The arguments of `add_finetuning`, as words of a command line."""
    words = [args.run, "--data", args.data, "--task", str(args.task)]
    words += ["--out", str(args.out)] if args.out else []
    words += ["--weights", args.weights] if args.weights else []
    return [*words, *(["--from-scratch"] if args.from_scratch else []), *args.settings]
