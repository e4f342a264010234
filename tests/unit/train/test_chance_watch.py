"""The warning of losses that stay at chance: when it comes, how often, and that good runs never see it."""

from __future__ import annotations

import logging
import math

import pytest

from dinov2.logging.chance import ChanceWatch
from dinov2.train.plan.plan import make_plan
from dinov2.train.run import chance_patience
from dinov2.train.state import TrainState
from dinov2.train.update.optim import Schedules
from tests.helpers.training import tiny_config

WARM_UP, PATIENCE, PERIOD = 300, 500, 50


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture):
    """Steps at which a watch warns, of records every 50 steps whose fractions of chance a function of the step says."""

    def steps(fraction, last: int, first: int = 0, watch: ChanceWatch | None = None) -> list[int]:
        watch = watch or ChanceWatch(max(first, WARM_UP), PATIENCE)
        found = []
        for step in range(first + PERIOD, last + 1, PERIOD):
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="dinov2"):
                watch.write({"step": step, "total_loss": 9.0, "ibot_of_chance": fraction(step)})
            found += [step] * len(caplog.records)
        return found

    return steps


@pytest.mark.parametrize("level", [0.9915, 1.0, 1.38], ids=["just-below", "uniform", "sure-and-wrong"])
def test_a_loss_that_stays_is_warned_of_once_and_again_much_later(warned, level: float):
    assert warned(lambda step: level + 0.001 * math.sin(step), 10_000) == [800, 5800]


@pytest.mark.parametrize(
    "fraction",
    [
        lambda step: 1.02 - 0.1 * min(step, 300) / 300,  # leaves in the warm-up
        lambda step: 1.001 if step < 700 else 0.985,  # and a little after it
        lambda step: 0.9 + 0.5 * math.exp(-step / 1500),  # from sure and wrong predictions, slowly
        lambda step: 0.988 + 0.003 * (step % 250 == 0),  # near to chance, with noise
    ],
)
def test_a_loss_that_leaves_is_not(warned, fraction):
    assert warned(fraction, 10_000) == []


def test_a_warm_up_at_chance_is_not_warned_of(warned):
    assert warned(lambda step: 1.0, WARM_UP + PATIENCE - 1) == []


def test_a_collapse_after_learning_is_warned_of(warned):
    assert warned(lambda step: 0.9 if step <= 4000 else 1.0, 6000) == [4500]


def test_a_new_rise_is_warned_of_as_the_first(warned):
    assert warned(lambda step: 0.98 if 2000 < step <= 3000 else 1.0, 4000) == [800, 3500]


def test_a_resumed_run_is_judged_by_what_it_does_itself(warned):
    assert warned(lambda step: 1.0, 6000, first=5000) == [5000 + PERIOD + PATIENCE]
    assert warned(lambda step: 1.0, 5000 + PATIENCE, first=5000) == []
    assert warned(lambda step: 1.0, 1000, first=100) == [WARM_UP + PATIENCE]  # resumed in the warm-up
    assert warned(lambda step: 0.97, 9000, first=5000) == []


def test_each_loss_is_watched_by_itself_and_probes_are_passed_over(caplog: pytest.LogCaptureFixture):
    watch = ChanceWatch(0, 100)
    for step in (50, 100, 150, 200):
        watch.write({"step": step, "a_of_chance": 1.0, "b_of_chance": 0.9, "kde_loss": 1.0})
        watch.write({"step": step, "toy/knn/balanced_accuracy": 1.0})
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "a_of_chance" in warnings[0] and "1.000" in warnings[0]


@pytest.mark.parametrize(
    ("overrides", "resumed_at", "period", "expected"),
    [
        (("optim.epochs=200", "optim.warmup_epochs=10"), 0, 10, 1000 + 1000),
        (("optim.epochs=200", "optim.warmup_epochs=10"), 2000, 10, 2010 + 1000),
        (("optim.epochs=20", "optim.warmup_epochs=2"), 0, 10, 200 + 200),  # a tenth of the run
        (("optim.epochs=20", "optim.warmup_epochs=2"), 0, 100, 200 + 500),  # five records
        (("optim.epochs=20", "optim.warmup_epochs=2", "optim.freeze_last_layer_epochs=5"), 0, 10, 500 + 200),
    ],
)
def test_patience_of_a_run(overrides: tuple[str, ...], resumed_at: int, period: int, expected: int, caplog):
    config = tiny_config("train.OFFICIAL_EPOCH_LENGTH=100", *overrides)
    plan = make_plan(config, 1)
    schedules = Schedules(config, plan)
    watch = ChanceWatch(*chance_patience(schedules, TrainState(resumed_at), plan.total_steps, period))
    for step in range(resumed_at + period, 6000, period):
        watch.write({"step": step, "ibot_of_chance": 1.0})
        if caplog.records:
            break
    assert step == expected
