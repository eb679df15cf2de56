# shellcheck shell=bash
# One job of a conversion. Reads CHECK (check.sh), SRUN (options of srun), TASK_CPUS, STAGE, OUTCOMES (a folder) and
# WRONG (exit status of a call that is wrong).
export OMP_NUM_THREADS=1
outcome=$FOLDER/$OUTCOMES/${SLURM_ARRAY_TASK_ID:-$STAGE}.json
"$PYTHON" -m launchers.cluster.is_done "$outcome" 2>/dev/null && exit 0  # done by the first of two tries
srun --nodes=1 --ntasks=1 --cpus-per-task="$TASK_CPUS" "${SRUN[@]}" sh -c "$CHECK" sh \
    "$PYTHON" -u -m launchers.cluster.conversion_task "$STAGE" "$FOLDER" \
    ${SLURM_ARRAY_TASK_ID:+"$SLURM_ARRAY_TASK_ID"}
status=$?
if [ $status -ne "$WRONG" ] && ! [ -e "$outcome" ]; then
    killed=
    [ $status -ne 137 ] || killed=' (SIGKILL: was the machine out of memory?)'
    echo "error: $SLURMD_NODENAME: ended with status $status$killed"
fi
exit $status
