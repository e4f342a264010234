"""The training loop."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dinov2.distributed import all_gather_rows, get_global_rank
from dinov2.logging.metrics import MetricAccumulator
from dinov2.logging.sinks import Sink
from dinov2.train.guard import FiniteGuard
from dinov2.train.hooks import Hook
from dinov2.train.optim import apply_schedule, clip_by_module
from dinov2.train.plan import RunPlan
from dinov2.train.schedules import Schedules, ScheduleValues
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.state import TrainState
from dinov2.utils.seeding import step_seed


class Trainer:
    """Runs the steps of a plan over batches and calls hooks around them.

    Args:
        arch: student, teacher and losses, on their device.
        optimizer: fused AdamW over the student.
        scaler: loss scaler; disabled where nothing computes in fp16.
        schedules: values per step.
        plan: derived figures of the run.
        state: where to start.
        batches: batch dicts on the device, beginning at ``state.samples``.
        seed: of the device's random numbers.
        clip_grad: largest gradient norm per module; 0 clips nothing.
        log_period: steps per metric record.
        sinks: receivers of metric records (rank 0 only; empty elsewhere).
        hooks: called around the steps, in order.
    """

    def __init__(
        self,
        *,
        arch: SSLMetaArch,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        schedules: Schedules,
        plan: RunPlan,
        state: TrainState,
        batches: Iterable[dict[str, Any]],
        seed: int,
        clip_grad: float,
        log_period: int,
        sinks: Sequence[Sink] = (),
        hooks: Sequence[Hook] = (),
    ):
        self.arch = arch
        self.optimizer = optimizer
        self.scaler = scaler
        self.schedules = schedules
        self.plan = plan
        self.state = state
        self.guard = FiniteGuard(arch.device, plan.global_batch)
        self._batches = batches
        self._seed = seed
        self._clip_grad = clip_grad
        self._log_period = log_period
        self._sinks = sinks
        self._hooks = hooks
        self._metrics = MetricAccumulator()
        self._period = _Period(0)

    def fit(self) -> None:
        """Train to the plan's last step; all ranks must call.

        Raises:
            NonFiniteError: a loss or gradient was not finite; no update was made from that step on.
        """
        with contextlib.ExitStack() as stack:
            for closable in reversed((*self._hooks, *self._sinks)):
                stack.callback(closable.close)
            for hook in self._hooks:
                hook.on_start(self)
            batches = iter(self._batches)
            self._period = _Period(self.state.step)
            while self.state.step < self.plan.total_steps:
                asked = time.perf_counter()
                batch = next(batches)
                self._period.waited += time.perf_counter() - asked
                self.train_step(batch)
                for hook in self._hooks:
                    hook.after_step(self)
            self.guard.flush()
            for hook in self._hooks:
                hook.on_end(self)

    def train_step(self, batch: dict[str, Any]) -> None:
        """One optimiser step on one batch (device tensors); all ranks must call."""
        step = self.state.step
        values = self.schedules[step]
        apply_schedule(self.optimizer, values)
        torch.manual_seed(step_seed(self._seed, step, get_global_rank()))
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.arch.compute_losses(batch, values.teacher_temp)
        # A loss scaler skips an update for the sake of its gradients alone. Dividing by zero makes them non-finite
        # where the loss is, and after a bad step; in health it divides by one.
        healthy = self.guard.healthy * torch.isfinite(losses["total_loss"])
        self.scaler.scale(losses["total_loss"] / healthy).backward()
        self.scaler.unscale_(self.optimizer)
        norms = clip_by_module(self.arch.student, self._clip_grad)
        # A non-finite gradient under a loss scaler is an overflow, which the scaler handles by itself.
        self.guard.observe(step, losses, {} if self.scaler.is_enabled() else norms)
        self._update(values.mom)
        self.state.step += 1
        self.state.samples += self.plan.global_batch
        metrics = {**losses, **{f"grad_norm_{name}": norm for name, norm in norms.items()}}
        self._log(metrics, values, batch["slide_ids"])

    def _update(self, momentum: float) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.found_inf = 1 - self.guard.healthy  # fused AdamW skips its update where this is 1
            self.optimizer.step()
        self.arch.update_teacher(momentum, self.guard.healthy)

    def _log(self, metrics: dict[str, Tensor], values: ScheduleValues, slide_ids: Tensor) -> None:
        self._metrics.add(metrics)
        step = self.state.step
        if step % self._log_period and step != self.plan.total_steps:
            return
        record = {
            "step": step,
            "total_steps": self.plan.total_steps,
            **self._metrics.reduce(),
            **vars(values),
        }
        record |= self._period.speed(step, self.plan)
        record["slides_per_batch"] = all_gather_rows(slide_ids).unique().numel()
        record["memory_gib"] = peak_memory_gib(self.arch.device)
        for sink in self._sinks:
            sink.write(record)
        self._period = _Period(step)


@dataclass
class _Period:
    """Wall time since ``first_step``, and the part of it spent waiting for data, in seconds."""

    first_step: int
    waited: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def speed(self, step: int, plan: RunPlan) -> dict[str, float]:
        elapsed, steps = time.perf_counter() - self.start, step - self.first_step
        return {
            "img_per_s": steps * plan.global_batch / elapsed,
            "data_wait_pct": 100 * self.waited / elapsed,
            "eta_s": (plan.total_steps - step) * elapsed / steps,
        }


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated by tensors on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
