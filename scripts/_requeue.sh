#!/usr/bin/env bash
# Runs a command in a Slurm job, passes signals on to it, and queues the job again where it ends with status 75: stopped
# before its end, with a checkpoint saved.
set -euo pipefail

"$@" &
child=$!
for signal in USR1 TERM; do
    # shellcheck disable=SC2064  # the signal of this turn
    trap "kill -$signal $child 2>/dev/null || true" "$signal"
done
status=0
wait "$child" || status=$?
# A signal ends `wait`, not the command.
while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
done
[[ $status -ne 75 ]] || { scontrol requeue "$SLURM_JOB_ID" && status=0; }
exit "$status"
