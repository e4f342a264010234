"""Budgets of a sweep's runs, and what an interrupted sweep does again."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from benchmarks.learn.runs import Commands, Model, Run, Sweep
from dinov2.configs import load_config
from dinov2.train.plan.plan import make_plan

RECIPE = """
train: {batch_size_per_gpu: 32, OFFICIAL_EPOCH_LENGTH: 100}
optim: {epochs: 50, warmup_epochs: 5, early_stop: 20}
student: {arch: vit_demo, num_register_tokens: 4}
crops: {global_crops_size: 56, local_crops_size: 28}
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return Sweep(str(tmp_path / "recipe.yaml"), tmp_path / "tiles.parquet", tmp_path / "out", tmp_path / "peers")


@pytest.mark.parametrize("images", [2_000, 10_000, 32_000])
def test_schedules_end_with_the_budget(sweep: Sweep, images: int):
    run = sweep.run(Model("recipe"), seed=3, images=images)
    plan = make_plan(run.config, 1)
    assert plan.total_images == run.images == pytest.approx(images, abs=16)
    assert plan.schedule_steps == plan.total_steps
    assert run.config.train.seed == 3
    # Warm-up stays a tenth of the run, as far as whole steps allow.
    assert run.config.optim.warmup_epochs * plan.epoch_steps == pytest.approx(plan.total_steps / 10, rel=0.5)
    seen = [images for images, _ in run.exports]
    assert seen[0] == 0 and seen[-1] == run.images and seen == sorted(set(seen)) and len(seen) <= 6


def test_variants_differ_by_their_keys_and_peers_share_the_recipes_network(sweep: Sweep):
    variant = sweep.run(Model("kde", ("dino.kde_loss_weight=0.005",)), 0, 1000)
    assert variant.config.dino.kde_loss_weight == 0.005
    peer = sweep.run(Model("meta", ("optim.base_lr=1",), "meta"), 0, 1000)
    assert peer.config.optim.base_lr == load_config(None).optim.base_lr
    assert peer.spec["overrides"] == ["optim.base_lr=1"]
    assert peer.spec["network"]["embed_dim"] == 128 and peer.spec["network"]["depth"] == 4
    assert peer.spec["steps"] * peer.spec["batch_size"] == peer.images == variant.images


def test_a_batch_that_the_gpu_decides_is_refused(tmp_path: Path, sweep: Sweep):
    model = Model("recipe", ("train.batch_size_per_gpu=auto",))
    with pytest.raises(ValueError, match="batch_size_per_gpu"):
        sweep.run(model, 0, 1000)


def run_of(folder: Path, script: str) -> Run:
    """A peer's run whose adapter is a line of Python."""
    command = (sys.executable, "-c", script)
    return Run(Model("toy", (), "toy"), 0, folder, load_config(None), command, 10, {"exports": [0, 10]})


def test_finished_runs_are_not_repeated(tmp_path: Path):
    run = run_of(tmp_path / "run", "open('seen.txt', 'a').write('x'); sum(range(10**6))")
    for _ in range(2):
        run.prepare()
        run.train(Commands())
    assert (run.folder / "seen.txt").read_text() == "x"
    assert run.finished["images"] == 10 and run.finished["cpu_s"] > 0


def test_a_failed_run_is_tried_again_and_its_cost_is_unknown(tmp_path: Path):
    script = "import os, sys; late = os.path.exists('seen.txt'); open('seen.txt', 'a').write('x'); sys.exit(not late)"
    run = run_of(tmp_path / "run", script)
    run.prepare()
    with pytest.raises(ValueError, match=r"log\.txt"):
        run.train(Commands())
    assert run.finished is None
    run.prepare()
    run.train(Commands())
    assert (run.folder / "seen.txt").read_text() == "xx"
    assert run.finished["cpu_s"] is None


def test_a_folder_keeps_to_one_run(tmp_path: Path):
    run = run_of(tmp_path / "run", "pass")
    run.prepare()
    with pytest.raises(FileExistsError):
        dataclasses.replace(run, images=20).prepare()


def test_nothing_starts_after_the_end(tmp_path: Path):
    run, commands = run_of(tmp_path / "run", "open('seen.txt', 'a')"), Commands()
    run.prepare()
    commands.close()
    with pytest.raises(ValueError):
        run.train(commands)
    assert not (run.folder / "seen.txt").exists()
