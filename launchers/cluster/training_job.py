"""The script of a run's job. SLURM runs it once for each attempt.

The processes of the run save and end when they get a signal. The shell then determines how they ended, and requeues the
job if needed.
"""

from __future__ import annotations

from pathlib import Path

from launchers.cluster.attempt import AGAIN
from launchers.cluster.scheduler import SlurmSettings
from launchers.cluster.script import JobFolders, Script, lines
from launchers.job import KEEP_FREED
from shards.core.cli import RESUME
from slim.checkpoints.run_folder import SLURM


class TrainingScript(Script):
    """The script of a run and its submission.

    Parameters
    ----------
    settings : SlurmSettings
    run : Path
        Absolute folder of the run.
    nodes : str
        A number, or a range such as `2-4`.
    tasks : int
        Processes per node.
    gpus : int
        GPUs per node, one per process; 0 for a cluster without GPUs.
    cpus : int
        CPUs per process.
    """

    def __init__(self, settings: SlurmSettings, run: Path, nodes: str, tasks: int, gpus: int, cpus: int):
        command = lines(
            "train.sh",
            settings,
            KEEP_FREED,
            NODE_TASKS=tasks,
            TASK_CPUS=cpus,
            MAX_FAILURES=settings.max_failures,
            AGAIN=AGAIN,
            RESUME=RESUME,
        )
        # With a number of tasks, SLURM would use the smallest number of nodes in a range, not as many as are free.
        share = {"cpus_per_task": cpus * tasks} if "-" in nodes else {"cpus_per_task": cpus, "ntasks_per_node": tasks}
        share |= {"gpus_per_node": gpus} if gpus else {}
        place = JobFolders(run, run / SLURM, "%j.log")
        super().__init__(settings, place, run.name, command, share, {"nodes": nodes})
