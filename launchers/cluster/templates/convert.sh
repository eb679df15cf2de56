# shellcheck shell=bash
# One job of a conversion. Reads CHECK (check.sh), SRUN (options of srun), TASK_CPUS, STAGE, OUTCOMES (a folder) and
# WRONG (exit status for a mistake of the user).
export OMP_NUM_THREADS=1
outcome=$FOLDER/$OUTCOMES/${SLURM_ARRAY_TASK_ID:-$STAGE}.json
"$PYTHON" -m launchers.cluster.is_done "$outcome" 2>/dev/null && exit 0  # the first try has finished the work
srun --nodes=1 --ntasks=1 --cpus-per-task="$TASK_CPUS" "${SRUN[@]}" sh -c "$CHECK" sh \
    "$PYTHON" -u -m launchers.cluster.conversion_task "$STAGE" "$FOLDER" \
    ${SLURM_ARRAY_TASK_ID:+"$SLURM_ARRAY_TASK_ID"}
status=$?
if [ $status -ne "$WRONG" ] && ! [ -e "$outcome" ]; then
    killed=
    [ $status -ne 137 ] || killed=' (SIGKILL, perhaps because the node ran out of memory)'
    echo "error: $SLURMD_NODENAME: ended with status $status$killed"
fi
exit $status
