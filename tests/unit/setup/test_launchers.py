"""The run scripts, in a copy of the repository whose Python only prints how it was called."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
EIGHT_GPUS = "0,1,2,3,4,5,6,7"
# Only what moves folders is run.
PRINT_ARGUMENTS = f"""#!/usr/bin/env bash
[[ $1 != */_move_aside.py ]] || PYTHONPATH={REPOSITORY} exec {sys.executable} "$@"
printf "%s\\n" "$@"
"""


@pytest.fixture
def repository(tmp_path):
    """Copy of the launchers under a path with a space."""
    root = tmp_path / "path fm"
    shutil.copytree(REPOSITORY / "scripts", root / "scripts")
    for script in [*REPOSITORY.glob("run_*.sh"), REPOSITORY / "run_1node.sbatch"]:
        shutil.copy(script, root)
    configs = root / "dinov2/configs/train"
    configs.mkdir(parents=True)
    for name in ("vitg14_reg4", "vitg14_reg4_short1", "other"):
        (configs / f"{name}.yaml").touch()
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PRINT_ARGUMENTS)
    python.chmod(0o755)
    return root


def launch(root, script, *arguments, cwd=None, **variables):
    """Result of a launcher run with these variables and no others that it reads."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    environment = {"CUDA_VISIBLE_DEVICES": EIGHT_GPUS, **kept, **variables}
    return subprocess.run(
        [root / script, *arguments],
        cwd=cwd or root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def arguments_of(result):
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def value_of(arguments, option):
    return arguments[arguments.index(option) + 1]


def make_run(folder):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder / "checkpoints/weights").write_text("precious")


def refusal(result):
    assert result.returncode != 0
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    return result.stderr


def test_one_node_by_default_starts_eight_processes(repository, tmp_path):
    arguments = arguments_of(launch(repository, "run_1node.sh", "optim.lr=1e-4", "train.name=a b", cwd=tmp_path))
    assert arguments == [
        *(str(repository / "scripts/_torchrun.py"), "--nnodes", "1", "--nproc_per_node", "8"),
        *("--max-restarts", "3", "--standalone"),
        str(repository / "dinov2/train/train.py"),
        *("--config-file", str(repository / "dinov2/configs/train/vitg14_reg4.yaml")),
        *("--output-dir", str(repository / "output_vitg14"), "optim.lr=1e-4", "train.name=a b"),
    ]


def test_one_gpu_by_default_trains_the_short_recipe_without_torchrun(repository, tmp_path):
    arguments = arguments_of(launch(repository, "run_short_1gpu.sh", "--dry-run", cwd=tmp_path))
    assert arguments == [
        str(repository / "dinov2/train/train.py"),
        *("--config-file", str(repository / "dinov2/configs/train/vitg14_reg4_short1.yaml")),
        *("--output-dir", str(repository / "output_vitg14_short1"), "--dry-run"),
    ]


def test_variables_override_the_defaults(repository, tmp_path):
    arguments = arguments_of(
        launch(
            repository,
            "run_1node.sh",
            cwd=tmp_path,
            NPROC_PER_NODE="2",
            CUDA_VISIBLE_DEVICES="3,5",
            CONFIG_FILE="dinov2/configs/train/other.yaml",
            OUTPUT_DIR="my run/",
            MASTER_PORT="29777",
        )
    )
    assert value_of(arguments, "--nproc_per_node") == "2"
    assert value_of(arguments, "--rdzv-endpoint") == "127.0.0.1:29777"
    assert "--standalone" not in arguments
    assert value_of(arguments, "--config-file") == str(repository / "dinov2/configs/train/other.yaml")
    assert value_of(arguments, "--output-dir") == "my run"


def test_nodes_agree_on_where_to_meet(repository):
    master = arguments_of(launch(repository, "run_master_node.sh", NNODES="3", MASTER_ADDR="10.0.0.1"))
    other = arguments_of(launch(repository, "run_other_nodes.sh", NNODES="3", NODE_RANK="2", MASTER_ADDR="10.0.0.1"))
    for option in ("--nnodes", "--nproc_per_node", "--master_addr", "--master_port", "--config-file"):
        assert value_of(master, option) == value_of(other, option)
    assert (value_of(master, "--node_rank"), value_of(other, "--node_rank")) == ("0", "2")
    restarting = {"MAX_RESTARTS": "2", "NNODES": "3", "MASTER_ADDR": "10.0.0.1"}
    master = arguments_of(launch(repository, "run_master_node.sh", **restarting))
    other = arguments_of(launch(repository, "run_other_nodes.sh", NODE_RANK="2", **restarting))
    assert master == [item.replace("run_other_nodes.sh", "run_master_node.sh") for item in other]
    assert (value_of(master, "--rdzv-backend"), value_of(master, "--max-restarts")) == ("c10d", "2")


def test_slurm_job_runs_the_single_node_script_where_it_was_submitted(repository, tmp_path):
    spooled = shutil.copy(repository / "run_1node.sbatch", tmp_path)
    result = launch(tmp_path, Path(spooled).name, "a.b=c", SLURM_SUBMIT_DIR=str(repository))
    arguments = arguments_of(result)
    assert value_of(arguments, "--output-dir") == str(repository / "output_vitg14")
    assert arguments[-1] == "a.b=c"


# Ends with the status that it is told once it has got USR1, or by itself.
ENDING = "trap 'echo told; exit $1' USR1; echo ready; for _ in {1..600}; do sleep 0.1; done"


def requeued(repository: Path, tmp_path: Path, *command: str, signalled: bool, after: int = 600):
    """Exit status, and what was said, of a command in a Slurm job that is signalled once it is ready."""
    (tmp_path / "scontrol").write_text('#!/usr/bin/env bash\necho scontrol "$@"\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SECONDS": str(after)}
    script = repository / "scripts/_requeue.sh"
    process = subprocess.Popen([script, *command], env=environment, stdout=subprocess.PIPE, text=True)
    said = []
    if signalled:
        said.append(process.stdout.readline().strip())
        process.send_signal(signal.SIGUSR1)
    said += process.communicate(timeout=60)[0].split("\n")[:-1]
    return process.returncode, said


def test_slurm_job_is_queued_again_where_it_stopped_before_its_end(repository, tmp_path):
    ending = ("bash", "-c", ENDING, "bash")
    queued = ["ready", "told", "scontrol requeue 17"]
    assert requeued(repository, tmp_path, *ending, "75", signalled=True) == (0, queued)
    assert requeued(repository, tmp_path, *ending, "75", signalled=True, after=100) == (75, queued[:2])
    assert requeued(repository, tmp_path, *ending, "76", signalled=True) == (0, queued)
    assert requeued(repository, tmp_path, *ending, "2", signalled=True) == (2, queued[:2])
    assert requeued(repository, tmp_path, "false", signalled=False) == (1, [])
    assert requeued(repository, tmp_path, "true", signalled=False) == (0, [])


def test_slurm_job_of_several_nodes_starts_a_launcher_on_each(repository, tmp_path):
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'node7\\nnode9\\n'\n")
    # Runs the command once for each node, as srun does at once.
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nshift\nfor n in 0 1; do SLURM_NODEID=$n "$@" || exit; done\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    spooled = shutil.copy(repository / "scripts/run_nodes.sbatch", tmp_path)
    variables = {"SLURM_SUBMIT_DIR": str(repository), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7,9]"}
    result = launch(tmp_path, Path(spooled).name, "a.b=c d", PATH=f"{tmp_path}:{os.environ['PATH']}", **variables)
    first, second = (part.splitlines() for part in "\n".join(arguments_of(result)).split("a.b=c d")[:2])
    for number, arguments in enumerate((first, second)):
        assert value_of(arguments, "--node_rank") == str(number)
        assert (value_of(arguments, "--master_addr"), value_of(arguments, "--nnodes")) == ("node7", "2")


def test_script_names_itself_for_the_run(repository):
    (repository / ".venv/bin/python").write_text('#!/usr/bin/env bash\necho "$DINOV2_RUN_SCRIPT"\n')
    assert launch(repository, "run_1node.sh").stdout.strip() == str(repository / "run_1node.sh")


def test_dry_launch_prints_a_command_that_can_be_pasted(repository):
    result = launch(repository, "run_1node.sh", "train.name=a b", DRY_LAUNCH="1")
    pasted = subprocess.run(["bash", "-c", result.stdout], capture_output=True, text=True, check=True)
    assert pasted.stdout == launch(repository, "run_1node.sh", "train.name=a b").stdout


def test_a_run_that_is_alive_is_not_moved_aside(repository):
    folder = repository / "output_vitg14"
    make_run(folder)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, folder / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        result = launch(repository, "run_1node.sh", RESUME="False")
        other.stdin.close()
    assert "output_vitg14 is in use" in refusal(result)
    assert (folder / "checkpoints/weights").read_text() == "precious"


@pytest.mark.parametrize("resume", ["True", "true", "1"])
def test_resuming_leaves_the_run_in_place(repository, resume):
    make_run(repository / "output_vitg14")
    assert "--no-resume" not in arguments_of(launch(repository, "run_1node.sh", RESUME=resume))
    assert (repository / "output_vitg14/checkpoints/weights").exists()


@pytest.mark.parametrize("resume", ["False", "false", "0"])
@pytest.mark.parametrize("proof", ["checkpoints", "metrics.jsonl"])
def test_starting_anew_moves_an_earlier_run_aside(repository, resume, proof):
    run = repository / "my run"
    make_run(run)
    if proof == "metrics.jsonl":
        (run / "checkpoints").rename(run / "other")
        (run / "metrics.jsonl").touch()
    names = {path.name for path in run.iterdir()}
    result = launch(repository, "run_1node.sh", RESUME=resume, OUTPUT_DIR=f"{run}/")
    assert "--no-resume" in arguments_of(result)
    assert not run.exists()
    (aside,) = repository.glob("my run.*")
    assert re.fullmatch(r"my run\.\d{8}-\d{6}", aside.name)
    assert {path.name for path in aside.iterdir()} == names | {".lock"}
    assert str(aside) in result.stderr


def test_dry_launch_moves_nothing(repository):
    make_run(repository / "output_vitg14")
    result = launch(repository, "run_1node.sh", RESUME="False", DRY_LAUNCH="1")
    assert "Would move" in result.stderr
    assert (repository / "output_vitg14/checkpoints/weights").exists()


def test_only_the_master_node_moves_a_run_aside(repository):
    make_run(repository / "output_vitg14")
    variables = dict(RESUME="False", MASTER_ADDR="10.0.0.1")
    assert "--no-resume" in arguments_of(launch(repository, "run_other_nodes.sh", **variables))
    assert (repository / "output_vitg14").exists()
    assert "--no-resume" in arguments_of(launch(repository, "run_master_node.sh", **variables))
    assert not (repository / "output_vitg14").exists()


@pytest.mark.parametrize("leftover", [None, "config.yaml", "stream_index"])
def test_starting_anew_accepts_a_folder_without_results(repository, leftover):
    folder = repository / "output_vitg14"
    folder.mkdir()
    if leftover:
        (folder / leftover).touch()
    arguments_of(launch(repository, "run_1node.sh", RESUME="False"))
    assert folder.exists()


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "checkpoints/weights"])
def test_a_folder_that_is_no_run_is_never_touched(repository, name):
    file = repository / "output_vitg14" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    assert "neither empty nor an earlier run" in refusal(launch(repository, "run_1node.sh", RESUME="False"))
    assert file.read_text() == "precious"


def test_output_that_is_a_file_is_refused(repository):
    (repository / "output_vitg14").write_text("precious")
    assert "is a file" in refusal(launch(repository, "run_1node.sh", RESUME="False"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(RESUME="yes"), "RESUME=yes is neither True nor False"),
        (dict(CONFIG_FILE="nowhere.yaml"), "CONFIG_FILE=nowhere.yaml does not exist"),
        (dict(OUTPUT_DIR="/"), "OUTPUT_DIR is empty"),
        (dict(NPROC_PER_NODE="eight"), "NPROC_PER_NODE=eight is not a whole number of at least 1"),
        (dict(NPROC_PER_NODE="0"), "NPROC_PER_NODE=0 is not a whole number of at least 1"),
        (dict(CUDA_VISIBLE_DEVICES="0,1,2"), "NPROC_PER_NODE=8 needs as many GPUs and 3 are visible"),
    ],
)
def test_wrong_variables_are_refused_in_one_sentence(repository, variables, message):
    assert message in refusal(launch(repository, "run_1node.sh", **variables))


def test_other_nodes_need_an_address_and_a_rank_below_the_number_of_nodes(repository):
    assert "MASTER_ADDR is not set" in refusal(launch(repository, "run_other_nodes.sh"))
    variables = dict(MASTER_ADDR="10.0.0.1", NODE_RANK="2")
    assert "NODE_RANK=2 is not below NNODES=2" in refusal(launch(repository, "run_other_nodes.sh", **variables))


def test_hidden_gpus_train_on_the_cpu(repository):
    result = launch(repository, "run_1node.sh", NPROC_PER_NODE="2", CUDA_VISIBLE_DEVICES="")
    assert value_of(arguments_of(result), "--nproc_per_node") == "2"
    assert "training on the CPU" in result.stderr


def test_missing_installation_is_named(repository):
    shutil.rmtree(repository / ".venv")
    assert "install.sh first" in refusal(launch(repository, "run_1node.sh"))


def test_a_line_is_shown_without_gpus(repository):
    result = launch(repository, "run_1node.sh", DRY_LAUNCH="1", CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 0
    assert "train.py" in result.stdout
    assert "NPROC_PER_NODE=8" in result.stderr
    assert launch(repository, "run_1node.sh", CUDA_VISIBLE_DEVICES="0").returncode == 1


def test_variables_of_other_names_are_warned_of(repository):
    result = launch(repository, "run_1node.sh", CONFIG="other.yaml", NUM_GPUS="4")
    assert result.returncode == 0
    told = result.stderr.splitlines()
    assert [line for line in told if "CONFIG_FILE" in line] and [line for line in told if "NPROC_PER_NODE" in line]
    assert not launch(repository, "run_1node.sh").stderr


def test_help_of_a_launcher(repository):
    (repository / ".venv/bin/python").unlink()
    result = launch(repository, "run_short_1gpu.sh", "--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("CONFIG_FILE", "OUTPUT_DIR", "DRY_LAUNCH", "examples:"))
