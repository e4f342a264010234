"""The loop: what reaches the optimiser when, metrics per period, hooks, clean-up, device randomness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from dinov2.train.hooks import CheckpointHook, PeriodicHook
from dinov2.train.state import TrainState
from dinov2.train.update.guard import FiniteGuard, NonFiniteError
from tests.helpers.training import differing, make_trainer, random_batches, tiny_config, whole_state

STEPS, EPOCH = 8, 4
CONFIG = tiny_config("optim.freeze_last_layer_epochs=1")
LIGHT = tiny_config("crops.local_crops_number=0", "dino.head_hidden_dim=16", "ibot.separate_head=false")


class Records:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = 0

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))

    def close(self) -> None:
        self.closed += 1


class Journal:
    """A hook that writes into a shared list what is called when."""

    def __init__(self, name: str, entries: list[tuple[str, str, int]]):
        self.name, self.entries, self.step = name, entries, -1

    def _note(self, event: str, state: TrainState) -> None:
        self.entries.append((self.name, event, state.step))

    def on_start(self, state: TrainState, guard: FiniteGuard) -> None:
        self._note("start", state)

    def after_step(self, state: TrainState, guard: FiniteGuard) -> None:
        self._note("step", state)

    def on_end(self, state: TrainState, guard: FiniteGuard) -> None:
        self._note("end", state)

    def on_stop(self, state: TrainState, guard: FiniteGuard) -> None:
        self._note("stop", state)

    def close(self) -> None:
        self.entries.append((self.name, "close", self.step))


def cosine(start: float, end: float, position: int, span: int) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * position / span))


def test_schedule_values_reach_optimiser_teacher_and_losses_at_their_step():
    optim, teacher = CONFIG.optim, CONFIG.teacher
    trainer = make_trainer(CONFIG, sinks=[sink := Records()])
    temperatures: list[float] = []
    compute = trainer.training_step.arch.compute_losses

    def compute_losses(batch: dict, teacher_temp: float, epoch: float) -> dict:
        temperatures.append(teacher_temp)
        return compute(batch, teacher_temp, epoch)

    trainer.training_step.arch.compute_losses = compute_losses
    peak = optim.base_lr * math.sqrt(8 / 1024)
    for step, batch in enumerate(random_batches(CONFIG, 0, STEPS)):
        before = whole_state(trainer)
        trainer.train_step([batch])
        after = whole_state(trainer)
        # Warm-up over the first epoch, last layers frozen during it, a cosine over the second.
        lr = peak * step / (EPOCH - 1) if step < EPOCH else cosine(peak, optim.min_lr, step - EPOCH, EPOCH)
        wd = cosine(optim.weight_decay, optim.weight_decay_end, step, STEPS)
        mom = cosine(teacher.momentum_teacher, teacher.final_momentum_teacher, step, STEPS)
        for group in trainer.training_step.weight_update.optimizer.param_groups:
            frozen = group["is_last_layer"] and step < EPOCH
            assert group["lr"] == pytest.approx(0.0 if frozen else lr * group["lr_multiplier"], abs=1e-12)
            assert group["weight_decay"] == pytest.approx(wd * group["wd_multiplier"])
        warm = min(step / (EPOCH - 1), 1.0)
        temp = teacher.warmup_teacher_temp + (teacher.teacher_temp - teacher.warmup_teacher_temp) * warm
        assert temperatures[step] == pytest.approx(temp)
        record = {"step": step + 1, "lr": lr, "wd": wd, "mom": mom, "teacher_temp": temp}
        assert {key: sink.records[step][key] for key in record} == pytest.approx(record)
        changed = set(differing(before, after))
        for head in ("dino_head", "ibot_head"):
            for gain in ("weight_g", "weight_v"):
                assert (f"student.{head}.last_layer.{gain}" in changed) == (step >= EPOCH), (head, gain, step)
            assert (f"student.{head}.mlp.0.weight" in changed) == (step > 0)  # the first rate is 0
        name = "backbone.blocks.1.attn.qkv.weight"
        # The student as this step left it, not as it was before.
        expected = mom * before[f"teacher.{name}"].double() + (1 - mom) * after[f"student.{name}"].double()
        torch.testing.assert_close(after[f"teacher.{name}"].double(), expected, rtol=1e-6, atol=1e-8)


def test_gradients_are_clipped_per_module_before_the_update():
    """The norms that are logged are those before clipping; what the optimiser sees is within the bound."""
    trainer = make_trainer(tiny_config("optim.clip_grad=0.01"), sinks=[sink := Records()])
    trainer.train_step(random_batches(CONFIG, 0, 1))
    for name, module in trainer.training_step.arch.student.items():
        seen = torch.cat([p.grad.double().flatten() for p in module.parameters()]).norm()
        assert sink.records[0][f"grad_norm_{name}"] > 0.011
        assert seen.item() == pytest.approx(0.01, rel=1e-3)


def test_metrics_are_means_of_their_period_and_the_last_one_may_be_short():
    every, third = Records(), Records()
    for sink, period in ((every, 1), (third, 3)):
        make_trainer(CONFIG, sinks=[sink], log_period=period).fit()
    assert [record["step"] for record in third.records] == [3, 6, 8]
    terms = ("total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "kde_loss",
             "koleo_loss", "grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head")  # fmt: skip
    for record, steps in zip(third.records, ((1, 2, 3), (4, 5, 6), (7, 8)), strict=True):
        for term in terms:
            mean = sum(every.records[step - 1][term] for step in steps) / len(steps)
            assert record[term] == pytest.approx(mean, rel=1e-5), term
        assert record["lr"] == every.records[steps[-1] - 1]["lr"]
        assert record["total_steps"] == STEPS


def test_losses_are_logged_relative_to_chance():
    """Uniform predictions of the two heads' 64 and 48 prototypes, two local views, half of the crops masked."""
    sink = Records()
    make_trainer(CONFIG, sinks=[sink], log_period=4).fit()
    pairs, fraction = 2 * 2 + 2, 0.5
    levels = {
        "dino_local_crops": 4 / pairs * math.log(64),
        "dino_global_crops": 2 / pairs * math.log(64),
        "ibot": fraction * math.log(48),
    }
    for record in sink.records:
        for term, level in levels.items():
            assert record[f"{term}_of_chance"] == pytest.approx(record[f"{term}_loss"] / level, rel=1e-5), term
        assert {name for name in record if "chance" in name} == {f"{term}_of_chance" for term in levels}


def test_the_weight_of_kde_is_ramped_in():
    config = tiny_config("dino.kde_ramp_epochs=[0.5,1.5]", "dino.kde_loss_weight=0.4")
    make_trainer(config, sinks=[sink := Records()]).fit()
    for step, record in enumerate(sink.records):
        terms = sum(record[f"{name}_loss"] for name in ("dino_local_crops", "dino_global_crops", "ibot"))
        kde = 0.4 * min(max(step / EPOCH - 0.5, 0), 1) * record["kde_loss"]
        total = terms + kde + config.dino.koleo_loss_weight * record["koleo_loss"]
        assert record["total_loss"] == pytest.approx(total, rel=1e-5)
        assert record["epoch"] == step / EPOCH


def test_hooks_run_in_their_order_and_see_the_advanced_state():
    entries: list[tuple[str, str, int]] = []
    hooks = [Journal("a", entries), Journal("b", entries)]
    trainer = make_trainer(LIGHT, state=TrainState(6, 48), hooks=hooks, sinks=[sink := Records()])
    trainer.fit()
    expected = [("start", 6), ("step", 7), ("step", 8), ("end", 8), ("close", -1)]
    assert entries == [(name, event, step) for event, step in expected for name in ("a", "b")]
    assert (trainer.state.step, trainer.state.samples) == (8, 64)
    assert sink.closed == 1


def acted(period: int, start: int = 0) -> list[int]:
    steps: list[int] = []
    hook = PeriodicHook(period, lambda state: steps.append(state.step))
    make_trainer(LIGHT, state=TrainState(start, 8 * start), hooks=[hook]).fit()
    return steps


def test_periodic_actions_come_once_per_step_and_at_the_end():
    assert acted(3) == [3, 6, 8]
    assert acted(4) == [4, 8]  # not twice at the end
    assert acted(100) == [8]
    assert acted(4, start=6) == [8]
    assert acted(1, start=6) == [7, 8]


def test_a_run_that_is_asked_to_stop_ends_after_that_step_with_what_is_wanted_then():
    entries: list[tuple[str, str, int]] = []
    saved: list[int] = []
    exported: list[int] = []
    hooks = [PeriodicHook(100, lambda state: exported.append(state.step)), Journal("a", entries)]
    hooks.append(CheckpointHook(100, lambda state: saved.append(state.step), finish=lambda: None))
    trainer = make_trainer(LIGHT, hooks=hooks)
    trainer.stop_asked = lambda: trainer.state.step == 2  # before the third step, and never again
    trainer.fit()
    assert (saved, exported) == ([3], [])
    assert [event for _, event, _ in entries] == ["start", "step", "step", "step", "stop", "close"]


FIGURES = {"class_token_std", "rankme", "grad_norm_of_median", "total_loss_peak"} | {
    f"{term}_{figure}" for term in ("dino", "ibot") for figure in ("entropy", "prototype_use")
}


def test_records_hold_figures_of_health_and_only_their_steps_are_measured(monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer(LIGHT, sinks=[sink := Records()], log_period=3)
    measured: list[int] = []
    compute = trainer.training_step.arch.compute_losses

    def compute_losses(*args: Any) -> dict:
        if trainer.training_step.arch.measures_health:
            measured.append(trainer.state.step + 1)
        return compute(*args)

    monkeypatch.setattr(trainer.training_step.arch, "compute_losses", compute_losses)
    trainer.fit()
    assert measured == [record["step"] for record in sink.records] == [3, 6, 8]
    for record in sink.records:
        assert record.keys() >= {f"health/{name}" for name in FIGURES}
        assert 0 < record["health/dino_entropy"] <= 1 and 1 <= record["health/rankme"] <= 8
        assert record["health/total_loss_peak"] >= record["total_loss"]


def test_a_collapse_ends_the_run_at_its_record_and_nothing_of_it_is_saved():
    saved: list[int] = []
    trainer = make_trainer(LIGHT, sinks=[sink := Records()], log_period=2)
    trainer.collapsed = lambda: sink.records[-1]["step"] == 6
    trainer.hooks = [CheckpointHook(3, lambda state: saved.append(state.step), finish=lambda: None)]
    trainer.fit()
    assert (trainer.state.step, saved, trainer.guard.collapse_agreed) == (6, [3], True)


def test_a_collapse_at_the_last_step_is_not_saved_either():
    saved: list[int] = []
    hooks = [CheckpointHook(100, lambda state: saved.append(state.step), finish=lambda: None)]
    make_trainer(LIGHT, hooks=hooks, collapsed=lambda: True, log_period=100).fit()
    assert saved == []


def test_a_finished_run_that_is_started_again_does_nothing():
    assert acted(3, start=STEPS) == []


def test_a_periodic_action_never_records_a_bad_step():
    """The guard is asked before the action, not a few steps later."""
    steps: list[int] = []
    trainer = make_trainer(LIGHT, hooks=[PeriodicHook(1, lambda state: steps.append(state.step))])
    compute = trainer.training_step.arch.compute_losses

    def compute_losses(*args: Any) -> dict:
        losses = compute(*args)
        return losses | {"total_loss": losses["total_loss"] / (0.0 if trainer.state.step == 2 else 1.0)}

    trainer.training_step.arch.compute_losses = compute_losses
    with pytest.raises(NonFiniteError, match="Step 3 is not finite on rank 0"):
        trainer.fit()
    assert steps == [1, 2]


def failing_after(batches: list[dict], error: Exception) -> Iterator[dict]:
    yield from batches
    raise error


def test_hooks_and_sinks_are_closed_when_a_step_fails():
    entries: list[tuple[str, str, int]] = []
    sinks = [Records(), Records()]
    batches = failing_after(random_batches(LIGHT, 0, 2), OSError("the disk is gone"))
    trainer = make_trainer(LIGHT, batches=batches, hooks=[Journal("a", entries), Journal("b", entries)], sinks=sinks)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit()
    assert [entry[:2] for entry in entries[-2:]] == [("a", "close"), ("b", "close")]
    assert ("a", "end", 2) not in entries
    assert [sink.closed for sink in sinks] == [1, 1]
    assert len(sinks[0].records) == 2


def test_a_save_under_way_is_waited_for_at_the_end_and_after_an_error():
    """Its failure ends a run that would end well, and does not hide the error of one that does not."""
    entries: list[str] = []

    def finish() -> None:
        entries.append("finish")

    def fails() -> None:
        raise OSError("no room")

    saving = CheckpointHook(3, lambda state: entries.append(f"save {state.step}"), finish)
    make_trainer(LIGHT, state=TrainState(4, 32), hooks=[saving]).fit()
    assert entries[:3] == ["save 6", "save 8", "finish"]
    with pytest.raises(OSError, match="no room"):
        make_trainer(LIGHT, state=TrainState(7, 56), hooks=[CheckpointHook(3, lambda state: None, fails)]).fit()
    for end in (finish, fails):
        entries.clear()
        batches = failing_after(random_batches(LIGHT, 0, 1), ValueError("a broken file"))
        with pytest.raises(ValueError, match="a broken file"):
            make_trainer(LIGHT, batches=batches, hooks=[CheckpointHook(3, lambda state: None, end)]).fit()
        assert entries == (["finish"] if end is finish else [])


def test_one_hook_that_cannot_be_closed_does_not_keep_the_others_open():
    class Broken(Journal):
        def close(self) -> None:
            raise OSError("cannot be closed")

    entries: list[tuple[str, str, int]] = []
    hooks, sink = [Broken("a", entries), Journal("b", entries)], Records()
    with pytest.raises(OSError, match="cannot be closed"):
        make_trainer(LIGHT, state=TrainState(7, 56), hooks=hooks, sinks=[sink]).fit()
    assert entries[-1] == ("b", "close", -1)
    assert sink.closed == 1


def first_losses(seed: int, step: int, disturb: int) -> list[float]:
    """Losses of two steps with strong stochastic depth, the same batch and weights whatever the step."""
    config = tiny_config("student.drop_path_rate=0.5", "teacher.teacher_temp=0.04", "optim.base_lr=1e-30")
    batch = random_batches(config, 0, 1)[0]
    state = TrainState(step, 8 * step)
    trainer = make_trainer(config, batches=[batch] * 2, state=state, sinks=[sink := Records()])
    trainer.training_step.seed = seed  # of the step alone: the weights stay
    torch.manual_seed(disturb)  # left over from whatever ran before
    for _ in range(2):
        trainer.train_step([batch])
    return [record["total_loss"] for record in sink.records]


def test_device_randomness_is_a_function_of_seed_and_step_alone():
    reference = first_losses(seed=0, step=2, disturb=1)
    assert first_losses(seed=0, step=2, disturb=2) == reference
    assert first_losses(seed=0, step=3, disturb=1)[0] == reference[1]  # a resume draws what would have come
    assert reference[0] != reference[1]
    assert first_losses(seed=1, step=2, disturb=1)[0] != reference[0]
