#!/usr/bin/env bash
# Makes .venv beside this file and installs Path-FM and all it needs into it. Safe to run again.
#
#   PYTHON=/path/to/python    Python to use, 3.11 or newer (default: the newest found)
#   PATHFM_EXTRAS=dev,slides  optional parts: dev, slides, s3, eval, export, onnx, hdf5, tensorboard, mlflow, xformers,
#                             docs
#   PATHFM_UNCONSTRAINED=1    newest versions within pyproject.toml's ranges instead of the tested ones
#   UV_TORCH_BACKEND=cu126    PyTorch build to take (default: auto, the one for this machine's driver)
#   PATHFM_ALLOW_CPU=1        accept that a GPU of this machine cannot be used
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$PWD
venv_python=$root/.venv/bin/python
stamp=$root/.venv/path-fm-installed
extras=${PATHFM_EXTRAS-dev,slides}
backend=${UV_TORCH_BACKEND:-auto}

say() { printf '%s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

is_recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_recent_python "$PYTHON" || die "PYTHON=$PYTHON is not a working Python 3.11 or newer."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3; do
        if is_recent_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "No Python 3.11 or newer on PATH: install one, or name it with PYTHON=/path/to/python ./install.sh."
}

# Whether this uv runs and knows how to choose a PyTorch build.
is_usable_uv() { [[ $("$1" pip install --help 2>/dev/null) == *--torch-backend* ]]; }

make_venv() {
    local python error
    if [[ -e .venv || -L .venv ]]; then
        [[ -f .venv/pyvenv.cfg ]] && is_recent_python "$venv_python" && return
        die "$root/.venv is not a working Python 3.11+ environment:" \
            "move it away (mv .venv .venv.old) and run ./install.sh again."
    fi
    python=$(find_python)
    say "Making .venv with $python"
    trap 'rm -rf "$root/.venv"' EXIT
    if ! error=$("$python" -m venv .venv 2>&1); then
        rm -rf .venv
        is_usable_uv uv || die "$python cannot make a virtual environment (on Debian and Ubuntu:" \
            "apt install python3-venv; elsewhere: install uv), so run ./install.sh again after that: $error"
        uv venv --quiet --python "$python" .venv
    fi
    trap - EXIT
}

# Sets uv to a usable one: the user's, else the one in .venv.
find_uv() {
    uv=uv
    is_usable_uv "$uv" && return
    uv=$root/.venv/bin/uv
    is_usable_uv "$uv" && return
    say "Installing uv into .venv"
    "$venv_python" -m pip install --quiet uv && is_usable_uv "$uv"
}

has_nvidia_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null || nvidia-smi -L >/dev/null 2>&1; }

# The versions to prefer: "tested" ones, tested ones with PyTorch "torch-free", or "any".
write_constraints() {
    case $1 in
        tested) cat constraints.txt ;;
        torch-free) grep -vE '^torch(vision)?==' constraints.txt ;;
        any) : ;;
    esac >"$scratch/constraints.txt"
}

# Prints the PyTorch release that uv finds under the constraints; the argument, if any, chooses the index.
resolve_torch() {
    local found patience=()
    [[ $# -eq 0 ]] || patience=(UV_HTTP_CONNECT_TIMEOUT=5 UV_HTTP_RETRIES=2)
    found=$(env "${patience[@]}" "$uv" pip compile --quiet --no-header --no-annotate "$@" --python "$venv_python" \
        --constraint "$scratch/constraints.txt" pyproject.toml 2>"$scratch/error") || return
    found=$(grep -E '^torch(vision)?==' <<<"$found")
    # For a release without a build for the driver, "auto" goes on to the CPU's build.
    if [[ $* == *auto* && $found != *+cu* ]] && has_nvidia_gpu; then return 1; fi
    printf '%s\n' "$found"
}

# Prefers the PyTorch build for this machine from PyTorch's own index, asked with little patience since many
# networks do not reach it. Returns 2 where nothing was tried because uv found no versions at all.
install_with_uv() {
    local index versions torch status=2
    for index in "--torch-backend=$backend" ""; do
        if [[ -z $index ]]; then
            say "Taking the default registry's PyTorch: its own index has no build for this machine or is out of reach."
        fi
        for versions in "${preferences[@]}"; do
            write_constraints "$versions"
            if ! torch=$(resolve_torch ${index:+"$index"}); then
                grep -q 'error sending request' "$scratch/error" && break
                continue
            fi
            printf '%s\n' "$torch" >>"$scratch/constraints.txt"
            say "Installing with ${torch//$'\n'/, } ($versions versions)"
            # Compiled once, here: where PYTHONDONTWRITEBYTECODE is set, every process would compile SymPy anew.
            "$uv" pip install --compile-bytecode --python "$venv_python" ${index:+"$index"} \
                --constraint "$scratch/constraints.txt" --editable ".[$extras]" && return
            status=1
            break
        done
    done
    return "$status"
}

# PyTorch's indexes whose CUDA the driver can run: any release of the driver's own major version.
torch_indexes() {
    local driver
    driver=$(nvidia-smi 2>/dev/null | grep -oE 'CUDA ([A-Z]+ )?Version: [0-9]+' | grep -oE '[0-9]+$') || driver=none
    case $driver in
        none) say cpu ;;
        12) say cu128 cu126 ;;
        *) say cu132 cu130 ;;
    esac
}

install_with_pip() {
    local versions arguments=() index option torch=""
    for index in $(torch_indexes); do
        arguments+=("${option:=--index-url}" "https://download.pytorch.org/whl/$index")
        option=--extra-index-url
    done
    for versions in "${preferences[@]}"; do
        write_constraints "$versions"
        if "$venv_python" -m pip install --retries 0 --timeout 10 "${arguments[@]}" \
            --constraint "$scratch/constraints.txt" torch torchvision; then
            torch=$("$venv_python" -m pip freeze | grep -E '^torch(vision)?==')
            preferences=("${preferences[@]/#tested/torch-free}")
            break
        fi
    done
    for versions in "${preferences[@]}"; do
        write_constraints "$versions"
        printf '%s\n' "$torch" >>"$scratch/constraints.txt"
        "$venv_python" -m pip install --constraint "$scratch/constraints.txt" --editable ".[$extras]" && return
    done
    return 1
}

install_all() {
    local status=0
    preferences=(tested torch-free any)
    [[ ${PATHFM_UNCONSTRAINED:-} != 1 ]] || preferences=(any)
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    if find_uv; then
        install_with_uv || status=$?
        [[ $status -ne 2 ]] || cat "$scratch/error" >&2
    else
        status=2
    fi
    if [[ $status -eq 2 ]]; then
        say "Going on with pip."
        status=0
        install_with_pip || status=$?
    fi
    [[ $status -eq 0 ]] || die "The installation failed as said above; ./install.sh goes on from here when run again."
}

# What an installation depends on; while it is unchanged there is nothing to do.
fingerprint() {
    cat /sys/module/nvidia/version 2>/dev/null || say "no driver"
    printf '%s\n' "$root" "$extras" "$backend" "${PATHFM_UNCONSTRAINED:-}"
    cksum pyproject.toml constraints.txt install.sh
}

make_venv
if [[ ! -f $stamp || $(<"$stamp") != "$(fingerprint)" ]]; then
    rm -f "$stamp"
    install_all
fi
"$venv_python" -m dinov2.utils.environment
fingerprint >"$stamp"
say "Path-FM is installed in $root/.venv"
