"""A step on several micro-batches: where it is the step on all images at once, and what the others see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.train.performance.apply import build_training_step
from dinov2.train.performance.capabilities import ResolvedPerformance
from dinov2.train.run import build_arch
from dinov2.train.update.guard import NonFiniteError
from dinov2.train.update.optim import ScheduleValues, build_optimizer
from dinov2.train.update.step import TrainingStep
from tests.helpers.batches import random_batch
from tests.helpers.step_reference import step_losses
from tests.helpers.training import CPU, in_precision, tiny_config

VALUES = ScheduleValues(lr=1e-3, last_layer_lr=1e-3, wd=0.04, mom=0.9, teacher_temp=0.05)
IMAGES = 8
# Losses that are means over images. Clipping bites, so that it must be of the whole gradient.
MEANS = ("train.centering=centering", "dino.kde_loss_weight=0", "dino.koleo_loss_weight=0", "optim.clip_grad=0.1")
WHOLE = "student.drop_path_rate=0"


def make_step(*overrides: str, dtype: torch.dtype = torch.float64, compiled: bool = False) -> TrainingStep:
    """A step of networks that stand apart from each other and from their special starting values."""
    config = tiny_config(*overrides)
    arch = build_arch(config, CPU, from_checkpoint=False).to(dtype)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in arch.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=noise).to(dtype)
    optimizer = build_optimizer(arch.get_params_groups(), (0.9, 0.999))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return build_training_step(arch, optimizer, scaler, ResolvedPerformance(compiled, False), IMAGES)


def parts(step: TrainingStep, number: int, of: int) -> list[dict[str, Any]]:
    """The images of a step as so many consecutive micro-batches, in the networks' dtype."""
    dtype = next(step.arch.parameters()).dtype
    return [
        {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in random_batch(step.arch.cfg, IMAGES, part, of, IMAGES * number).items()
        }
        for part in range(of)
    ]


def after_two_steps(step: TrainingStep, of: int) -> dict[str, Tensor]:
    """Losses and norms of two steps, the last gradients, and all weights, centres and moments."""
    seen: dict[str, Tensor] = {}
    for number in range(2):  # the second one with centres, moments and a teacher that have moved
        metrics = step(number, parts(step, number, of), VALUES)
        seen |= {f"{number}/{name}": value.detach().clone() for name, value in metrics.items()}
    for name, parameter in step.arch.student.named_parameters():
        seen[f"adam/{name}"] = step.weight_update.optimizer.state[parameter]["exp_avg_sq"].clone()
        seen[f"grad/{name}"] = parameter.grad.clone()
    return seen | {name: value.clone() for name, value in step.arch.state_dict().items()}


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
@pytest.mark.parametrize("head", ["true", "false"])
def test_means_over_images_are_those_of_the_large_batch(micro_batches: int, head: str):
    """In float64; Adam divides by the root of the second moment, which lifts rounding in the smallest gradients."""
    overrides = (*MEANS, WHOLE, f"ibot.separate_head={head}")
    whole = after_two_steps(make_step(*overrides), 1)
    found = after_two_steps(make_step(*overrides), micro_batches)
    assert whole.keys() == found.keys()
    assert whole["dino_loss.center"].abs().max() > 0
    for name, value in whole.items():
        # The masks' weights come in float32.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_images_that_are_looked_at_together_are_those_of_a_micro_batch():
    """Sinkhorn-Knopp, KDE and KoLeo: the step is the mean of a slow reference over the micro-batches, no other."""
    overrides = (WHOLE, "dino.kde_loss_weight=0.25", "dino.koleo_loss_weight=0.4")
    step = make_step(*overrides)
    parameters = dict(step.arch.student.named_parameters())
    centers = tuple(torch.zeros(n, dtype=torch.float64) for n in (64, 48))
    of_parts = [step_losses(step.arch, batch, 0.05, centers)[0] for batch in parts(step, 0, 2)]
    expected = {name: sum(losses[name] for losses in of_parts) / 2 for name in of_parts[0]}
    wanted = torch.autograd.grad(expected["total_loss"], list(parameters.values()))
    step.begin(0, VALUES)
    losses, _ = step.accumulate(parts(step, 0, 2), VALUES)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value.detach(), rtol=2e-7, atol=0, msg=name)
    for (name, parameter), gradient in zip(parameters.items(), wanted, strict=True):
        error = (parameter.grad - gradient).norm() / gradient.norm()
        assert error < 1e-6, (name, error)
    other = make_step(*overrides)
    other.begin(0, VALUES)
    together, _ = other.accumulate(parts(other, 0, 1), VALUES)
    for name in ("dino_local_crops_loss", "ibot_loss", "kde_loss", "koleo_loss"):
        assert abs(together[name] / losses[name] - 1) > 1e-4, name


def test_levels_of_chance_are_means_too():
    """That of iBOT follows the masks, half of all crops."""
    step = make_step(*MEANS, WHOLE)
    metrics = step(0, parts(step, 0, 4), VALUES)
    expected = torch.tensor(48.0, dtype=torch.float64).log() / 2
    assert metrics["ibot_loss_chance"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_only_the_last_micro_batch_is_measured():
    step = make_step(dtype=torch.float32)
    step.arch.measures_health = True
    batches = parts(step, 0, 2)
    step(0, batches, VALUES)
    tokens = step.arch.class_tokens.clone()
    assert len(tokens) == IMAGES // 2
    alone = make_step(dtype=torch.float32)
    alone.arch.measures_health = True
    alone(0, batches[1:], VALUES)
    assert torch.equal(tokens, alone.arch.class_tokens)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_bad_micro_batch_suppresses_the_whole_update(bad: int):
    step = make_step("optim.accumulation_steps=2", dtype=torch.float32)
    before = {name: value.clone() for name, value in step.arch.state_dict().items() if "center" not in name}
    batches = parts(step, 0, 2)
    batches[bad]["global_crops"][0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"samples 0 to 3, 4 to 7\)"):
        step(0, batches, VALUES)
    after = step.arch.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_compiled_blocks_and_low_precision_weights():
    """The graphs are those of one micro-batch; the 16-bit weights follow once a step."""
    compiled = ("debug.compile_backend=aot_eager", WHOLE)
    eager, found = (after_two_steps(make_step(*compiled, dtype=torch.float32, compiled=c), 2) for c in (False, True))
    for name in eager:
        torch.testing.assert_close(found[name], eager[name], rtol=1e-4, atol=1e-5, msg=name)
    torch.compiler.reset()
    step = make_step(*in_precision("bf16"), dtype=torch.float32)
    after_two_steps(step, 2)
    pairs = step.weight_update.low_precision
    assert pairs and all(torch.equal(weight.bfloat16(), low) for weight, low in pairs)
