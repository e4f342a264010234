#!/usr/bin/env bash
# Runs a command in a Slurm job, passes signals on to it, and queues the job again where it ends with status 75: stopped
# before its end, with a checkpoint saved; or 76: processes were lost. Not after less than ten minutes: what hangs at its
# start would go on for ever.
set -euo pipefail

child="" asked=""
pass_on() {
    asked=$1
    [[ -z $child ]] || kill "-$1" "$child" 2>/dev/null || true
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
"$@" &
child=$!
[[ -z $asked ]] || pass_on "$asked" # while it was started
status=0
wait "$child" || status=$?
# A signal ends `wait`, not the command.
while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
done
if [[ ( $status -eq 75 || $status -eq 76 ) && $SECONDS -ge 600 ]]; then
    scontrol requeue "$SLURM_JOB_ID" && status=0
fi
exit "$status"
