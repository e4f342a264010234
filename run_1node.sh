#!/usr/bin/env bash
# Trains ViT-g on one node with 8 GPUs. Each variable can be set from outside; arguments are section.key=value.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export NNODES=1 NODE_RANK=0
export NPROC_PER_NODE=${NPROC_PER_NODE:-8}
export CONFIG_FILE=${CONFIG_FILE:-$root/dinov2/configs/train/vitg14_reg4.yaml}
export OUTPUT_DIR=${OUTPUT_DIR:-$root/output_vitg14}
export RESUME=${RESUME:-True} # False moves an earlier run in OUTPUT_DIR aside and starts anew

export DINOV2_RUN_SCRIPT=$root/run_1node.sh # kept with the run
exec "$root/scripts/_launch.sh" "$@"
