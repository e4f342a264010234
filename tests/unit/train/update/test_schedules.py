"""Schedules against the published figures and against the written-out arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dinov2
from dinov2.configs import load_config
from dinov2.train.plan.plan import make_plan
from dinov2.train.update.optim import Schedules
from dinov2.utils.utils import CosineScheduler

TRAIN_CONFIGS = Path(dinov2.__file__).parent / "configs" / "train"


def schedules_of(name: str, world_size: int, *overrides: str) -> Schedules:
    config = load_config(TRAIN_CONFIGS / f"{name}.yaml", overrides)
    plan = make_plan(config, world_size)
    return Schedules(config, plan)


@pytest.mark.parametrize(
    ("total", "warmup", "freeze", "start"),
    [(100, 10, 0, 0.0), (50, 0, 5, 0.1), (20, 20, 0, 0.04), (9, 1, 3, 0.2)],
)
def test_cosine_scheduler_equals_the_written_out_array(total: int, warmup: int, freeze: int, start: float):
    cosine = np.arange(total - warmup - freeze)
    cosine = 0.01 + 0.5 * (0.7 - 0.01) * (1 + np.cos(np.pi * cosine / max(len(cosine), 1)))
    expected = np.concatenate([np.zeros(freeze), np.linspace(start, 0.7, warmup), cosine])
    schedule = CosineScheduler(0.7, 0.01, total, warmup, start, freeze)
    np.testing.assert_allclose([schedule[i] for i in range(total)], expected, rtol=1e-12)
    assert schedule[total] == schedule[10 * total] == 0.01
    assert len(schedule) == total


def test_cosine_scheduler_that_cannot_hold_its_warm_up():
    with pytest.raises(ValueError, match="5 frozen and 8 warm-up"):
        CosineScheduler(1.0, 0.0, 10, 8, 0.0, 5)


def test_full_recipe_at_published_points():
    """Peak, and learning rate, weight decay and momentum at the stop of the released recipe."""
    schedules = schedules_of("vitg14_reg4", 8)
    assert schedules[12_500].lr == pytest.approx(1.2247e-4, rel=1e-4)
    assert schedules[0].lr == 0.0
    stop = schedules[250_000]
    assert (stop.lr, stop.mom) == pytest.approx((1.2231e-4, 0.99401), rel=1e-4)
    assert stop.wd == pytest.approx(0.0402, abs=5e-5)


def test_last_layer_is_frozen_for_the_first_epoch():
    schedules = schedules_of("vitg14_reg4", 8)
    assert schedules[1249].last_layer_lr == 0.0 < schedules[1249].lr
    assert schedules[1250].last_layer_lr == schedules[1250].lr > 0.0


def test_teacher_temperature():
    schedules = schedules_of("vitg14_reg4", 8)
    assert schedules[0].teacher_temp == 0.04
    assert schedules[37_499].teacher_temp == pytest.approx(0.07)
    assert schedules[200_000].teacher_temp == 0.07
    assert schedules_of("vitg14_reg4_short1", 1)[18_750].teacher_temp == pytest.approx(0.055, abs=5e-4)


def test_single_gpu_recipe():
    config = load_config(TRAIN_CONFIGS / "vitg14_reg4_short1.yaml")
    plan = make_plan(config, 1)
    assert plan.peak_lr == pytest.approx(4.146e-5, rel=1e-3)
    assert plan.total_steps == 18_750
    assert make_plan(load_config(TRAIN_CONFIGS / "vitg14_reg4_short2.yaml"), 1).total_steps == 68_750
