"""install.sh, with a Python and a uv that only record what they are asked."""

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]

# Makes environments out of copies of itself; everything else succeeds.
PYTHON = """#!/usr/bin/env bash
echo "python $*" >>"$RECORD"
if [[ "$1 $2" == "-m venv" ]]; then
    [[ -z ${NO_ENSUREPIP:-} ]] || { mkdir "$3"; echo "ensurepip is not available"; exit 1; }
    mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$0" "$3/bin/python"
elif [[ "$*" == *environment* ]]; then
    exit "${UNUSABLE_GPU:-0}"
elif [[ "$*" == *"install --quiet uv"* ]]; then
    exit 1
fi
"""

# Finds the builds listed in BUILDS, one "index:version:build" per word, as uv does: indexes in order.
UV = """#!/usr/bin/env bash
echo "uv $*" >>"$RECORD"
case "$1 $2" in
    "venv --quiet") mkdir -p "$5/bin"; touch "$5/pyvenv.cfg"; cp "$(command -v python3)" "$5/bin/python" ;;
    "pip install") [[ $3 != --help ]] || echo "--torch-backend" ;;
    "pip compile")
        index=default; wanted=
        while [[ $# -gt 0 ]]; do
            case $1 in
                --torch-backend=*) index=pytorch ;;
                --constraint) wanted=$(sed -n 's/^torch==//p' "$2") ;;
            esac
            shift
        done
        for build in $BUILDS; do
            IFS=: read -r where version suffix <<<"$build"
            if [[ $where == "$index" && ( -z $wanted || $wanted == "$version" ) ]]; then
                printf 'numpy==9\\ntorch==%s%s\\ntorchvision==0.9\\n' "$version" "$suffix"
                exit 0
            fi
        done
        echo "${RESOLVE_ERROR:-no such version}" >&2
        exit 1 ;;
esac
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path):
    """Copy of install.sh and what it reads, under a path with a space, with ``tools`` on PATH."""
    root = tmp_path / "path fm"
    tools = tmp_path / "tools"
    root.mkdir()
    tools.mkdir()
    for name in ("install.sh", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root)
    (root / "constraints.txt").write_text("torch==2.15\nnumpy==9\n")
    executable(tools / "python3", PYTHON)
    executable(tools / "uv", UV)
    for tool in (
        "bash",
        "dirname",
        "cat",
        "cp",
        "rm",
        "mkdir",
        "touch",
        "mktemp",
        "grep",
        "sed",
        "cksum",
        "env",
    ):
        (tools / tool).symlink_to(shutil.which(tool))
    return root


def install(root, **variables):
    """Result of install.sh and the commands it gave to Python and uv."""
    record = root.parent / "record"
    record.write_text("")
    environment = {
        "PATH": str(root.parent / "tools"),
        "RECORD": str(record),
        "BUILDS": "default:2.15:",
        **variables,
    }
    result = subprocess.run([root / "install.sh"], env=environment, capture_output=True, text=True, timeout=60)
    return result, record.read_text().splitlines()


def show_gpu(root):
    executable(root.parent / "tools/nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: CUDA Version: 12.4'\n")


def test_environment_is_made_first_and_everything_goes_into_it(repository):
    result, commands = install(repository)
    assert result.returncode == 0, result.stderr
    made = commands.index("python -m venv .venv")
    installed = next(i for i, command in enumerate(commands) if "--editable" in command)
    assert made < installed
    assert f"--python {repository}/.venv/bin/python" in commands[installed]
    assert "--editable .[dev,slides]" in commands[installed]
    assert commands[-1] == "python -m dinov2.utils.environment"


def test_second_run_only_checks(repository):
    install(repository)
    result, commands = install(repository)
    assert result.returncode == 0
    assert not any("uv" in command or "venv .venv" in command for command in commands)
    assert commands[-1] == "python -m dinov2.utils.environment"


def test_changed_requirements_are_installed(repository):
    install(repository)
    (repository / "constraints.txt").write_text("torch==2.15\nnumpy==10\n")
    assert any("--editable" in command for command in install(repository)[1])


@pytest.mark.parametrize(
    ("gpu", "builds", "taken"),
    [
        (True, "pytorch:2.15:+cu130 default:2.15:", "torch==2.15+cu130, torchvision==0.9 (tested"),
        # The tested release has no build for the driver: the CPU's is offered, an older CUDA build is better.
        (
            True,
            "pytorch:2.14:+cu126 pytorch:2.15:+cpu default:2.15:",
            "torch==2.14+cu126, torchvision==0.9 (torch-free",
        ),
        (True, "pytorch:2.15:+cpu default:2.15:", "torch==2.15, torchvision==0.9 (tested"),
        (False, "pytorch:2.15:+cpu default:2.15:", "torch==2.15+cpu, torchvision==0.9 (tested"),
        (False, "default:2.16:", "torch==2.16, torchvision==0.9 (torch-free"),
    ],
)
def test_pytorch_build_fits_the_machine(repository, gpu, builds, taken):
    if gpu:
        show_gpu(repository)
    elif list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine shows a GPU of its own")
    result, _ = install(repository, BUILDS=builds)
    assert result.returncode == 0, result.stderr
    assert f"Installing with {taken} versions)" in result.stdout


def test_index_out_of_reach_is_asked_once(repository):
    _, commands = install(repository, RESOLVE_ERROR="error sending request for url")
    assert sum("--torch-backend=auto" in command and "compile" in command for command in commands) == 1


def test_constraints_can_be_left_out(repository):
    result, _ = install(repository, PATHFM_UNCONSTRAINED="1", BUILDS="default:2.16:")
    assert "torch==2.16, torchvision==0.9 (any versions)" in result.stdout


def test_pip_takes_over_where_there_is_no_uv(repository):
    (repository.parent / "tools/uv").unlink()
    show_gpu(repository)
    result, commands = install(repository)
    assert result.returncode == 0, result.stderr
    torch, everything = (command for command in commands if "--constraint" in command)
    assert "whl/cu128" in torch and "whl/cu126" in torch and torch.endswith("torch torchvision")
    assert everything.endswith("--editable .[dev,slides]")


def test_unusable_gpu_fails_and_is_not_taken_for_installed(repository):
    assert install(repository, UNUSABLE_GPU="1")[0].returncode == 1
    assert any("--editable" in command for command in install(repository)[1])


def test_python_without_ensurepip(repository):
    result, _ = install(repository, NO_ENSUREPIP="1")
    assert result.returncode == 0, result.stderr
    shutil.rmtree(repository / ".venv")
    (repository.parent / "tools/uv").unlink()
    result, _ = install(repository, NO_ENSUREPIP="1")
    assert result.returncode == 1
    assert "apt install python3-venv" in result.stderr
    assert not (repository / ".venv").exists()


def test_missing_or_old_python_is_named(repository):
    executable(repository.parent / "tools/python3", "#!/usr/bin/env bash\nexit 1\n")
    assert "No Python 3.11 or newer" in install(repository)[0].stderr
    assert "PYTHON=python3 is not a working Python 3.11" in install(repository, PYTHON="python3")[0].stderr


@pytest.mark.parametrize("name", ["notes.txt", "pyvenv.cfg"])
def test_environment_that_does_not_work_is_left_alone(repository, name):
    (repository / ".venv").mkdir()
    (repository / ".venv" / name).write_text("precious")
    result, _ = install(repository)
    assert result.returncode == 1
    assert "move it away" in result.stderr
    assert (repository / ".venv" / name).read_text() == "precious"
