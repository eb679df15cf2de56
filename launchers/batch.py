"""The script that `sbatch` is given, written with submitit: one attempt of a run.

SLURM starts it again each time the job is requeued. The processes of the run save and end when they get a signal; the
shell stays, asks what has become of them, and requeues the job as its last act.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError

import launchers
from launchers.attempt import AGAIN
from launchers.cluster import ClusterError, SlurmSettings, ask
from launchers.job import KEEP_FREED
from shards.console import RESUME, WRONG

SLURM = "slurm"  # folder of a run

_COMMAND = r"""
export RUN={run} PYTHON={python} PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus}}} {memory}
# Signals are for the processes of the run, which save and end; this shell goes on and judges.
trap : TERM USR1 USR2
on_all_nodes() {{ srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1{arguments} "$@"; }}
on_one_node() {{ srun --nodelist="$SLURMD_NODENAME" --nodes=1 --ntasks=1 --ntasks-per-node=1{arguments} "$@"; }}

# Does every node see the folder of the run, and Python with this software?
# Then the configuration follows the number of processes there are this time.
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * {tasks})) restart=${{SLURM_RESTART_COUNT:-0}}
export OUTCOME=$RUN/slurm/outcome-$SLURM_JOB_ID-$restart
on_all_nodes sh -c '
    refuse() {{ echo "error: $(hostname): $1"; exit {wrong}; }}
    test -d "$RUN" || refuse "$RUN: got no such folder, expected one that every node sees. Use a shared one for run.out"
    command -v "$PYTHON" >/dev/null || refuse "$PYTHON: got no such command, expected Python. Set python or setup"
    "$PYTHON" -c "import launchers" || refuse "$PYTHON: got no package launchers, expected this software in {root}"
' && on_one_node "$PYTHON" -m launchers.attempt begin "$RUN"

case $? in
0)  # All meet at this node, the first of the job's.
    MASTER_ADDR=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR MASTER_PORT=$((10000 + (SLURM_JOB_ID * 10 + restart) % 20000))
    srun --ntasks=$WORLD_SIZE --ntasks-per-node={tasks} --cpus-per-task={cpus} \
        --kill-on-bad-exit=1 --label --unbuffered{arguments} "$PYTHON" -u -m launchers.attempt task "$RUN" ;;
{wrong})
    exit {wrong} ;;
esac

# Where a node is gone, or the job is over, srun may refuse: then judged from here.
judge() {{ "$@" "$PYTHON" -m launchers.attempt end "$RUN" {max_failures}; }}
verdict=$(judge on_one_node) || verdict=$(judge)
state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
if [ "$verdict" = {again} ]; then
    # One that was cancelled, or is past its time limit, stays so.
    [ "$state" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID" && exec sleep 600  # which SLURM ends
    verdict={resume}
fi
exit ${{verdict:-{resume}}}
"""


class _Writer(SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 2  # a script can be written on any machine


class Batch:
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
        self.folder = run / SLURM
        self._executor = _Writer(self.folder)
        # With a number of tasks SLURM would take the fewest nodes of a range, not as many as are free.
        share = {"cpus_per_task": cpus * tasks} if "-" in nodes else {"cpus_per_task": cpus, "ntasks_per_node": tasks}
        self._executor.update_parameters(
            **share,
            job_name=run.name,
            partition=settings.partition,
            account=settings.account,
            qos=settings.qos,
            time=settings.time,
            constraint=settings.constraint,
            gpus_per_node=gpus or None,
            signal_delay_s=settings.signal,
            setup=[*(f"module load {shlex.quote(name)}" for name in settings.modules), *settings.setup],
            stderr_to_stdout=True,
            use_srun=False,
            wckey=None,
            additional_parameters={
                "nodes": nodes,
                "chdir": str(Path.cwd()),
                "output": str(self.folder / "%j.log"),
                "requeue": True,
                **({} if settings.mem is None else {"mem": settings.mem}),
                **settings.sbatch,
            },
        )
        self._command = _COMMAND.format(
            run=shlex.quote(str(run)),
            python=shlex.quote(settings.python or sys.executable),
            root=shlex.quote(str(Path(launchers.__file__).parent.parent)),
            arguments="".join(f" {shlex.quote(word)}" for word in settings.srun),
            memory=" ".join(f"{name}={value}" for name, value in KEEP_FREED.items()),
            tasks=tasks,
            cpus=cpus,
            max_failures=settings.max_failures,
            again=AGAIN,
            wrong=WRONG,
            resume=RESUME,
        )

    def text(self) -> str:
        """The script."""
        return self._executor._make_submission_file_text(self._command, "")

    def test(self) -> str:
        """What the cluster says to the script, without a submission: when and where it would start.

        Raises
        ------
        ClusterError
            If it refuses.
        """
        return ask("sbatch", "--test-only", stdin=self.text())

    def submit(self) -> str:
        """Submit it; the job's number. The script is kept as RUN/slurm/JOB_submission.sh."""
        try:
            return self._executor._submit_command(self._command).job_id
        except FailedJobError as error:
            reason = " ".join(str(error).split())
            raise ClusterError("sbatch", "", reason, "a job that the cluster accepts") from None
