# shellcheck shell=bash
# One attempt of a run. Reads CHECK (check.sh), SRUN (options of srun), NODE_TASKS, TASK_CPUS, MAX_FAILURES, and exit
# statuses: AGAIN, WRONG, RESUME.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$TASK_CPUS}
# On a signal, the processes of the run save and end. This shell ignores it, to determine afterwards how they ended.
trap : TERM USR1 USR2
on_all_nodes() { srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${SRUN[@]}" "$@"; }
on_one_node() { srun --nodelist="$SLURMD_NODENAME" --nodes=1 --ntasks=1 --ntasks-per-node=1 "${SRUN[@]}" "$@"; }

# After a check of every node, write the configuration for the number of processes of this attempt.
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * NODE_TASKS)) restart=${SLURM_RESTART_COUNT:-0}
export OUTCOME=$FOLDER/slurm/outcome-$SLURM_JOB_ID-$restart
on_all_nodes sh -c "$CHECK" && on_one_node "$PYTHON" -m launchers.cluster.attempt begin "$FOLDER"

case $? in
0)  # All processes connect to this node, the first one of the job.
    MASTER_ADDR=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR MASTER_PORT=$((10000 + (SLURM_JOB_ID * 10 + restart) % 20000))
    srun --ntasks="$WORLD_SIZE" --ntasks-per-node="$NODE_TASKS" --cpus-per-task="$TASK_CPUS" \
        --kill-on-bad-exit=1 --label --unbuffered "${SRUN[@]}" \
        "$PYTHON" -u -m launchers.cluster.attempt task "$FOLDER" ;;
"$WRONG")
    exit "$WRONG" ;;
esac

# If a node is lost or the job has ended, srun may fail; then determine the outcome in this shell.
judge() { "$@" "$PYTHON" -m launchers.cluster.attempt end "$FOLDER" "$MAX_FAILURES"; }
verdict=$(judge on_one_node) || verdict=$(judge)
state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
if [ "$verdict" = "$AGAIN" ]; then
    # A job that was cancelled, or is past its time limit, is not requeued.
    [ "$state" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID" && exec sleep 600  # SLURM ends the sleep
    verdict=$RESUME
fi
exit "${verdict:-$RESUME}"
