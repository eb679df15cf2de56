"""Convert and pretrain on a cluster with SLURM, over as many nodes as you like.

    python launchers/slurm.py shards COHORT.yaml [COHORT.yaml ...] --out DATASET --tasks N [key=value ...]
    python launchers/slurm.py pretrain CONFIG.yaml --nodes N --gpus-per-node G [key=value ...]
    python launchers/slurm.py status DATASET_OR_RUN
    python launchers/slurm.py cancel DATASET_OR_RUN

A run comes back by itself: before its time limit and when it is preempted it saves and is requeued, a lost process
or node leads to another attempt from the last complete checkpoint, with other nodes or fewer if need be. A conversion
is an array of tasks; what fails is tried a second time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from launchers import attempt, chain, part
from launchers.batch import SLURM, Batch
from launchers.cluster import (
    SlurmSettings,
    ask,
    check_cluster,
    is_over,
    job_facts,
    last_error,
    nodes_of,
    require_slurm,
)
from launchers.script import probe
from shards.console import DONE, RESUME, WRONG, Parser, run, summary
from shards.errors import ConfigError
from shards.layout import write_atomically
from shards.reader import Dataset
from shards.settings import check, read_yaml
from slim.config import PretrainSettings, load_config

JOB = "job.json"  # in RUN/slurm: the job that was submitted last
_FLAGS = ("partition", "account", "qos", "time", "mem", "constraint", "cpus_per_task", "python")
_POLL = 1.0  # seconds between questions to the controller
_SURE = 3  # times in a row that a job must look ended: a lost node is requeued a moment later


def main() -> int:
    words = sys.argv[1:]
    commands = {"shards": shards, "pretrain": pretrain, "status": status, "cancel": cancel}
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    parser = Parser(__doc__.strip(), _EXAMPLE)
    parser.add_argument("command", choices=list(commands), help="COMMAND --help says more")
    parser.parse_args(words)
    return WRONG


_EXAMPLE = "python launchers/slurm.py pretrain configs/pretrain/lean.yaml data=DATASET --nodes 4 --gpus-per-node 8"


def pretrain(words: list[str]) -> int:
    """Check, write the script, submit it; follow it if asked to."""
    parser = Parser("Pretrain through sbatch: one process per GPU, as often requeued as it takes.", _EXAMPLE)
    parser.prog += " pretrain"
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml")
    add("overrides", nargs="*", metavar="key=value")
    add("--nodes", required=True, metavar="N", help="a number, or a range such as 2-4: as many as are free")
    per_node = parser.add_mutually_exclusive_group(required=True)
    per_node.add_argument("--gpus-per-node", type=int, metavar="G", help="one process per GPU")
    per_node.add_argument(
        "--tasks-per-node", type=int, metavar="T", help="processes per node of a cluster without GPUs"
    )
    _add_cluster(parser, (*_FLAGS, "max_failures"))
    args = parser.parse_args(words)
    fewest, nodes = nodes_of(args.nodes)
    gpus = args.gpus_per_node or 0
    tasks = args.tasks_per_node if args.gpus_per_node is None else gpus
    if tasks < 1:
        raise ConfigError("command line", "--gpus-per-node", tasks, "1 or more, or --tasks-per-node")
    cluster = _cluster(args)
    settings = load_config(args.config, args.overrides)
    out = Path(settings.run.out).resolve()
    changes = {"out": str(out), "processes": nodes * tasks}
    settings = settings.model_copy(update={"run": settings.run.model_copy(update=changes)})
    wanted = str(nodes) if fewest == nodes else f"{fewest}-{nodes}"
    script = Batch(cluster, out, wanted, tasks, gpus, cluster.cpus_per_task or settings.run.workers + 1)
    if args.dry_run:
        print(script.text())
        if shutil.which("sbatch") is None:
            print("sbatch is not on this machine: no cluster has seen this script", file=sys.stderr)
            return DONE
    require_slurm()
    check_cluster(cluster, nodes, gpus, out)
    _refuse_another(out)
    accepted = script.test()
    if args.dry_run:
        print(accepted)
        return DONE
    probe(cluster, fewest, out)
    commit, steps = _prepare(settings)
    number = script.submit()
    log = out / SLURM / f"{number}.log"
    about = {
        "job": number,
        "run": str(out),
        "log": str(log),
        "steps": steps,
        "commit": commit,
        "submitted": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["launchers/slurm.py", "pretrain", *words],
    }
    write_atomically(out / SLURM / JOB, json.dumps(about, indent=1) + "\n")
    facts: dict[str, Any] = {"job": number, "run": str(out), "processes": settings.run.processes, "log": str(log)}
    ended = DONE
    if args.follow:
        print(f"job {number}: its log follows; Ctrl-C leaves it running", flush=True)
        ended = follow(number, log)
        facts |= {"status": ended, **_progress(out)}
    following = f"python launchers/slurm.py status {out}"
    if args.follow and ended == DONE:
        following = f"python tools/probe.py {out} --data {settings.data[0].path} --task TASK.yaml"
    elif ended == RESUME:
        following = f"look at {log}; the same command goes on from the last complete checkpoint"
    summary(facts, following, args.json)
    return ended


def shards(words: list[str]) -> int:
    """Check, find the runs, submit the jobs; follow them if asked to."""
    parser = Parser(
        "Convert cohorts into shards, as tools/make_shards.py does, in an array of jobs.",
        "python launchers/slurm.py shards mylab.yaml --out data/mylab --tasks 100 --throttle 20 --follow",
    )
    parser.prog += " shards"
    from launchers.conversion import add_arguments, conversion_of  # which imports torch

    add_arguments(parser)
    parser.add_argument("--tasks", type=int, required=True, metavar="N", help="tasks of the array, at most")
    parser.add_argument("--throttle", type=int, metavar="M", help="tasks that run at the same time, at most")
    _add_cluster(parser, _FLAGS)
    args = parser.parse_args(words)
    cluster = _cluster(args)
    args.out = args.out.resolve()
    conversion, given = conversion_of(args, cluster.cpus_per_task or 1)
    jobs = chain.Chain(conversion, given, cluster, args.tasks, args.throttle)
    if args.dry_run:
        return jobs.dry_run()
    return jobs.convert(["launchers/slurm.py", "shards", *words], args.follow, args.json)


def _add_cluster(parser: argparse.ArgumentParser, flags: Sequence[str]) -> None:
    """What every submission is called with."""
    add = parser.add_argument
    add(
        "--slurm",
        metavar="SLURM.yaml",
        help="settings of the cluster, see configs/slurm/example.yaml; flags override it",
    )
    for name in flags:
        kind = int if name in ("cpus_per_task", "max_failures") else str
        add(f"--{name.replace('_', '-')}", type=kind, help=SlurmSettings.model_fields[name].description)
    add("--dry-run", action="store_true", help="print what would be submitted, and what the cluster says to it")
    add("--follow", action="store_true", help="show how far it is until it has ended, and exit with its status")


def _cluster(args: argparse.Namespace) -> SlurmSettings:
    tree = read_yaml(args.slurm) if args.slurm else {}
    flags = [name for name in (*_FLAGS, "max_failures") if hasattr(args, name)]
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    for name, value in given.items():  # told by their flags, where these are at fault
        check(SlurmSettings, {name: value}, "command line")
    return check(SlurmSettings, tree | given, args.slurm or "command line")


def _prepare(settings: PretrainSettings) -> tuple[str, int]:
    """Make the folder of the run, when its data and model have been looked at; the commit, and steps to the end."""
    # These import torch, which takes seconds: all that can be wrong with the call is told before, and without.
    from launchers.local import git_commit, prepare_run
    from shards.stream import Stream
    from slim.batch import geometry_for

    run, datasets = settings.run, [Dataset(item.path) for item in settings.data]
    geometry_for(settings, datasets)
    stream = Stream(datasets, [item.weight for item in settings.data], "train", run.seed)
    (prepare_run(settings).parent / SLURM).mkdir(exist_ok=True)
    return git_commit(), run.steps_in_all(stream.per_epoch, run.processes)


def _refuse_another(out: Path) -> None:
    """A run is trained by one job at a time."""
    about = _about(out)
    if about is not None and not is_over(job_facts(about["job"])):
        raise ConfigError(
            out,
            "run.out",
            f"a run whose job {about['job']} has not ended",
            "a run that no job works on",
            f"Wait for it, or call: python launchers/slurm.py cancel {out}",
        )


def follow(number: str, log: Path) -> int:
    """Print a job's log as it grows, until the job has ended; its exit status (0, 2 or 3)."""
    at, said, ended = 0, "", 0
    facts: dict[str, str] | None = None
    try:
        while ended < _SURE:
            facts = job_facts(number)
            ended = ended + 1 if is_over(facts) else 0
            at = _print_from(log, at)
            state = "forgotten" if facts is None else facts["JobState"]
            reason = "" if facts is None or facts.get("Reason", "None") == "None" else f" ({facts['Reason']})"
            if state + reason != said:
                said = state + reason
                print(f"job {number}: {said.lower() if not ended else said}", file=sys.stderr, flush=True)
            time.sleep(_POLL)
    except KeyboardInterrupt:
        print(f"job {number} goes on", file=sys.stderr)
        return DONE
    _print_from(log, at)
    return _status(number, log, facts)


def _print_from(log: Path, at: int) -> int:
    """Print what a file has grown by."""
    if not log.exists():
        return at
    with open(log, "rb") as file:
        file.seek(at)
        new = file.read()
    sys.stderr.write(new.decode(errors="replace"))
    sys.stderr.flush()
    return at + len(new)


def _status(number: str, log: Path, facts: dict[str, str] | None) -> int:
    """Exit status of a job that has ended: its own account, else SLURM's."""
    own = [line for line in attempt.attempts(log.parent.parent, number) if line["event"] == "ended"]
    if facts is not None and facts["JobState"] == "COMPLETED":
        return DONE
    if own and not own[-1]["again"]:
        return int(own[-1]["status"])
    return WRONG if facts is not None and facts.get("ExitCode", "").startswith(f"{WRONG}:") else RESUME


def _about(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads((out / SLURM / JOB).read_text())
    except FileNotFoundError:
        return None


def _progress(out: Path) -> dict[str, Any]:
    """How far a run is."""
    about = _about(out)
    try:
        line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        line = {}
    found = {"step": line.get("step", 0), "steps": None if about is None else about["steps"], "loss": line.get("loss")}
    return {**found, "checkpoint": attempt.newest_checkpoint(out)}


def _folder_of(words: list[str], command: str, does: str) -> tuple[argparse.Namespace, Path]:
    parser = Parser(does, f"python launchers/slurm.py {command} runs/lean")
    parser.prog += f" {command}"
    parser.add_argument("folder", metavar="DATASET_OR_RUN")
    args = parser.parse_args(words)
    folder = Path(args.folder).resolve()
    if not (folder / SLURM / JOB).exists() and not (folder / part.PLACE / part.JOB).exists():
        expected = "a run or a dataset that was submitted with launchers/slurm.py"
        raise ConfigError(folder / SLURM / JOB, "", "no such file", expected)
    require_slurm()
    return args, folder


def status(words: list[str]) -> int:
    """Say what the jobs of a run or of a dataset are doing and how far it is."""
    args, folder = _folder_of(words, "status", "What the jobs of a run or of a dataset are doing, and how far it is.")
    about = _about(folder)
    facts, following = chain.status(folder) if about is None else _status_of_run(folder, about)
    summary(facts, following, args.json)
    return DONE


def _status_of_run(out: Path, about: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the job of a run is doing and how far it is; what to do next."""
    number, log = about["job"], Path(about["log"])
    facts = job_facts(number)
    own = attempt.attempts(out, number)
    ended = [line for line in own if line["event"] == "ended"]
    found: dict[str, Any] = {
        "run": str(out),
        "job": number,
        "state": "forgotten" if facts is None else facts["JobState"],
    }
    if facts is not None:
        found |= {
            name.lower(): facts[name] for name in ("Reason", "NodeList", "StartTime", "Restarts") if name in facts
        }
    found |= _progress(out)
    found |= {
        "attempts": sum(line["event"] == "began" for line in own),
        "failures": sum(line["failed"] for line in ended),
        "last_end": ended[-1]["why"] if ended else None,
        "log": str(log),
    }
    following = f"tail -f {log}"
    if is_over(facts):
        code = _status(number, log, facts)
        if code == DONE:
            following = f"python tools/probe.py {out} --data DATASET --task TASK.yaml"
        else:
            wrong = last_error(log.read_text(errors="replace").splitlines()) if log.exists() else ""
            found["error"] = wrong or found["last_end"] or "the job ended without a word"
            following = f"look at {log}; `{' '.join(['python', *about['command']])}` goes on"
    return {name: value for name, value in found.items() if value is not None}, following


def cancel(words: list[str]) -> int:
    """Cancel the jobs of a run or of a dataset."""
    args, folder = _folder_of(words, "cancel", "Cancel the jobs of a run or of a dataset. What it has saved stays.")
    about = _about(folder)
    if about is None:
        command, facts = part.submitted(folder)["command"], {"dataset": str(folder), **chain.cancel(folder)}
        following = "goes on with the runs that are left"
    else:
        command, facts = about["command"], _cancel_run(folder, about)
        following = "goes on from the last complete checkpoint"
    summary(facts, f"`{' '.join(['python', *command])}` {following}", args.json)
    return DONE


def _cancel_run(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    number = about["job"]
    was = job_facts(number)
    if not is_over(was):
        ask("scancel", number)
        while not is_over(job_facts(number)):
            time.sleep(_POLL / 4)
    state = "CANCELLED" if not is_over(was) else "had ended"
    facts = {"run": str(out), "job": number, "state": state, **_progress(out)}
    return {name: value for name, value in facts.items() if value is not None}


if __name__ == "__main__":
    run(main)
