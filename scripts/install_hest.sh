#!/usr/bin/env bash
# Makes an environment of its own for HEST (github.com/mahmoodlab/HEST) at the commit that HEST_evaluation.py is for.
# On PyPI, "hest" is another project. Safe to run again.
#
#   scripts/install_hest.sh [SOURCE]    SOURCE: checkout or archive of that commit, for machines without GitHub
#
#   HEST_VENV                where (default: .venv-hest beside the scripts folder); 7 GB
#   PYTHON                   Python to use, 3.11 or newer (default: that of .venv)
#   HEST_UNCONSTRAINED=1     newest versions instead of the tested ones of hest_constraints.txt
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$scripts")
commit=afd42c3143092c51e6bcc0f1df65bbf58a467e5e
venv=${HEST_VENV:-$root/.venv-hest}
base=${PYTHON:-$root/.venv/bin/python}

die() { printf 'install_hest.sh: %s\n' "$*" >&2; exit 1; }

# The user's uv, or the one that install.sh uses.
find_uv() {
    local candidate
    for candidate in uv "$root/.venv/bin/uv"; do
        if "$candidate" --version >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return
        fi
    done
    die "uv is not found: run $root/install.sh first, or install uv."
}

[[ $# -le 1 ]] || die "At most one argument is expected: a checkout or archive of HEST."
if [[ $# -eq 1 ]]; then
    [[ -e $1 ]] || die "SOURCE=$1 does not exist: name a checkout or an archive of HEST."
    [[ -f $1 || -f $1/pyproject.toml ]] || die "SOURCE=$1 has no pyproject.toml: name the top folder of HEST."
    source="hest @ file://$(realpath -- "$1")"
else
    source="hest @ git+https://github.com/mahmoodlab/HEST.git@$commit"
fi
uv=$(find_uv)
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "PYTHON=$base is not a working Python 3.11 or newer."
if [[ ! -f $venv/pyvenv.cfg ]]; then
    [[ ! -e $venv ]] || die "HEST_VENV=$venv is no virtual environment: name another place."
    "$uv" venv --quiet --python "$base" "$venv"
fi
constraints=(--constraint "$scripts/hest_constraints.txt")
[[ ${HEST_UNCONSTRAINED:-} != 1 ]] || constraints=()
# HEST needs OpenSlide's library and does not ask for it.
"$uv" pip install --python "$venv/bin/python" "${constraints[@]}" "$source" openslide-bin safetensors ||
    die "HEST cannot be installed, see above; without GitHub, name a checkout or archive of commit $commit."
"$venv/bin/python" -c 'import hest.bench' || die "HEST is installed in $venv, but cannot be imported, see above."
printf '%s\n' "HEST is installed in $venv: $venv/bin/python HEST_evaluation.py --checkpoint ..."
