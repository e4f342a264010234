"""AdamW over DINOv2's parameter groups, and the schedules of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dinov2.configs.schedule import Schedule
from dinov2.configs.schema import Config
from dinov2.utils.utils import CosineScheduler


@dataclass(frozen=True)
class ScheduleValues:
    """Schedule values of one optimiser step."""

    lr: float
    last_layer_lr: float
    wd: float
    mom: float
    teacher_temp: float
    epoch: float = math.inf  # of the ramps of the losses' weights


class Span(Protocol):
    """Part of a run's plan that concerns its schedules."""

    peak_lr: float  # learning rate after the batch-size scaling rule
    lr_factor: float  # of that rule
    epoch_steps: int
    schedule_steps: int  # that the cosines span


@dataclass(frozen=True)
class _Course:
    """A schedule by steps in place of epochs."""

    schedule: Schedule
    total: int
    epoch_steps: int

    def __getitem__(self, step: int) -> float:
        return self.schedule.at(step / self.epoch_steps, self.total / self.epoch_steps)


class Schedules:
    """All schedules of a run, indexed by zero-based step, from sections ``optim`` and ``teacher``, or ``schedules``.

    A warm-up that is longer than the cosines is cut off with them.
    """

    def __init__(self, config: Config, plan: Span) -> None:
        optim, teacher, given = config.optim, config.teacher, config.schedules
        total, epoch_steps = plan.schedule_steps, plan.epoch_steps
        warmup = round(optim.warmup_epochs * epoch_steps)
        self.temp_warmup_steps = temp_warmup = round(teacher.warmup_teacher_temp_epochs * epoch_steps)
        self.frozen_steps = round(optim.freeze_last_layer_epochs * epoch_steps)
        self.warmup_steps, self._epoch_steps = warmup, epoch_steps
        self.lr = CosineScheduler(plan.peak_lr, optim.min_lr, max(total, warmup), warmup)
        self.wd = CosineScheduler(optim.weight_decay, optim.weight_decay_end, total)
        self.mom = CosineScheduler(teacher.momentum_teacher, teacher.final_momentum_teacher, total)
        self.teacher_temp = CosineScheduler(
            teacher.teacher_temp, teacher.teacher_temp, temp_warmup, temp_warmup, teacher.warmup_teacher_temp
        )
        if given.lr.is_given:
            self.warmup_steps = round(given.lr.warmup_epochs * epoch_steps)
            if given.lr.freeze_last_layer_epochs is not None:
                self.frozen_steps = round(given.lr.freeze_last_layer_epochs * epoch_steps)
        if given.teacher_temp.is_given:
            self.temp_warmup_steps = round(given.teacher_temp.warmup_epochs * epoch_steps)
        courses = {"wd": given.weight_decay, "mom": given.momentum, "teacher_temp": given.teacher_temp}
        for name, schedule in ({"lr": given.lr.scaled(plan.lr_factor)} | courses).items():
            if schedule.is_given:
                setattr(self, name, _Course(schedule, total, epoch_steps))

    def __getitem__(self, step: int) -> ScheduleValues:
        lr = self.lr[step]
        last_layer_lr = 0.0 if step < self.frozen_steps else lr
        epoch = step / self._epoch_steps
        return ScheduleValues(lr, last_layer_lr, self.wd[step], self.mom[step], self.teacher_temp[step], epoch)


def parameter_groups(
    modules: Mapping[str, nn.Module], layerwise_decay: float, patch_embed_lr_mult: float
) -> list[dict]:
    """Trainable parameters grouped by learning-rate factor, weight-decay factor and last-layer membership.

    The factor of a backbone's parameter is ``layerwise_decay ** (depth + 1 - layer)``, see `Backbone.layer_of`, and
    ``patch_embed_lr_mult`` times that in the patch embedding. Norms, LayerScale gains and biases are not decayed;
    tokens, the position grid and the last layer's gain are. ``modules`` are the ``backbone``, heads, and terms of the
    loss.

    Groups have the keys ``params``, ``lr_multiplier``, ``wd_multiplier`` and ``is_last_layer``.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            lr = 1.0
            if module_name == "backbone":
                lr = layerwise_decay ** (len(module.blocks) + 1 - module.layer_of(name))
                lr *= patch_embed_lr_mult if name.startswith("patch_embed") else 1.0
            undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
            key = (lr, 0.0 if undecayed else 1.0, "last_layer" in name)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "lr_multiplier": lr, "wd_multiplier": wd, "is_last_layer": last}
        for (lr, wd, last), params in groups.items()
    ]


def build_optimizer(groups: list[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW; learning rate and decay are set every step by `apply_schedule`."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def apply_schedule(optimizer: torch.optim.Optimizer, values: ScheduleValues) -> None:
    """Write the step's learning rate and weight decay into every group."""
    for group in optimizer.param_groups:
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = values.wd * group["wd_multiplier"]


def adam_state(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """AdamW's ``step``, ``exp_avg`` and ``exp_avg_sq`` by parameter name, zeros where no step was made yet.

    The tensors are the optimiser's own: filling them restores it.
    """
    names = {p: f"{module}.{name}" for module in modules for name, p in modules[module].named_parameters()}
    return {names[p]: dict(state_of(optimizer, p)) for group in optimizer.param_groups for p in group["params"]}


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter, begun as AdamW begins it."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
