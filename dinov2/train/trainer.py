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

from dinov2.distributed import all_gather_rows
from dinov2.logging.metrics import MetricAccumulator
from dinov2.logging.sinks import Sink
from dinov2.train.hooks import Hook
from dinov2.train.plan.plan import RunPlan
from dinov2.train.state import TrainState
from dinov2.train.update.schedules import Schedules, ScheduleValues
from dinov2.train.update.step import TrainingStep


class Trainer:
    """Runs the steps of a plan over batches and calls hooks around them.

    Args:
        training_step: what is done with each batch.
        schedules: values per step.
        plan: derived figures of the run.
        state: where to start.
        batches: batch dicts on the device, beginning at ``state.samples``.
        log_period: steps per metric record.
        flops: model arithmetic of a step on one process, for the metric ``tflops``.
        sinks: receivers of metric records (rank 0 only; empty elsewhere).
        hooks: called around the steps, in order.
    """

    def __init__(
        self,
        *,
        training_step: TrainingStep,
        schedules: Schedules,
        plan: RunPlan,
        state: TrainState,
        batches: Iterable[dict[str, Any]],
        log_period: int,
        flops: int = 0,
        sinks: Sequence[Sink] = (),
        hooks: Sequence[Hook] = (),
    ):
        self.training_step = training_step
        self.guard = training_step.guard
        self.schedules = schedules
        self.plan = plan
        self.state = state
        self._batches = batches
        self._log_period = log_period
        self._flops = flops
        self._sinks = sinks
        self._hooks = hooks
        self._metrics = MetricAccumulator()
        self._period = _Period(0)

    def fit(self) -> None:
        """Train to the plan's last step; all ranks must call.

        Raises:
            NonFiniteError: if a loss or gradient was not finite; no update was made from that step on.
        """
        with contextlib.ExitStack() as stack:
            for closable in reversed((*self._hooks, *self._sinks)):
                stack.callback(closable.close)
            for hook in self._hooks:
                hook.on_start(self.state, self.guard)
            batches = iter(self._batches)
            self._period = _Period(self.state.step)
            while self.state.step < self.plan.total_steps:
                asked = time.perf_counter()
                batch = next(batches)
                self._period.waited += time.perf_counter() - asked
                self.train_step(batch)
                for hook in self._hooks:
                    hook.after_step(self.state, self.guard)
            self.guard.flush()
            for hook in self._hooks:
                hook.on_end(self.state, self.guard)

    def train_step(self, batch: dict[str, Any]) -> None:
        """One optimiser step on one batch (device tensors); all ranks must call."""
        values = self.schedules[self.state.step]
        metrics = self.training_step(self.state.step, batch, values)
        self.state.step += 1
        self.state.samples += self.plan.global_batch
        self._log(metrics, values, batch["slide_ids"])

    def _log(self, metrics: dict[str, Tensor], values: ScheduleValues, slide_ids: Tensor) -> None:
        self._metrics.add(metrics)
        step = self.state.step
        if step % self._log_period and step != self.plan.total_steps:
            return
        record = {"step": step, "total_steps": self.plan.total_steps, **self._metrics.reduce(), **vars(values)}
        record |= self._period.speed(step, self.plan, self._flops)
        record["slides_per_batch"] = all_gather_rows(slide_ids).unique().numel()
        record["memory_gib"] = peak_memory_gib(self.training_step.arch.device)
        for sink in self._sinks:
            sink.write(record)
        self._period = _Period(step)


@dataclass
class _Period:
    """Wall time since ``first_step``, and the part of it spent waiting for data, in seconds."""

    first_step: int
    waited: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def speed(self, step: int, plan: RunPlan, flops: int) -> dict[str, float]:
        elapsed, steps = time.perf_counter() - self.start, step - self.first_step
        return {
            "img_per_s": steps * plan.global_batch / elapsed,
            "tflops": steps * flops / elapsed / 1e12,
            "data_wait_pct": 100 * self.waited / elapsed,
            "eta_s": (plan.total_steps - step) * elapsed / steps,
        }


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated by tensors on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
