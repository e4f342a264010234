"""Warnings of spikes, divergence, collapse and constant losses: when they come, how often, and when not."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from dinov2.logging.health import HealthWatch

SOUND = {
    "total_loss": 9.0, "dino_global_crops_of_chance": 0.95, "health/total_loss_peak": 9.1,
    "health/grad_norm_of_median": 1.2, "health/class_token_std": 0.6, "health/rankme": 30.0,
    "health/dino_entropy": 0.7, "health/ibot_entropy": 0.6, "health/dino_prototype_use": 0.01,
    "health/ibot_prototype_use": 0.02,
}  # fmt: skip
UNIFORM = {"health/class_token_std": 0.02, "health/rankme": 1.3, "health/dino_entropy": 0.9999}
ONE_PROTOTYPE = {"health/class_token_std": 0.02, "health/dino_prototype_use": 1.1 / 1024}
SHARP = {"health/rankme": 1.2, "health/ibot_entropy": 0.001}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture):
    """Records after which a watch warns, of changes to a sound record by number, and the watch."""

    def run(changes: Callable[[int], dict[str, Any]], last: int = 100, first_step: int = 0) -> tuple[list[int], Any]:
        watch, found, noise = HealthWatch(first_step, {"dino": 1024, "ibot": 512}), [], random.Random(0)
        for number in range(1, last + 1):
            factor = 1 + 0.02 * noise.uniform(-1, 1)
            record = {name: value * factor for name, value in SOUND.items()} | {"step": 10 * number}
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="dinov2"):
                watch.write(record | changes(number))
            found += [number] * len(caplog.records)
        return found, watch

    return run


def test_a_sound_run_is_told_nothing(told):
    found, watch = told(lambda number: {"total_loss": 9 * (0.7 + 0.3 * math.exp(-number / 30))}, last=300)
    assert found == [] and not watch.collapse


def test_probes_are_passed_over():
    HealthWatch(0, {"dino": 8}).write({"step": 1, "toy/knn/value": 1.0})


@pytest.mark.parametrize(
    "jump", [{"health/total_loss_peak": 13.0}, {"health/grad_norm_of_median": 12.0}], ids=["loss", "gradient"]
)
def test_a_spike_is_told_once_and_again_after_recovery(told, jump: dict[str, float]):
    found, watch = told(lambda number: jump if number in (30, 31, 33, 60) else {})
    assert found == [30, 60]
    assert not watch.collapse  # which would stop the run


def test_a_small_rise_is_no_spike(told):
    assert told(lambda number: {"health/total_loss_peak": 10.5} if number == 30 else {})[0] == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_left_to_the_guard(told, value: float):
    names = [name for name in SOUND if name.startswith("health/") and "peak" not in name]
    found, watch = told(lambda number: dict.fromkeys(names, math.nan) if number > 20 else {})
    assert found == [] and not watch.collapse


@pytest.mark.parametrize("collapsed", [UNIFORM, ONE_PROTOTYPE, SHARP], ids=["uniform", "one-prototype", "sharp"])
def test_a_collapse_is_told_once_at_its_third_record(told, collapsed: dict[str, float]):
    found, watch = told(lambda number: collapsed if number >= 40 else {})
    assert found == [42] and watch.collapse
    assert told(lambda number: collapsed if number in (40, 41, 43, 44) else {})[0] == []


@pytest.mark.parametrize("part", [{"health/class_token_std": 0.02}, {"health/dino_entropy": 0.9999}])
def test_tokens_or_targets_alone_are_no_collapse(told, part: dict[str, float]):
    found, watch = told(lambda number: part if number >= 40 else {})
    assert found == [] and not watch.collapse


def test_new_networks_may_look_collapsed_until_they_must_have_left_that(told):
    """With LayerScale at 1e-5 all class tokens begin equal."""
    assert told(lambda number: UNIFORM if number <= 20 else {}, first_step=200)[0] == []
    assert told(lambda number: UNIFORM, first_step=200)[0] == [21 + 2]
    targets_first = {"health/class_token_std": 0.02}  # is not sound yet
    assert told(lambda number: UNIFORM if 5 < number <= 20 else targets_first, last=30, first_step=200)[0] == []


def test_divergence_is_told_once_and_counts_as_a_collapse(told):
    """As with a learning rate of 50, which took the loss from 8 to 67 and left it there."""
    found, watch = told(lambda number: {"total_loss": 30.0} if number >= 5 else {})
    assert found == [14] and watch.collapse


def test_constant_losses_are_told(told):
    stands = {"dino_global_crops_of_chance": 1.00003}
    found, watch = told(
        lambda number: stands | {"dino_global_crops_of_chance": 1 + 1e-6 * (number % 3)} if number > 10 else {}
    )
    assert found == [30] and watch.collapse
