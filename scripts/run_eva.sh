#!/usr/bin/env bash
# Runs stock kaiko-eva on a teacher, task after task, on one GPU or on the CPU, and sums up in one table:
#
#   scripts/run_eva.sh CHECKPOINT OUTPUT [tasks...]        (all twelve if none is named)
#
# CHECKPOINT is a teacher's file, or the folder of a run, its eval or one of its exports: then the newest teacher of it.
#
#   DATA_ROOT            folder that has one folder per data set; docs/evaluation.md says which
#   POOLING              cls (default) or cls_mean: class token, or it and the mean patch token (older: EMBEDDING)
#   DOWNLOAD_DATA=true   lets eva fetch the data sets that it can fetch
#   KEEP_EMBEDDINGS=1    keeps the embeddings of tasks that succeeded
#   PATHFM_EVA_PYTHON    Python that has kaiko-eva (default: the one of .venv)
#   N_RUNS, MAX_STEPS, PATIENCE, BATCH_SIZE, ...  as docs/evaluation.md says; the same for all tasks
#
# A failing task does not stop the others. Started again with the same settings, it goes on with what is not done.
# Exit status: 0 all done; 1 a task failed, or one that was named has no data, or none has; 2 wrong arguments.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PATHFM_EVA_PYTHON:-$root/.venv/bin/python}
tasks=(bach bracs breakhis crc gleason mhist pcam pcam_10 consep monusac cam16_small panda_small)
settings=(POOLING EMBEDDING MODEL_NAME MODEL_EXTRA_KWARGS IN_FEATURES MAP_FEATURES OUT_INDICES RESIZE_DIM NORMALIZE_MEAN
    NORMALIZE_STD N_RUNS MAX_STEPS MAX_EPOCHS PATIENCE BATCH_SIZE LR_VALUE N_PATCHES CHECKPOINT_TYPE MONITOR_METRIC
    MONITOR_METRIC_MODE EVA_GLOBAL_SEED)

die() { printf 'run_eva.sh: %s\n' "$*" >&2; exit 2; }
note() { printf '%s\n' "$*" >&2; }

# The folder of a task's data in DATA_ROOT.
data_folder() {
    case $1 in
        gleason) echo arvaniti_gleason_patches ;;
        pcam | pcam_10) echo patch_camelyon ;;
        cam16_small) echo camelyon16 ;;
        panda_small) echo panda/prostate-cancer-grade-assessment ;;
        *) echo "$1" ;;
    esac
}

# The newest teacher of a run's folder, its eval or an export; nothing where there is none.
newest_teacher() {
    { compgen -G "$1/eval/training_[0-9]*/teacher_checkpoint.pth" ||
        compgen -G "$1/training_[0-9]*/teacher_checkpoint.pth" || compgen -G "$1/teacher_checkpoint.pth"; } |
        sort -V | tail -n 1
}

can_fetch() { [[ ${DOWNLOAD_DATA:-} == [Tt]rue && " bach breakhis crc monusac pcam pcam_10 " == *" $1 "* ]]; }

is_known() { [[ " ${tasks[*]} " == *" $1 "* ]]; }

is_done() { grep -q "^$1"$'\tdone\t' "$output/status.tsv" 2>/dev/null; }

record() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$output/status.tsv"; }

# What the results in OUTPUT depend on.
describe_settings() {
    local name
    stat -c 'checkpoint %n, %s bytes, of %y' "$CHECKPOINT_PATH"
    for name in "${settings[@]}"; do
        [[ -z ${!name:-} ]] || printf '%s=%s\n' "$name" "${!name}"
    done
}

# Runs one task, all that is its own in $output/$1; returns eva's exit status.
run_task() {
    local command=predict_fit embeddings status=0
    # Images pass the teacher anew in every step: nothing to predict before.
    case $1 in consep | monusac) command=fit ;; esac
    mkdir -p "$output/$1"
    rm -rf -- "$output/$1"/embeddings.*  # of an attempt that did not come to its end
    embeddings=$(mktemp -d "$output/$1/embeddings.XXXXXX")
    DATA_ROOT=$2 OUTPUT_ROOT=$output/$1/results EMBEDDINGS_ROOT=$embeddings \
        "$python" -m dinov2.eval.eva_cli "$command" --config "$root/eval_configs/$1.yaml" >"$output/$1/log.txt" 2>&1 ||
        status=$?
    if [[ $status -eq 0 && ${KEEP_EMBEDDINGS:-} != 1 ]]; then
        rm -rf -- "$embeddings"
    else
        rmdir -- "$embeddings" 2>/dev/null || true
    fi
    return "$status"
}

[[ $# -ge 2 ]] || die "CHECKPOINT and OUTPUT are expected: scripts/run_eva.sh CHECKPOINT OUTPUT [tasks...]"
checkpoint=$1
if [[ -d $1 ]]; then
    checkpoint=$(newest_teacher "$1") || die "CHECKPOINT=$1 is a folder without an exported teacher."
    note "The teacher is $checkpoint."
fi
[[ -f $checkpoint ]] || die "CHECKPOINT=$1 is not there: name a teacher's file, or the folder of a run."
[[ -n $2 ]] || die "OUTPUT is empty: name a folder."
[[ -n ${DATA_ROOT:-} ]] || die "DATA_ROOT is not set: name the folder that has one folder per data set."
[[ -d $DATA_ROOT ]] || die "DATA_ROOT=$DATA_ROOT is not a folder."
CHECKPOINT_PATH=$(realpath -- "$checkpoint")
output=$(realpath -m -- "$2")
data_root=$(realpath -- "$DATA_ROOT")
export CHECKPOINT_PATH TQDM_REFRESH_RATE=${TQDM_REFRESH_RATE:-50} PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
shift 2
named=("$@")
for task in "${named[@]}"; do is_known "$task" || die "There is no task $task: name some of ${tasks[*]}."; done
[[ ${#named[@]} -eq 0 ]] || tasks=("${named[@]}")

[[ ! -e $output || -d $output ]] || die "OUTPUT=$output is a file: name a folder."
if [[ -f $output/settings.txt ]]; then
    [[ $(<"$output/settings.txt") == "$(describe_settings)" ]] ||
        die "OUTPUT=$output has results of other settings, see its settings.txt: name another folder."
elif [[ -n $(ls -A "$output" 2>/dev/null) ]]; then
    die "OUTPUT=$output is neither empty nor of an earlier run_eva.sh: name another folder."
fi
[[ -x $python ]] || die "$python is not a Python: run $root/install.sh, or name one in PATHFM_EVA_PYTHON."
"$python" -m dinov2.eval.eva_cli check >/dev/null || exit 2
mkdir -p "$output"
describe_settings >"$output/settings.txt"

missing=0 failed=0 done=0
for task in "${tasks[@]}"; do
    data=$data_root/$(data_folder "$task")
    if is_done "$task"; then
        note "$task: done before, kept."
        done=$((done + 1))
    elif [[ ! -d $data ]] && ! can_fetch "$task"; then
        note "$task: no data, $data is not a folder."
        record "$task" "no data" 0
        missing=$((missing + 1))
    else
        note "$task: running, see $output/$task/log.txt"
        SECONDS=0
        if run_task "$task" "$data"; then
            record "$task" "done" "$SECONDS"
            done=$((done + 1))
        else
            record "$task" failed "$SECONDS"
            failed=$((failed + 1))
            note "$task: failed: $(grep -E '^[0-9:]+ E |[A-Za-z]+(Error|Exception|Interrupt)(: |$)|error:' "$output/$task/log.txt" | tail -n 1)"
        fi
    fi
done

"$python" -m dinov2.eval.eva_summary "$output"
[[ $failed -eq 0 && $done -gt 0 && ( ${#named[@]} -eq 0 || $missing -eq 0 ) ]]
