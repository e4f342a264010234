"""Derived figures of a run against the published arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dinov2
from dinov2.configs import load_config
from dinov2.train.plan import flops_per_step, make_plan
from dinov2.train.ssl_meta_arch import SSLMetaArch

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
    with pytest.raises(ValueError, match="384 images does not divide into pairs over 5 processes"):
        make_plan(load_config(RECIPE), 5, global_batch=384)


def test_flops_of_the_full_recipe():
    """The arithmetic written out: 57 and 230 kept samples, 4096-wide SwiGLU, 185 masked rows per pair of images."""
    config = load_config(RECIPE)
    with torch.device("meta"):
        student = SSLMetaArch(config).student
    width, hidden, images = 1536, 4096, 48
    linear = 2 * (4 * width**2 + 3 * width * hidden)
    assert linear == 56_623_104
    student_flops = 3 * 40 * (linear * 27_297 + 4 * width * (57 * 261**2 + 230 * 54**2))
    teacher_flops = 40 * (linear * 25_056 + 96 * 4 * width * 261**2)
    masked = 24 * (int(256 * 0.275) + int(256 * 0.45))
    heads = 116_916_224 * (3 * 480 + 96) + 82_837_504 * 4 * masked
    pixels = 2 * 588 * width * (2 * (96 * 256 + 384 * 49) + 96 * 256)
    counted = flops_per_step(config, student, images)
    assert counted == student_flops + teacher_flops + heads + pixels
    assert counted == pytest.approx(249e12, rel=0.003)  # the published accounting has 3,402 masked rows
