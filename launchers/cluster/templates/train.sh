# shellcheck shell=bash
# One attempt of a run. Reads CHECK (check.sh), SRUN (options of srun), NODE_TASKS, TASK_CPUS, MAX_FAILURES, and exit
# statuses: AGAIN, WRONG, RESUME.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$TASK_CPUS}
# Signals are for the processes of the run, which save and end; this shell goes on and judges.
trap : TERM USR1 USR2
on_all_nodes() { srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${SRUN[@]}" "$@"; }
on_one_node() { srun --nodelist="$SLURMD_NODENAME" --nodes=1 --ntasks=1 --ntasks-per-node=1 "${SRUN[@]}" "$@"; }

# When every node is found fit, the configuration follows the number of processes there are this time.
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * NODE_TASKS)) restart=${SLURM_RESTART_COUNT:-0}
export OUTCOME=$FOLDER/slurm/outcome-$SLURM_JOB_ID-$restart
on_all_nodes sh -c "$CHECK" && on_one_node "$PYTHON" -m launchers.cluster.attempt begin "$FOLDER"

case $? in
0)  # All meet at this node, the first of the job's.
    MASTER_ADDR=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR MASTER_PORT=$((10000 + (SLURM_JOB_ID * 10 + restart) % 20000))
    srun --ntasks="$WORLD_SIZE" --ntasks-per-node="$NODE_TASKS" --cpus-per-task="$TASK_CPUS" \
        --kill-on-bad-exit=1 --label --unbuffered "${SRUN[@]}" \
        "$PYTHON" -u -m launchers.cluster.attempt task "$FOLDER" ;;
"$WRONG")
    exit "$WRONG" ;;
esac

# Where a node is gone, or the job is over, srun may refuse: then judged from here.
judge() { "$@" "$PYTHON" -m launchers.cluster.attempt end "$FOLDER" "$MAX_FAILURES"; }
verdict=$(judge on_one_node) || verdict=$(judge)
state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
if [ "$verdict" = "$AGAIN" ]; then
    # One that was cancelled, or is past its time limit, stays so.
    [ "$state" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID" && exec sleep 600  # which SLURM ends
    verdict=$RESUME
fi
exit "${verdict:-$RESUME}"
