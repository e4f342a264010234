"""Derived figures of a run against the published arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dinov2
from dinov2.configs import load_config
from dinov2.train.plan.plan import disk_needs, make_plan
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update.optim import Schedules

RECIPE = Path(dinov2.__file__).parent / "configs" / "train" / "vitg14_reg4.yaml"


def test_batch_steps_and_images():
    plan = make_plan(load_config(RECIPE), 8)
    assert (plan.global_batch, plan.local_batch) == (384, 48)
    assert (plan.total_steps, plan.schedule_steps) == (250_000, 10_000_000)
    assert plan.total_images == 96_000_000


def test_a_resumed_run_keeps_its_global_batch():
    config = load_config(RECIPE)
    plan = make_plan(config, 4, global_batch=384)
    assert (plan.global_batch, plan.local_batch) == (384, 96)
    assert plan.peak_lr == make_plan(config, 8).peak_lr


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="384 images does not divide over 5 processes"):
        make_plan(load_config(RECIPE), 5, global_batch=384)
    accumulating = load_config(RECIPE, ["optim.accumulation_steps=5"])
    with pytest.raises(ValueError, match=r"384 images .*optim.accumulation_steps = 5 .* 8 processes"):
        make_plan(accumulating, 8, global_batch=384)


def test_accumulation_counts_in_the_batch_and_not_in_the_steps():
    config = load_config(RECIPE, ["optim.accumulation_steps=4", "train.batch_size_per_gpu=6"])
    plan, single = make_plan(config, 48), make_plan(load_config(RECIPE), 8)
    assert (plan.global_batch, plan.local_batch, plan.accumulation) == (1152, 6, 4)
    assert (plan.total_steps, plan.epoch_steps) == (single.total_steps, single.epoch_steps)
    assert plan.peak_lr == pytest.approx(2e-4 * (1152 / 1024) ** 0.5) == pytest.approx(3**0.5 * single.peak_lr)
    assert plan.total_images == 3 * single.total_images
    again = make_plan(config, 24, global_batch=1152)
    assert (again.local_batch, again.peak_lr) == (12, plan.peak_lr)
    auto = load_config(RECIPE, ["optim.epochs=auto", "optim.early_stop=null", "optim.accumulation_steps=4"])
    assert make_plan(auto, 8, num_tiles=2_000_000).total_images == pytest.approx(96_000_000, rel=0.02)


@pytest.mark.parametrize(
    ("tiles", "images"),
    [
        (10_000, 1_000_000),  # a hundred passes
        (2_000_000, 96_000_000),  # as many images as the published run
        (100_000_000, 300_000_000),  # three passes
    ],
)
def test_epochs_by_the_number_of_tiles(tiles: int, images: int):
    config = load_config(RECIPE, ["optim.epochs=auto", "optim.early_stop=null"])
    plan = make_plan(config, 8, num_tiles=tiles)
    assert plan.total_steps == plan.schedule_steps == 100 * plan.epoch_steps
    assert plan.total_images == pytest.approx(images, rel=0.02)
    half = make_plan(load_config(RECIPE, ["optim.epochs=auto", "optim.early_stop=50"]), 8, num_tiles=tiles)
    assert 2 * half.total_steps == half.schedule_steps == plan.schedule_steps


def test_epochs_of_very_few_tiles_and_of_no_number():
    config = load_config(RECIPE, ["optim.epochs=auto"])
    plan = make_plan(config, 8, num_tiles=1)
    assert plan.epoch_steps == 1 and plan.total_steps == 100
    with pytest.raises(ValueError, match=r"optim.epochs = auto .*data.max_tiles"):
        make_plan(config, 8)


def test_lengths_beyond_the_run_end_with_it():
    overrides = ["optim.epochs=5", "optim.early_stop=200", "optim.warmup_epochs=10", "optim.min_lr=0"]
    config = load_config(RECIPE, overrides)
    plan = make_plan(config, 8)
    assert plan.total_steps == plan.schedule_steps == 5 * 1250
    lr = Schedules(config, plan).lr
    rates = [lr[step] for step in range(plan.total_steps)]
    np.testing.assert_allclose(rates, np.linspace(0, plan.peak_lr, 12_500)[:6250], rtol=1e-9)


def test_odd_batches_divide():
    plan = make_plan(load_config(RECIPE, ["train.batch_size_per_gpu=7"]), 3)
    assert (plan.global_batch, plan.local_batch) == (21, 7)


def test_room_on_the_disk():
    """N + 1 checkpoints and those of every K-th step: four numbers of fp32 per parameter that learns, two of others."""
    config = load_config(RECIPE, ["train.keep_checkpoints=3", "evaluation.keep_exports=4"])
    student = SSLMetaArch(config, weights_device="meta").student
    parameters = sum(p.numel() for p in student.parameters())
    disk = disk_needs(config, make_plan(config, 8), student)
    assert (disk.checkpoints, disk.checkpoint) == (4, 16 * parameters)
    assert (disk.exports, disk.export) == (5, 4 * parameters)
    assert disk.total == (4 * 16 + 5 * 4) * parameters
    every = load_config(RECIPE, ["train.keep_checkpoints_every=25000"])
    assert disk_needs(every, make_plan(every, 8), student).checkpoints == 2 + 1 + 10
    assert disk_needs(every, make_plan(every, 8), student).exports == 20
    none = load_config(RECIPE, ["train.skip_checkpointer=true"])
    assert disk_needs(none, make_plan(none, 8), student).checkpoints == 0
    student.backbone.requires_grad_(False)
    frozen = sum(p.numel() for p in student.backbone.parameters())
    assert disk_needs(config, make_plan(config, 8), student).checkpoint == 16 * parameters - 8 * frozen


def test_a_budget_of_flops_shortens_epochs():
    """8 processes of 48 images at 5 TFLOP each: 1.92e15 a step, of which 1e18 pays for 520, 5 in each of 100 epochs."""
    config = load_config(RECIPE, ["optim.epochs=100", "optim.early_stop=null", "optim.max_flops=1e18"])
    plan = make_plan(config, 8, flops=lambda images: images * 5 * 10**12)
    assert (plan.epoch_steps, plan.total_steps, plan.schedule_steps, plan.is_cut) == (5, 500, 500, True)
    accumulating = load_config(RECIPE, ["optim.epochs=10", "optim.early_stop=null", "optim.max_flops=1e18",
                                        "optim.accumulation_steps=4"])  # fmt: skip
    assert make_plan(accumulating, 8, flops=lambda images: images * 5 * 10**12).epoch_steps == 13
    plenty = make_plan(config, 8, flops=lambda images: 1)
    assert (plenty.total_steps, plenty.is_cut) == (125_000, False)
    with pytest.raises(ValueError, match="max_flops"):
        make_plan(config, 8, flops=lambda images: images * 10**15)
