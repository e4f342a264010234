#!/usr/bin/env bash
# The one place that builds the torchrun line. The run_*.sh scripts set the variables; arguments are
# section.key=value overrides and train.py's own flags.
#
#   CONFIG_FILE, OUTPUT_DIR    what is trained (a YAML file, or a recipe by its name) and where its results go
#   RESUME                     True goes on from OUTPUT_DIR; False moves an existing run aside first
#   NNODES, NODE_RANK          number of nodes and this one's number, 0 being the master
#   NPROC_PER_NODE             processes on this node, one per GPU
#   MASTER_ADDR, MASTER_PORT   where the nodes meet; without a port, a single node picks a free one
#   MAX_RESTARTS               how often all processes are started anew, from the newest checkpoint, where one was lost:
#                              3 on one node, else 0, since the nodes must know each other by their host names for it
#   DRY_LAUNCH=1               prints the command and changes nothing
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

die() { printf '%s: %s\n' "$(basename "${DINOV2_RUN_SCRIPT:-_launch.sh}")" "$*" >&2; exit 1; }
note() { printf '%s\n' "$*" >&2; }
# Prints the comments at the head of the script that was called, and of this one.
show_help() {
    local file script=${DINOV2_RUN_SCRIPT:-$root/scripts/_launch.sh}
    for file in "$script" "$root/scripts/_launch.sh"; do
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$file"
        echo
    done
    printf 'examples:\n'
    printf '  CONFIG_FILE=vits14_reg4 OUTPUT_DIR=output_vits14 %s data.path=/data/tiles\n' "$script"
    printf '  DRY_LAUNCH=1 %s\n' "$script"
}

# Names that others' launchers have for ours, and that would be without effect here.
warn_of_unread() {
    local pair given
    for pair in CONFIG:CONFIG_FILE CONFIG_PATH:CONFIG_FILE RECIPE:CONFIG_FILE OUTPUT:OUTPUT_DIR OUT_DIR:OUTPUT_DIR \
        OUTPUT_PATH:OUTPUT_DIR OUTPUT_FOLDER:OUTPUT_DIR NUM_GPUS:NPROC_PER_NODE NGPUS:NPROC_PER_NODE \
        N_GPUS:NPROC_PER_NODE GPUS:NPROC_PER_NODE GPUS_PER_NODE:NPROC_PER_NODE NPROC:NPROC_PER_NODE \
        NUM_NODES:NNODES N_NODES:NNODES NODES:NNODES MASTER:MASTER_ADDR MASTER_IP:MASTER_ADDR \
        RESTARTS:MAX_RESTARTS NO_RESUME:RESUME DRY_RUN:DRY_LAUNCH; do
        given=${pair%%:*}
        [[ -z ${!given:-} ]] || note "$given=${!given} is read by nothing here: the variable is ${pair#*:}."
    done
}

is_dry() { [[ ${DRY_LAUNCH:-} == 1 ]]; }

require_count() { [[ ${!1} =~ ^[0-9]+$ && ${!1} -ge $2 ]] || die "$1=${!1} is not a whole number of at least $2."; }

visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[0-9]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L | grep -c '^GPU ' || true
    else
        { compgen -G '/dev/nvidia[0-9]*' || true; } | wc -l
    fi
}

# More processes than GPUs would only fail later, inside NCCL; several on the CPU have to be asked for.
check_gpus() {
    local gpus asked_for_cpu=${CUDA_VISIBLE_DEVICES-unset}
    gpus=$(visible_gpus)
    if [[ -z $asked_for_cpu || ( $gpus -eq 0 && $NPROC_PER_NODE -eq 1 ) ]]; then
        note "No GPU is visible: training on the CPU."
    elif [[ $NPROC_PER_NODE -gt $gpus ]] && is_dry; then
        note "NPROC_PER_NODE=$NPROC_PER_NODE needs as many GPUs and $gpus are visible here."
    elif [[ $NPROC_PER_NODE -gt $gpus ]]; then
        die "NPROC_PER_NODE=$NPROC_PER_NODE needs as many GPUs and $gpus are visible: lower it," \
            "name more in CUDA_VISIBLE_DEVICES, or set that to '' to train on the CPU."
    fi
}

is_run_folder() { [[ -f $1/config.yaml && ( -d $1/checkpoints || -f $1/metrics.jsonl ) ]]; }

# Renames an earlier run so that a new one starts in its place; refuses to touch what is not a run.
move_run_aside() {
    local folder=$1 aside reason
    [[ -e $folder ]] || return 0
    [[ -d $folder ]] || die "OUTPUT_DIR=$folder is a file: name a folder."
    # A start that failed before its first step leaves no more than these.
    [[ -n $(find "$folder/" -mindepth 1 -maxdepth 1 ! -name config.yaml ! -name "stream_index*" ! -name slide_cache ! -name logs ! -name .lock) ]] || return 0
    is_run_folder "$folder" || die "OUTPUT_DIR=$folder is neither empty nor an earlier run: name another folder."
    aside=$folder.$(date +%Y%m%d-%H%M%S)
    [[ ! -e $aside ]] || die "$aside exists already: wait a second and start again."
    if is_dry; then
        note "Would move $folder to $aside"
    else
        reason=$("$python" "$root/scripts/_move_aside.py" "$folder" "$aside" 2>&1) || die "$reason"
        note "Moved the earlier run to $aside"
    fi
}

for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then show_help && exit; fi
done
warn_of_unread
[[ -x $python ]] || die "Path-FM is not installed: run $root/install.sh first."
for name in NNODES NPROC_PER_NODE; do require_count "$name" 1; done
MAX_RESTARTS=${MAX_RESTARTS:-$((NNODES == 1 ? 3 : 0))}
require_count NODE_RANK 0
require_count MAX_RESTARTS 0
[[ $NODE_RANK -lt $NNODES ]] || die "NODE_RANK=$NODE_RANK is not below NNODES=$NNODES."
# A relative name may also be one of the repository's own configurations.
[[ -f $CONFIG_FILE || ! -f $root/$CONFIG_FILE ]] || CONFIG_FILE=$root/$CONFIG_FILE
[[ -f $CONFIG_FILE ]] || die "CONFIG_FILE=$CONFIG_FILE does not exist."
[[ $NNODES -eq 1 || -n ${MASTER_ADDR:-} ]] || die "MASTER_ADDR is not set: give the master node's address."
OUTPUT_DIR=${OUTPUT_DIR%/}
[[ -n $OUTPUT_DIR ]] || die "OUTPUT_DIR is empty: name a folder."
check_gpus

# shellcheck disable=SC2153  # set by the script that hands over to this one
case $RESUME in
    True | true | 1) resume=() ;;
    False | false | 0)
        resume=(--no-resume)
        [[ $NODE_RANK -ne 0 ]] || move_run_aside "$OUTPUT_DIR"
        ;;
    *) die "RESUME=$RESUME is neither True nor False." ;;
esac

# One process needs no torchrun.
torchrun=()
if [[ $NNODES -gt 1 || $NPROC_PER_NODE -gt 1 ]]; then
    torchrun=("$root/scripts/_torchrun.py" --nnodes "$NNODES" --nproc_per_node "$NPROC_PER_NODE")
    torchrun+=(--max-restarts "$MAX_RESTARTS")
    if [[ $NNODES -eq 1 && -z ${MASTER_PORT:-} ]]; then
        torchrun+=(--standalone)
    elif [[ $MAX_RESTARTS -eq 0 ]]; then
        torchrun+=(--node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:-127.0.0.1}")
        torchrun+=(--master_port "${MASTER_PORT:-29500}")
    else
        # With a master address, processes that are started anew would meet in the store of those before them.
        torchrun+=(--rdzv-backend c10d --rdzv-id path-fm --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}")
    fi
fi
command=(
    "$python" "${torchrun[@]}" "$root/dinov2/train/train.py"
    --config-file "$CONFIG_FILE" --output-dir "$OUTPUT_DIR" "${resume[@]}" "$@"
)
PATHFM_STARTED=$(date +%s) # train.time_limit counts from here, also where torchrun starts processes anew
export PATHFM_STARTED PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1} # a crash in native code, the launcher's too, says where
if is_dry; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
