"""Schedules of a run: learning rate, weight decay, teacher momentum and temperature per step."""

from __future__ import annotations

from dataclasses import dataclass

from dinov2.configs.schema import OptimConfig, TeacherConfig
from dinov2.utils.utils import CosineScheduler


@dataclass(frozen=True)
class ScheduleValues:
    """What one optimiser step runs with."""

    lr: float
    last_layer_lr: float
    wd: float
    mom: float
    teacher_temp: float


class Schedules:
    """All schedules of a run, indexed by zero-based step.

    Args:
        optim: section ``optim``; epochs are of ``epoch_steps`` steps.
        teacher: section ``teacher``.
        peak_lr: learning rate after the batch-size scaling rule.
        epoch_steps: optimiser steps per epoch.
    """

    def __init__(self, optim: OptimConfig, teacher: TeacherConfig, *, peak_lr: float, epoch_steps: int):
        total = round(optim.epochs * epoch_steps)
        warmup = round(optim.warmup_epochs * epoch_steps)
        temp_warmup = round(teacher.warmup_teacher_temp_epochs * epoch_steps)
        self.frozen_steps = round(optim.freeze_last_layer_epochs * epoch_steps)
        self.lr = CosineScheduler(peak_lr, optim.min_lr, total, warmup)
        self.wd = CosineScheduler(optim.weight_decay, optim.weight_decay_end, total)
        self.mom = CosineScheduler(teacher.momentum_teacher, teacher.final_momentum_teacher, total)
        self.teacher_temp = CosineScheduler(
            teacher.teacher_temp, teacher.teacher_temp, temp_warmup, temp_warmup, teacher.warmup_teacher_temp
        )

    def __getitem__(self, step: int) -> ScheduleValues:
        lr = self.lr[step]
        last_layer_lr = 0.0 if step < self.frozen_steps else lr
        return ScheduleValues(lr, last_layer_lr, self.wd[step], self.mom[step], self.teacher_temp[step])
