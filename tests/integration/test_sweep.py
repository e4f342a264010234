"""Sweeps as a user starts them: run by run, killed and resumed, phase by phase, to page and table."""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest
import yaml

from dinov2.sweep.__main__ import main
from tests.helpers.launches import PATIENCE_S, finish, processes_of, start, wait_for_step
from tests.helpers.runs import TINY, read_metrics

STEPS = 8


def write(folder: Path, shards: Path, **values: object) -> Path:
    (folder / "base.yaml").write_text("logging: {period_iterations: 1}\n")
    sweep = {"base": "base.yaml", "overrides": [*TINY, f"data.path={shards}"], **values}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return file


def line(sweep: Path, output: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "dinov2.command", "compare", str(sweep), "--output", str(output), *arguments]


def test_a_killed_sweep_goes_on_and_ends_in_page_and_table(shards: Path, tmp_path: Path):
    variants = {"warm": {"teacher.teacher_temp": 0.07}, "cold": {"teacher": {"teacher_temp": 0.04}}}
    sweep, out = write(tmp_path, shards, variants=variants, seeds=[0, 3]), tmp_path / "out"
    names = ["warm-seed0", "warm-seed3", "cold-seed0", "cold-seed3"]
    # Killed without a chance to say goodbye, within its second run, which ends with it.
    process = start(line(sweep, out, "--no-check"))
    while not (out / names[0] / "sweep_run.json").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    wait_for_step(out / names[1], 3, process)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    while processes_of(out / names[1]):
        time.sleep(0.1)
    first = (out / names[0] / "metrics.jsonl").read_bytes()
    status, said = finish(start(line(sweep, out, "--no-check")))
    assert status == 0, said
    assert (out / names[0] / "metrics.jsonl").read_bytes() == first
    attempts = [len((out / name / "attempts.jsonl").read_text().splitlines()) for name in names]
    assert attempts == [1, 2, 1, 1]
    records = {name: {record["step"]: record for record in read_metrics(out / name)} for name in names}
    assert all(set(steps) == set(range(1, STEPS + 1)) for steps in records.values())
    found = {one["name"]: one for one in json.loads((out / "results.json").read_text())["variants"]}
    assert list(found) == ["warm", "cold"]
    for variant, its in found.items():
        # A tenth of eight records is the last one.
        losses = {str(seed): records[f"{variant}-seed{seed}"][STEPS]["total_loss"] for seed in (0, 3)}
        result = its["results"]["total_loss"]
        assert result["seeds"] == pytest.approx(losses)
        assert result["mean"] == pytest.approx(statistics.mean(losses.values()))
        assert result["sd"] == pytest.approx(statistics.stdev(losses.values()))
    table = (out / "results.md").read_text()
    assert "| warm | cold |" in table and "| 2 of 2 | 2 of 2 |" in table
    page = (out / "report.html").read_text()
    assert all(name in page for name in names) and "teacher.teacher_temp" in page
    # Nothing is left to do, but what was done is no longer this sweep.
    changed = write(tmp_path, shards, variants=variants | {"cold": {"teacher.teacher_temp": 0.05}}, seeds=[0, 3])
    assert main([str(changed), "--output", str(out), "--no-check"]) == 2
    assert main([str(changed), "--output", str(out), "--no-check", "--processes", "2"]) == 2


def test_phases_follow_each_other_and_sigterm_stops_all(shards: Path, tmp_path: Path):
    phases = {"first": {}, "second": {"optim.base_lr": 0.001}}
    sweep, out = write(tmp_path, shards, variants={"only": {}}, phases=phases), tmp_path / "out"
    process = start(line(sweep, out, "--no-check"))
    wait_for_step(out / "only-seed0-first", 2, process)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status == 143, said
    assert not processes_of(out / "only-seed0-first")
    status, said = finish(start(line(sweep, out, "--task", "0")))
    assert status == 0, said
    log = (out / "only-seed0-second/logs/rank_0.log").read_text()
    assert f"only-seed0-first/eval/training_{STEPS}/teacher_checkpoint.pth" in log or "Initialised from" in log
    assert not (out / "report.html").exists()
    assert main([str(sweep), "--output", str(out), "--report"]) == 0
    variants = json.loads((out / "results.json").read_text())["variants"]
    assert [one["name"] for one in variants] == ["only, first", "only, second"]


def test_what_would_fail_late_is_refused_before_the_first_run(shards: Path, tmp_path: Path):
    absent = {"good": {}, "bad": {"data.path": str(tmp_path / "absent")}}
    sweep, out = write(tmp_path, shards, variants=absent), tmp_path / "out"
    assert main([str(sweep), "--output", str(out)]) == 2
    assert not list(out.glob("*/metrics.jsonl"))


def test_commands_and_scripts_are_printed(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    sweep, out = write(tmp_path, shards, variants={"a": {}, "b": {"optim.epochs": 1}}, seeds=[0, 1]), tmp_path / "out"
    assert main([str(sweep), "--output", str(out), "--print", "--processes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("--nproc_per_node=2" in line and "train.py" in line for line in lines)
    assert not out.exists()
    assert main([str(sweep), "--output", str(out), "--slurm", "--no-check", "a:optim.epochs=3"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/usr/bin/env bash\n") and "#SBATCH --array=0-3\n" in script
    assert "a:optim.epochs=3" in script.splitlines()[-1]
    assert main([str(sweep), "--output", str(out), "--task", "4"]) == 2
