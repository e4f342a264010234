#!/usr/bin/env bash
# Runs the test suite, after setting up if needed; arguments go to pytest. Tests that need a GPU or the real
# slides (PATHFM_SLIDES_DIR) take part where those are there; slow ones and those on the network do not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./install.sh
left_out="not slow and not network"
[[ -n ${PATHFM_SLIDES_DIR:-} || ! -d ../shared/data ]] || export PATHFM_SLIDES_DIR=$PWD/../shared/data
[[ -n ${PATHFM_SLIDES_DIR:-} ]] || left_out+=" and not data"
nvidia-smi -L >/dev/null 2>&1 || left_out+=" and not gpu"

# One thread per worker: two workers that each take every core are slower than one.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "${PATHFM_TEST_WORKERS:-2}" --dist worksteal -m "$left_out" "$@"
