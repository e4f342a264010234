"""The training loop."""

import contextlib
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2.distributed import all_gather_rows
from dinov2.logging.metrics import HEALTH, GradNormLevel, MetricAccumulator, relative_to_chance
from dinov2.logging.sinks import Sink
from dinov2.train.health import health_of_tokens
from dinov2.train.hooks import Hook
from dinov2.train.plan.plan import RunPlan
from dinov2.train.state import TrainState
from dinov2.train.update.optim import Schedules, ScheduleValues
from dinov2.train.update.step import TrainingStep


@dataclass(kw_only=True)
class Trainer:
    """Runs the steps of a plan over batches and calls hooks around them, in order."""

    training_step: TrainingStep
    schedules: Schedules
    plan: RunPlan
    state: TrainState  # where to start
    batches: Iterable[dict[str, Any]]  # micro-batches on the device, beginning at ``state.samples``
    log_period: int  # steps per metric record
    flops: int = 0  # model arithmetic of a step on one process, for the metric ``tflops``
    sinks: Sequence[Sink] = ()  # receivers of metric records (rank 0 only; empty elsewhere)
    hooks: Sequence[Hook] = ()
    stop_asked: Callable[[], bool] = lambda: False  # whether this rank was asked to stop
    phase: Callable[..., AbstractContextManager[None]] = lambda *_, **__: contextlib.nullcontext()  # `Watchdog.phase`
    collapsed: Callable[[], bool] = lambda: False  # whether the records told this rank of a collapse that is to stop

    def __post_init__(self) -> None:
        self.guard = self.training_step.guard
        self._metrics, self._norms = MetricAccumulator(peaks=("total_loss", "grad_norm_")), GradNormLevel()
        self._paced_from: tuple[int, float] | None = None  # step and time of the first record
        self._begin_period()

    def fit(self) -> None:
        """Train to the plan's last step, or until all ranks know that one was asked to stop or saw a collapse.

        All ranks must call. A collapse shows in ``guard.collapse_agreed``.

        Raises NonFiniteError if a loss or gradient was not finite; no update was made from that step on.
        """
        with contextlib.ExitStack() as stack:
            for closable in reversed((*self.hooks, *self.sinks)):
                stack.callback(closable.close)
            for hook in self.hooks:
                hook.on_start(self.state, self.guard)
            batches = iter(self.batches)
            self._begin_period()
            first = self.state.step
            while self.state.step < self.plan.total_steps and not self._to_stop():
                asked = time.perf_counter()
                is_first = self.state.step == first
                with self.phase("waiting for a batch", is_long=is_first):
                    of_step = [next(batches) for _ in range(self.plan.accumulation)]
                self._waited += time.perf_counter() - asked
                self.guard.stop_asked = self.stop_asked()
                with self.phase("in a step", with_others=True, is_long=is_first):
                    self.train_step(of_step)
                with self.phase("saving, exporting or probing", with_others=True, is_long=True):
                    for hook in self.hooks:
                        hook.after_step(self.state, self.guard)
            self.guard.flush()
            ended = self.state.step == self.plan.total_steps
            with self.phase("saving, exporting or probing", with_others=True, is_long=True):
                for hook in self.hooks:
                    (hook.on_end if ended else hook.on_stop)(self.state, self.guard)

    def _to_stop(self) -> bool:
        return self.guard.stop_agreed or self.guard.collapse_agreed

    def train_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """One optimiser step on its micro-batches (device tensors), of which there may be one; all ranks must call."""
        values = self.schedules[self.state.step]
        due = self._record_due(self.state.step + 1)
        self.training_step.arch.measures_health = due
        metrics = self.training_step(self.state.step, batches, values)
        self.state.step += 1
        self.state.samples += self.plan.global_batch
        self._metrics.add(metrics)
        if due:
            self._record(values, torch.cat([batch["slide_ids"] for batch in batches]))
            self.guard.agree_on_collapse(self.collapsed())

    def _begin_period(self) -> None:
        self._first_step, self._start, self._waited = self.state.step, time.perf_counter(), 0.0

    def _pace(self, latest: float) -> float:
        """Seconds per step since the first record, which holds compilation; exports, probes and checkpoints count."""
        now = time.perf_counter()
        first_step, begun = self._paced_from = self._paced_from or (self.state.step, now)
        return (now - begun) / (self.state.step - first_step) if self.state.step > first_step else latest

    def _record_due(self, step: int) -> bool:
        return step % self.log_period == 0 or step == self.plan.total_steps

    def _record(self, values: ScheduleValues, slide_ids: Tensor) -> None:
        step, total, arch = self.state.step, self.plan.total_steps, self.training_step.arch
        device = arch.device
        averages = relative_to_chance(self._metrics.reduce(arch.health | health_of_tokens(arch.class_tokens)))
        # After the means, for which the host waits for the device.
        elapsed, steps = time.perf_counter() - self._start, step - self._first_step
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        record = {
            "step": step,
            "total_steps": total,
            "samples": self.state.samples,
            **averages,
            f"{HEALTH}grad_norm_of_median": self._norms.of_median(averages),
            **vars(values),
            "img_per_s": steps * self.plan.global_batch / elapsed,
            "tflops": steps * self.flops / elapsed / 1e12,
            "data_wait_pct": 100 * self._waited / elapsed,
            "eta_s": (total - step) * self._pace(elapsed / steps),
            "slides_per_batch": all_gather_rows(slide_ids).unique().numel(),
            "memory_gib": memory,  # the most so far: of tensors on a GPU, of the process on a CPU
        }
        for sink in self.sinks:
            sink.write(record)
        self._begin_period()
