"""Convert, pretrain and fine-tune on a cluster with SLURM.

    slim-brain slurm shards COHORT.yaml [COHORT.yaml ...] --out DATASET --tasks N [key=value ...]
    slim-brain slurm pretrain CONFIG.yaml --nodes N --gpus-per-node G [key=value ...]
    slim-brain slurm finetune RUN_OR_WEIGHTS --data DATASET --task TASK.yaml --nodes N --gpus-per-node G
    slim-brain slurm status DATASET_OR_RUN
    slim-brain slurm cancel DATASET_OR_RUN

A run is requeued automatically. Before its time limit and when it is preempted, it saves a checkpoint first; after the
loss of a process or node, it starts again from the last complete checkpoint, with other or fewer nodes if needed. A
conversion is an array of tasks; those that fail are tried a second time. A fine-tuning has one job for each split of
the subjects.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launchers.arguments import add_conversion, add_finetuning, checked_conversion, words_of_finetuning
from launchers.cluster.scheduler import SlurmSettings
from shards.core.cli import DONE, RESUME, WRONG, Parser, call_of, summary
from shards.core.presets import find
from shards.core.settings import check, read_yaml
from slim.config import load_config

_FLAGS = ("partition", "account", "qos", "time", "mem", "constraint", "cpus_per_task", "python")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"shards": shards, "pretrain": pretrain, "finetune": finetune, "status": status, "cancel": cancel}
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    parser = Parser("slurm", __doc__.strip().replace("slim-brain slurm", call_of("slurm")), f"pretrain {_EXAMPLE}")
    parser.add_argument("command", choices=list(commands), help="see COMMAND --help")
    parser.parse_args(words)
    return WRONG


_EXAMPLE = "configs/pretrain/lean.yaml data=DATASET --nodes 4 --gpus-per-node 8"


def pretrain(words: list[str]) -> int:
    """Check the call, write the script and submit it; with --follow, show its log."""
    parser = Parser(
        "slurm pretrain", "Pretrain with sbatch: one process per GPU, requeued until the run is finished.", _EXAMPLE
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_settings("settings of the pretraining, such as run.steps=2000")
    _add_nodes(parser)
    args = parser.parse_args(words)
    cluster, asked_for = _cluster(args), load_config(args.config, args.settings)

    from launchers.cluster import tracking
    from launchers.cluster.submission import Submission

    asked = Submission(args, cluster)
    settings = asked.spread(asked_for)
    if args.dry_run:
        return asked.dry_run(settings)
    asked.check([settings])
    then = call_of("probe", settings.run.out, "--data", settings.data[0].path, "--task", "TASK.yaml")
    job = asked.submit(settings, shlex.split(call_of("slurm pretrain", *words)), then)
    facts = {name: value for name, value in asdict(job).items() if value is not None}
    ended = DONE
    if args.follow:
        ended = tracking.follow(job.job, Path(job.log), job.cluster)
        facts |= {"status": ended, **tracking.progress(Path(job.run))}
    following = call_of("slurm status", job.run)
    if args.follow and ended == DONE:
        following = then
    elif ended == RESUME:
        following = f"look at {job.log}; the same command continues from the last complete checkpoint"
    summary(facts, following, args.json)
    return ended


def finetune(words: list[str]) -> int:
    """Submit a job for each split of the subjects. `slim-brain finetune` then tests the trained models."""
    parser = Parser(
        "slurm finetune",
        "Fine-tune with sbatch: one job for each split of the subjects, requeued until it is finished.",
        "runs/lean --data data/mylab --task TASK.yaml --nodes 1 --gpus-per-node 2",
    )
    add_finetuning(parser)
    _add_nodes(parser)
    args = parser.parse_args(words)
    cluster = _cluster(args)

    from launchers import finetuning
    from launchers.cluster import tracking
    from launchers.cluster.submission import Submission

    asked = Submission(args, cluster)
    method = finetuning.open_call(args, lambda settings: None)
    numbers = range(len(method.splits))
    runs = [asked.spread(method.settings(number)) for number in numbers]
    if args.dry_run:
        return asked.dry_run(runs[0])
    asked.check(runs)
    command = shlex.split(call_of("slurm finetune", *words))
    then = call_of("finetune", *words_of_finetuning(args))
    jobs = [asked.submit(asked.spread(method.prepare(number)), command, then) for number in numbers]
    facts: dict[str, object] = {name: [getattr(job, name) for job in jobs] for name in ("job", "run", "log")}
    facts["processes"] = jobs[0].processes
    ended, following = DONE, f"when the jobs have ended: {then}"
    if args.follow:
        ends = [tracking.follow(job.job, Path(job.log), job.cluster) for job in jobs]
        ended, facts["status"] = max(ends), ends
        following = then
        if ended != DONE:
            following = f"look at {jobs[ends.index(ended)].log}; the same command continues"
    summary(facts, following, args.json)
    return ended


def shards(words: list[str]) -> int:
    """Check the call, find the scans and submit the jobs; with --follow, show their progress."""
    parser = Parser(
        "slurm shards",
        "Convert cohorts into shards with an array of jobs, as make-shards does on one machine.",
        "mylab.yaml --out data/mylab --tasks 100 --throttle 20 --follow",
    )
    add_conversion(parser)
    parser.add_argument("--tasks", type=int, required=True, metavar="N", help="largest number of tasks in the array")
    parser.add_argument("--throttle", type=int, metavar="M", help="largest number of tasks at the same time")
    _add_cluster(parser, _FLAGS)
    args = parser.parse_args(words)
    cluster = _cluster(args)
    args.out = args.out.resolve()
    cohorts, settings = checked_conversion(args)

    from launchers.cluster import conversion_jobs
    from launchers.conversion import conversion_of

    conversion, given = conversion_of(args, cohorts, settings, cluster.cpus_per_task or 1)
    jobs = conversion_jobs.Chain(conversion, given, cluster, args.tasks, args.throttle)
    if args.dry_run:
        return jobs.dry_run()
    return jobs.convert(shlex.split(call_of("slurm shards", *words)), args.follow, args.json)


def _add_nodes(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the submission of a run."""
    parser.add_argument(
        "--nodes", required=True, metavar="N", help="number of nodes, or a range such as 2-4 for as many as are free"
    )
    per_node = parser.add_mutually_exclusive_group(required=True)
    per_node.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs per node, one process each")
    per_node.add_argument(
        "--tasks-per-node", type=int, metavar="T", help="processes per node, on a cluster without GPUs"
    )
    _add_cluster(parser, (*_FLAGS, "max_failures"))


def _add_cluster(parser: argparse.ArgumentParser, flags: Sequence[str]) -> None:
    """Add the arguments that all submissions have."""
    add = parser.add_argument
    add(
        "--slurm",
        metavar="SLURM",
        help=f"settings of the cluster, as {call_of('config show', 'slurm', 'example')} prints them",
    )
    for name in flags:
        kind = int if name in ("cpus_per_task", "max_failures") else str
        add(f"--{name.replace('_', '-')}", type=kind, help=SlurmSettings.model_fields[name].description)
    add("--dry-run", action="store_true", help="print the scripts and test them with sbatch, without submitting them")
    add("--follow", action="store_true", help="show the progress until the end, and exit with the status of the job")


def _cluster(args: argparse.Namespace) -> SlurmSettings:
    path = find("slurm", args.slurm, "--slurm") if args.slurm else None
    tree = read_yaml(path) if path else {}
    flags = [name for name in (*_FLAGS, "max_failures") if hasattr(args, name)]
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    for name, value in given.items():  # checked one by one, so that an error names the command line
        check(SlurmSettings, {name: value}, "command line")
    return check(SlurmSettings, tree | given, path or "command line")


def status(words: list[str]) -> int:
    """Show the state of the jobs of a run or dataset, and their progress."""
    args = _parsed("status", "Show the state of the jobs of a run or dataset, and their progress.", words)

    from launchers.cluster import conversion_jobs, tracking
    from launchers.cluster.submission import submitted_folder

    folder = submitted_folder(args.folder)
    about = tracking.about_job(folder)
    facts, following = conversion_jobs.status(folder) if about is None else tracking.status(folder, about)
    summary(facts, following, args.json)
    return DONE


def cancel(words: list[str]) -> int:
    """Cancel the jobs of a run or dataset."""
    args = _parsed("cancel", "Cancel the jobs of a run or dataset. Saved results are kept.", words)

    from launchers.cluster import conversion_jobs, conversion_task, noted, tracking
    from launchers.cluster.submission import submitted_folder

    folder = submitted_folder(args.folder)
    about = tracking.about_job(folder)
    if about is None:
        command = conversion_task.submitted(folder).command
        facts: dict[str, object] = {"dataset": str(folder), **conversion_jobs.cancel(folder)}
        following = "continues with the scans that remain"
    else:
        command, facts = about.command, tracking.cancel(folder, about)
        following = "continues from the last complete checkpoint"
    summary(facts, f"`{noted.call(command)}` {following}", args.json)
    return DONE


def _parsed(command: str, does: str, words: list[str]) -> argparse.Namespace:
    parser = Parser(f"slurm {command}", does, "runs/lean")
    parser.add_argument("folder", metavar="DATASET_OR_RUN")
    return parser.parse_args(words)
