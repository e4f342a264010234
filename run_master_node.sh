#!/usr/bin/env bash
# Trains ViT-g on several nodes: run this on the first one and run_other_nodes.sh on the others, with the
# same NNODES, MASTER_PORT, CONFIG_FILE and OUTPUT_DIR. Arguments are section.key=value.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export NNODES=${NNODES:-2} NODE_RANK=0
export MASTER_ADDR=${MASTER_ADDR:-$(hostname -I | cut -d ' ' -f 1)} # the other nodes must reach it
export MASTER_PORT=${MASTER_PORT:-29500}
export NPROC_PER_NODE=${NPROC_PER_NODE:-8}
export CONFIG_FILE=${CONFIG_FILE:-$root/dinov2/configs/train/vitg14_reg4.yaml}
export OUTPUT_DIR=${OUTPUT_DIR:-$root/output_vitg14} # on a file system that all nodes share
export RESUME=${RESUME:-True} # False moves an earlier run in OUTPUT_DIR aside and starts anew

export DINOV2_RUN_SCRIPT=$root/run_master_node.sh # kept with the run
exec "$root/scripts/_launch.sh" "$@"
