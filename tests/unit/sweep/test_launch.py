"""What a sweep finds of its earlier launches, and the commands and scripts that it makes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dinov2.configs import public_config
from dinov2.sweep.launch import FINISHED, check_begun, command, is_finished, slurm_script, train
from dinov2.sweep.plan import Sweep, read
from dinov2.train.train import parse_args
from dinov2.utils.cli import Stopped

TEXT = """
base: vits14_reg4
overrides: {data.path: tiles}
variants: {a: {optim.clip_grad: 1.0}, b: {optim.clip_grad: 2.0}}
phases: {first: {}, second: {optim.base_lr: 1e-4}}
"""


def planned(folder: Path, *overrides: str, output: str = "out") -> Sweep:
    (folder / "sweep.yaml").write_text(TEXT)
    return read(str(folder / "sweep.yaml"), folder / output, overrides)


def leave(sweep: Sweep, number: int, is_complete: bool) -> None:
    """What a run leaves of its configuration, at its end or with a checkpoint."""
    folder, config = sweep.output / sweep.runs[number].name, public_config(sweep.configs[number])
    path = folder / (FINISHED if is_complete else "checkpoints/step_0000002/state.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"config": config, "processes": 1, "global_batch": 48}))


@pytest.mark.parametrize(
    ("override", "is_refused"),
    [
        ("optim.early_stop=3", True),
        ("data.path=other", True),
        ("a:optim.clip_grad=3", True),
        ("b:optim.clip_grad=3", False),
        ("evaluation.probe_tiles=10", True),
        ("train.num_workers=3", False),
        ("logging.period_iterations=3", False),
        ("train.time_limit=3", False),
    ],
)
def test_finished_runs_must_be_those_of_the_sweep(tmp_path: Path, override: str, is_refused: bool):
    sweep = planned(tmp_path)
    leave(sweep, 0, is_complete=True)
    assert [is_finished(sweep, run) for run in sweep.runs] == [True, False, False, False]
    check_begun(sweep, 1)
    with pytest.raises(ValueError):
        check_begun(sweep, 2)
    changed = planned(tmp_path, override)
    if is_refused:
        with pytest.raises(ValueError, match=override.rpartition(":")[2].partition("=")[0]):
            check_begun(changed, 1)
    else:
        check_begun(changed, 1)


def test_interrupted_runs_may_not_become_others(tmp_path: Path):
    leave(planned(tmp_path), 0, is_complete=False)
    check_begun(planned(tmp_path, "optim.early_stop=3"), 1)  # which only makes it longer
    with pytest.raises(ValueError, match="weight_decay"):
        check_begun(planned(tmp_path, "optim.weight_decay=0.1"), 1)


def test_a_finished_phase_stays_so_where_the_folder_has_moved(tmp_path: Path):
    sweep = planned(tmp_path)
    leave(sweep, 0, is_complete=True)
    leave(sweep, 1, is_complete=True)
    (tmp_path / "out").rename(tmp_path / "moved")
    check_begun(planned(tmp_path, output="moved"), 1)


class Launched:
    """Stands in for processes: notes the runs that are started, each of which ends with a status told by its name."""

    def __init__(self, patch: pytest.MonkeyPatch, **statuses: int) -> None:
        self.runs: list[str] = []
        self._statuses = statuses
        patch.setattr("dinov2.sweep.launch.subprocess.Popen", self)

    def __call__(self, line: list[str], **options: object) -> Launched:
        self.runs.append(Path(line[line.index("--output-dir") + 1]).name)
        return self

    def wait(self) -> int:
        return self._statuses.get(self.runs[-1].replace("-", "_"), 0)


def make_folders(sweep: Sweep) -> None:
    for run in sweep.runs:
        (sweep.output / run.name).mkdir(parents=True, exist_ok=True)


def test_a_failed_run_keeps_what_follows_from_it_alone_from_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = planned(tmp_path)
    make_folders(sweep)
    launched = Launched(monkeypatch, a_seed0_first=76)
    assert train(sweep, sweep.runs, 1) == {"a-seed0-first": 76, "a-seed0-second": 76}
    assert launched.runs == ["a-seed0-first", "b-seed0-first", "b-seed0-second"]
    # The same again tries what has failed, and nothing else.
    launched = Launched(monkeypatch)
    assert train(sweep, sweep.runs, 1) == {}
    assert launched.runs == ["a-seed0-first", "a-seed0-second"]
    assert all(is_finished(sweep, run) for run in sweep.runs)
    check_begun(sweep, 1)
    launched = Launched(monkeypatch)
    assert train(sweep, sweep.runs, 1) == {} and launched.runs == []


def test_a_run_that_was_asked_to_stop_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = planned(tmp_path)
    make_folders(sweep)
    launched = Launched(monkeypatch, a_seed0_second=75)  # by its limit of time, for instance
    with pytest.raises(Stopped) as stopped:
        train(sweep, sweep.runs, 1)
    assert stopped.value.status == 75 and launched.runs == ["a-seed0-first", "a-seed0-second"]
    assert [is_finished(sweep, run) for run in sweep.runs] == [True, False, False, False]


def test_commands_are_those_of_the_training(tmp_path: Path):
    sweep = planned(tmp_path, "crops.global_crops_scale=[0.3, 1.0]")
    first = command(sweep, sweep.runs[0])
    args = parse_args(first[first.index(str(Path(first[1]))) + 1 :])
    assert (args.config_file, args.output_dir) == ("vits14_reg4", str(tmp_path / "out/a-seed0-first"))
    assert args.overrides == list(sweep.runs[0].overrides)
    many = command(sweep, sweep.runs[0], 4)
    assert "--nproc_per_node=4" in many and many[-len(args.overrides) :] == args.overrides


def test_the_script_is_an_array_of_variants_and_seeds(tmp_path: Path):
    sweep = planned(tmp_path, "a:optim.clip_grad=1.5")
    script = slurm_script(sweep, 8, ["sweep.yaml", "a:crops.global_crops_scale=[0.3, 1.0]"])
    lines = script.splitlines()
    assert "#SBATCH --array=0-1" in lines and "#SBATCH --gpus-per-node=8" in lines
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    echoed = lines[-1].replace("exec ", "printf '%s\\n' ")
    said = subprocess.run(
        ["bash", "-c", echoed], capture_output=True, text=True, env={"SLURM_ARRAY_TASK_ID": "1", "PATH": "/bin"}
    )
    assert said.stdout.splitlines()[-3:] == ["a:crops.global_crops_scale=[0.3, 1.0]", "--task", "1"]
