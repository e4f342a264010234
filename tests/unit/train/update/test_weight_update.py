"""Clipping, AdamW, moving average and copies equal the published formulas and PyTorch's functions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from dinov2.train.update.weight_update import WeightUpdate, ema_update
from tests.helpers.weight_updates import (
    MODULES,
    assert_near,
    formula,
    networks,
    optimizer_of,
    run,
    set_rates,
    steps,
)

ROUNDING = 1e-6  # of a few float32 operations, each of relative error 2^-24


@pytest.mark.parametrize("max_norm", [3.0, 1e3, 0.0])
def test_equals_the_formulas(max_norm: float):
    assert_near(run(WeightUpdate, steps(), max_norm), formula(steps(), max_norm), ROUNDING)


def test_equals_the_librarys_clip_adamw_and_lerp():
    script = steps()
    student, teacher = networks()
    optimizer = optimizer_of(student, fused=False, foreach=False)
    for step in script:
        set_rates(optimizer, student, step)
        for name, parameter in student.named_parameters():
            gradient = step.gradients[name]
            parameter.grad = None if gradient is None else gradient.clone()
        for module in student.values():
            nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            for name, theirs in teacher.named_parameters():
                ours = student.get_parameter(name)
                theirs.lerp_(ours, 1 - step.momentum)
    expected = {f"student.{name}": p.detach() for name, p in student.named_parameters()}
    expected |= {f"teacher.{name}": p for name, p in teacher.named_parameters()}
    found = run(WeightUpdate, script)
    assert_near({name: found[name] for name in expected}, expected, ROUNDING)


@pytest.mark.parametrize("bad", [0, 3])
def test_a_bad_step_changes_nothing(bad: int):
    script = steps()
    script[bad] = dataclasses.replace(script[bad], all_finite=0.0)
    found, expected = run(WeightUpdate, script), formula(script)
    assert_near(found, expected, ROUNDING)
    assert found["step.backbone.weight"] == len(script) - 1


def test_a_gradient_that_is_not_finite_is_kept_out_by_the_flag():
    script = steps(2)
    poisoned = {name: None if g is None else g * float("nan") for name, g in script[1].gradients.items()}
    script[1] = dataclasses.replace(script[1], gradients=poisoned, all_finite=0.0)
    found, before = run(WeightUpdate, script), run(WeightUpdate, script[:1])
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    assert found["norm.1.backbone"].isnan()


def test_a_module_without_gradients_has_norm_zero():
    student, teacher = networks()
    update = WeightUpdate(optimizer_of(student), student, teacher, 3.0)
    assert {name: norm.item() for name, norm in update.grad_norms().items()} == dict.fromkeys(MODULES, 0.0)
    before = [p.clone() for p in student.parameters()]
    update.apply(0.5, torch.ones(()))
    assert all(torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))


def test_norms_are_taken_anew_for_every_step():
    """`apply` without `grad_norms` must not clip by the norm of the step before."""
    student, teacher = networks()
    update = WeightUpdate(optimizer_of(student), student, teacher, 1.0)
    weight = student["backbone"].weight
    for factor in (1.0, 100.0):
        weight.grad = factor * torch.ones_like(weight)
        if factor == 1.0:
            update.grad_norms()
        update.apply(0.5, torch.ones(()))
        assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_copies_are_rounded_weights_of_student_and_teacher():
    def low_precision(student: nn.ModuleDict, teacher: nn.ModuleDict) -> list[tuple[Tensor, Tensor]]:
        pairs = [(student["backbone"].weight, torch.bfloat16), (teacher["backbone"].weight, torch.float16)]
        return [(weight, torch.empty_like(weight, dtype=dtype)) for weight, dtype in pairs]

    found = run(WeightUpdate, steps(2), low_precision=low_precision)
    assert torch.equal(found["copy.0"], found["student.backbone.weight"].bfloat16())
    assert torch.equal(found["copy.1"], found["teacher.backbone.weight"].half())


@pytest.mark.parametrize("overflows", [False, True])
def test_a_loss_scaler_unscales_and_skips_an_overflow(overflows: bool):
    student, teacher = networks()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = optimizer_of(student)
    update = WeightUpdate(optimizer, student, teacher, 0.0, scaler=scaler)
    (step,) = steps(1)
    set_rates(optimizer, student, step)
    weight = student["backbone"].weight
    before = weight.detach().clone()
    scaler.scale((weight * step.gradients["backbone.weight"]).sum()).backward()
    if overflows:
        weight.grad[0, 0] = float("inf")
    norm = update.grad_norms()["backbone"]
    update.apply(0.5, torch.ones(()))
    assert torch.equal(weight, before) == overflows
    assert scaler.get_scale() == (4.0 if overflows else 8.0)
    if not overflows:
        assert norm.item() == pytest.approx(step.gradients["backbone.weight"].norm().item(), rel=1e-5)


def test_moving_average():
    student, teacher = networks()
    expected = [0.75 * t + 0.25 * student.get_parameter(n) for n, t in teacher.named_parameters()]
    ema_update(student, teacher, 0.25)
    for parameter, value in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)
    ema_update(student, teacher, torch.tensor(1.0))
    assert all(torch.equal(student.get_parameter(name), t) for name, t in teacher.named_parameters())
