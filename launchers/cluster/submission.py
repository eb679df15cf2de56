"""Submit the runs of a pretraining or fine-tuning to SLURM."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from launchers.cluster import conversion_task, tracking
from launchers.cluster.scheduler import SlurmSettings, check_cluster, nodes_of, require_slurm
from launchers.cluster.script import probe
from launchers.cluster.training_job import TrainingScript
from shards.core.cli import DONE
from shards.core.errors import ConfigError
from shards.core.files import write_atomically
from shards.core.passwords import hidden
from slim.checkpoints.run_folder import SLURM
from slim.config import TrainSettings

S = TypeVar("S", bound=TrainSettings)


@dataclass(frozen=True)
class Submitted:
    """A job of a run.

    Attributes
    ----------
    job : str
        Its number.
    cluster : str or None
        The cluster that took it, if it is not the default one.
    run, log : str
        Paths.
    processes : int
    """

    job: str
    cluster: str | None
    run: str
    processes: int
    log: str


class Submission:
    """The resources that a submission requests, and the submission.

    Parameters
    ----------
    args : argparse.Namespace
        Its `nodes`, `gpus_per_node` and `tasks_per_node`.
    cluster : SlurmSettings

    Raises
    ------
    ConfigError
        If a value is not valid.
    """

    def __init__(self, args: argparse.Namespace, cluster: SlurmSettings):
        self.fewest, self.nodes = nodes_of(args.nodes)
        self.gpus = args.gpus_per_node or 0
        self.tasks = args.tasks_per_node if args.gpus_per_node is None else self.gpus
        if self.tasks < 1:
            raise ConfigError("command line", "--gpus-per-node", self.tasks, "1 or more, or --tasks-per-node")
        self.cluster = cluster

    def spread(self, settings: S) -> S:
        """The settings of a run with this number of processes and an absolute path of its folder."""
        changes = {"out": str(Path(settings.run.out).resolve()), "processes": self.nodes * self.tasks}
        return settings.model_copy(update={"run": settings.run.model_copy(update=changes)})

    def script(self, settings: TrainSettings) -> TrainingScript:
        """The script of a run."""
        wanted = str(self.nodes) if self.fewest == self.nodes else f"{self.fewest}-{self.nodes}"
        cpus = self.cluster.cpus_per_task or settings.run.workers + 1
        return TrainingScript(self.cluster, Path(settings.run.out), wanted, self.tasks, self.gpus, cpus)

    def dry_run(self, settings: TrainSettings) -> int:
        """Print the script of a run, and the reply of `sbatch --test-only`. Nothing is written."""
        print(self.script(settings).text())
        if shutil.which("sbatch") is None:
            print("sbatch is not installed here, so the script was not tested on a cluster", file=sys.stderr)
            return DONE
        self._accept([settings])
        print(self.script(settings).test())
        return DONE

    def check(self, runs: Sequence[TrainSettings]) -> None:
        """Check that the cluster and its nodes can run the job, and that no earlier job of the run is unfinished."""
        self._accept(runs)
        out = Path(runs[0].run.out)
        self.script(runs[0]).test()
        probe(self.cluster, self.fewest, out)

    def _accept(self, runs: Sequence[TrainSettings]) -> None:
        require_slurm()
        check_cluster(self.cluster, self.nodes, self.gpus, Path(runs[0].run.out))
        for settings in runs:
            tracking.refuse_another(Path(settings.run.out))

    def submit(self, settings: TrainSettings, command: list[str], then: str) -> Submitted:
        """Make the folder of a run and submit its job; returns facts for the summary. `then` is the next command."""
        out = Path(settings.run.out)
        commit, steps = _prepare(settings)
        script = self.script(settings)
        number = script.submit()
        cluster = {} if script.cluster is None else {"cluster": script.cluster}
        log = out / SLURM / f"{number}.log"
        about = {
            "job": number,
            **cluster,
            "run": str(out),
            "log": str(log),
            "steps": steps,
            "commit": commit,
            "submitted": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": command,
            "then": then,
        }
        write_atomically(out / SLURM / tracking.JOB, hidden(json.dumps(about, indent=1)) + "\n")
        return Submitted(number, script.cluster, str(out), settings.run.processes, str(log))


def _prepare(settings: TrainSettings) -> tuple[str, int]:
    """Check the data and the model, and make the folder of the run; returns the commit and the number of steps."""
    # These import torch, which takes seconds. Errors in the call are reported before.
    from launchers.job import open_task
    from launchers.run_setup import git_commit, prepare_run

    steps = settings.run.steps_in_all(open_task(settings).stream.per_epoch, settings.run.processes)
    (prepare_run(settings).parent / SLURM).mkdir(exist_ok=True)
    return git_commit(), steps


def submitted_folder(given: str | Path) -> Path:
    """The absolute path of a run or dataset that was submitted.

    Raises
    ------
    ConfigError
        If it was not.
    ClusterError
        If SLURM is not available.
    """
    folder = Path(given).resolve()
    if (
        not (folder / SLURM / tracking.JOB).exists()
        and not (folder / conversion_task.PLACE / conversion_task.JOB).exists()
    ):
        expected = "a run or a dataset that was submitted to SLURM"
        raise ConfigError(folder / SLURM / tracking.JOB, "", "no such file", expected)
    require_slurm()
    return folder
