"""The script of a run: one attempt of its job.

SLURM starts it again each time the job is requeued. The processes of the run save and end when they get a signal; the
shell stays, asks what has become of them, and requeues the job as its last act.
"""

from __future__ import annotations

from pathlib import Path

from launchers.cluster.attempt import AGAIN
from launchers.cluster.scheduler import SlurmSettings
from launchers.cluster.script import CHECK, Script, arguments
from launchers.job import KEEP_FREED
from shards.core.cli import RESUME, WRONG
from slim.checkpoints.run_folder import SLURM

_COMMAND = r"""
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus}}} {memory}
# Signals are for the processes of the run, which save and end; this shell goes on and judges.
trap : TERM USR1 USR2
on_all_nodes() {{ srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1{arguments} "$@"; }}
on_one_node() {{ srun --nodelist="$SLURMD_NODENAME" --nodes=1 --ntasks=1 --ntasks-per-node=1{arguments} "$@"; }}

# When every node is found fit, the configuration follows the number of processes there are this time.
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * {tasks})) restart=${{SLURM_RESTART_COUNT:-0}}
export OUTCOME=$FOLDER/slurm/outcome-$SLURM_JOB_ID-$restart
on_all_nodes sh -c '{check}' && on_one_node "$PYTHON" -m launchers.cluster.attempt begin "$FOLDER"

case $? in
0)  # All meet at this node, the first of the job's.
    MASTER_ADDR=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR MASTER_PORT=$((10000 + (SLURM_JOB_ID * 10 + restart) % 20000))
    srun --ntasks=$WORLD_SIZE --ntasks-per-node={tasks} --cpus-per-task={cpus} \
        --kill-on-bad-exit=1 --label --unbuffered{arguments} "$PYTHON" -u -m launchers.cluster.attempt task "$FOLDER" ;;
{wrong})
    exit {wrong} ;;
esac

# Where a node is gone, or the job is over, srun may refuse: then judged from here.
judge() {{ "$@" "$PYTHON" -m launchers.cluster.attempt end "$FOLDER" {max_failures}; }}
verdict=$(judge on_one_node) || verdict=$(judge)
state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
if [ "$verdict" = {again} ]; then
    # One that was cancelled, or is past its time limit, stays so.
    [ "$state" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID" && exec sleep 600  # which SLURM ends
    verdict={resume}
fi
exit "${{verdict:-{resume}}}"
"""


class Batch(Script):
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
        GPUs per node, one per process; 0 for a cluster without.
    cpus : int
        CPUs per process.
    """

    def __init__(self, settings: SlurmSettings, run: Path, nodes: str, tasks: int, gpus: int, cpus: int):
        command = _COMMAND.format(
            arguments=arguments(settings),
            check=CHECK,
            memory=" ".join(f"{name}={value}" for name, value in KEEP_FREED.items()),
            tasks=tasks,
            cpus=cpus,
            max_failures=settings.max_failures,
            again=AGAIN,
            wrong=WRONG,
            resume=RESUME,
        )
        # With a number of tasks SLURM would take the fewest nodes of a range, not as many as are free.
        share = {"cpus_per_task": cpus * tasks} if "-" in nodes else {"cpus_per_task": cpus, "ntasks_per_node": tasks}
        share |= {"gpus_per_node": gpus} if gpus else {}
        super().__init__(settings, run / SLURM, run.name, command, run, "%j.log", share, {"nodes": nodes})
