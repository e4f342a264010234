"""Gradient accumulation in whole runs: samples, steps, resumes and numbers of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dinov2.train.train import main
from tests.helpers.launches import command, finish, start
from tests.helpers.runs import TINY, checkpoint_tensors, read_metrics

MEANS = ("train.centering=centering", "dino.kde_loss_weight=0", "dino.koleo_loss_weight=0", "student.drop_path_rate=0")
HALVES = ("train.batch_size_per_gpu=4", "optim.accumulation_steps=2")


def train(shards: Path, output_dir: Path, *overrides: str) -> int:
    return main(["--output-dir", str(output_dir), *TINY, f"data.path={shards}", *overrides])


def losses(output_dir: Path) -> list[float]:
    return [record["total_loss"] for record in read_metrics(output_dir)]


def test_micro_batches_are_the_large_batch(shards: Path, tmp_path: Path):
    """For losses that are means: the same samples in the same order, steps, rates and curve."""
    options = (*MEANS, "logging.samples=true", "optim.early_stop=1")
    assert train(shards, tmp_path / "whole", *options) == 0
    parts = ("train.batch_size_per_gpu=2", "optim.accumulation_steps=4")
    assert train(shards, tmp_path / "parts", *options, *parts) == 0
    whole, found = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert len(found) == 4
    for one, other in zip(whole, found, strict=True):
        for key in ("step", "samples", "lr", "wd", "mom", "teacher_temp", "epoch", "slides_per_batch"):
            assert one[key] == other[key], key
        assert other["total_loss"] == pytest.approx(one["total_loss"], rel=1e-4)
        assert other["grad_norm_backbone"] == pytest.approx(one["grad_norm_backbone"], rel=1e-2)
    consumed = [(tmp_path / name / "logs/samples.rank0.jsonl").read_text() for name in ("whole", "parts")]
    assert consumed[0] == consumed[1] and consumed[0].count("\n") == 4
    state = json.loads((tmp_path / "parts/checkpoints/step_0000004/state.json").read_text())
    assert (state["step"], state["samples"], state["global_batch"], state["stream"]["global_batch"]) == (4, 32, 8, 8)


def test_a_resume_is_bit_equal_and_keeps_the_batch(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """With Sinkhorn-Knopp, KDE, KoLeo and stochastic depth, whose draws follow from the step alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(shards, whole, *HALVES, "optim.early_stop=1") == 0
    for stop in ("0.5", "1"):
        assert train(shards, parts, *HALVES, f"optim.early_stop={stop}") == 0
    expected, found = (checkpoint_tensors(run, 4) for run in (whole, parts))
    assert expected.keys() == found.keys()
    assert [key for key in found if not torch.equal(expected[key], found[key])] == []
    assert losses(whole) == losses(parts)
    # Refused before data are opened.
    capsys.readouterr()
    nowhere = tmp_path / "nowhere"
    for options in (["optim.accumulation_steps=4"], ["optim.accumulation_steps=3", "train.allow_changes=true"]):
        assert train(nowhere, parts, *options) == 2
        (said,) = [line for line in capsys.readouterr().err.splitlines() if " I " not in line]
        assert "optim.accumulation_steps" in said and str(nowhere) not in said


def test_the_plan_tells_micro_batches(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train(shards, tmp_path / "out", *HALVES, "--dry-run") == 0
    assert "8 images = 1 process x 4 x 2 micro-batches" in capsys.readouterr().out
    assert train(tmp_path / "nowhere", tmp_path / "out", "optim.accumulation_steps=0") == 2
    said = capsys.readouterr().err
    assert "optim.accumulation_steps = 0" in said and "nowhere" not in said


def test_two_processes_equal_one_and_one_goes_on(shards: Path, tmp_path: Path):
    """A micro-batch of all processes holds the same samples, so that Sinkhorn-Knopp gives the same targets."""
    same = ("student.drop_path_rate=0", "dino.kde_gather=true", "dino.koleo_gather=true", "data.lanes=16",
            "optim.accumulation_steps=2")  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(shards, one, *same, "train.batch_size_per_gpu=4", "optim.early_stop=1") == 0
    pair = command(two, shards, 2, *same, "train.batch_size_per_gpu=2", "optim.early_stop=0.5")
    status, said = finish(start(pair))
    assert status == 0, said
    assert train(shards, two, *same, "optim.early_stop=1") == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
