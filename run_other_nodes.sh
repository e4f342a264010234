#!/usr/bin/env bash
# Joins the training that run_master_node.sh starts, for example on the third node of three:
#   NNODES=3 NODE_RANK=2 MASTER_ADDR=10.0.0.1 ./run_other_nodes.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export NNODES=${NNODES:-2} NODE_RANK=${NODE_RANK:-1}
export MASTER_ADDR=${MASTER_ADDR:-} # has to be given
export MASTER_PORT=${MASTER_PORT:-29500}
export NPROC_PER_NODE=${NPROC_PER_NODE:-8}
export CONFIG_FILE=${CONFIG_FILE:-$root/dinov2/configs/train/vitg14_reg4.yaml}
export OUTPUT_DIR=${OUTPUT_DIR:-$root/output_vitg14} # on a file system that all nodes share
export RESUME=${RESUME:-True} # as on the master node, which alone moves an earlier run aside

export DINOV2_RUN_SCRIPT=$root/run_other_nodes.sh # kept with the run
exec "$root/scripts/_launch.sh" "$@"
