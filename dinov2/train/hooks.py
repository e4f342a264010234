"""Hooks around the steps: periodic actions (checkpoint, export) and garbage collection."""

import gc
from collections.abc import Callable

from dinov2.train.state import TrainState
from dinov2.train.update.guard import FiniteGuard


class Hook:
    """Called by the trainer in the order given; every rank calls every hook. By itself it does nothing.

    Whoever writes something of the weights flushes the guard first, so that a bad step is not written as a good one.
    """

    def on_start(self, state: TrainState, guard: FiniteGuard) -> None:
        """Before the first step of this process."""

    def after_step(self, state: TrainState, guard: FiniteGuard) -> None:
        """After each step, with the state already advanced."""

    def on_end(self, state: TrainState, guard: FiniteGuard) -> None:
        """After the last step of a run that ended well."""

    def on_stop(self, state: TrainState, guard: FiniteGuard) -> None:
        """In its place where the run was asked to stop before its last step and may not have long."""

    def close(self) -> None:
        """Always, also after an error."""


class PeriodicHook(Hook):
    """Runs ``action(state)`` every ``period`` steps and at the end of the run, once per step; all ranks call it.

    ``also_stopped``: where the run is stopped before its end, too.
    """

    def __init__(self, period: int, action: Callable[[TrainState], None], also_stopped: bool = False):
        self.period, self.action, self.also_stopped = period, action, also_stopped
        self._last: int | None = None

    def on_start(self, state: TrainState, guard: FiniteGuard) -> None:
        """The step that a run resumes from has been acted on."""
        self._last = state.step

    def after_step(self, state: TrainState, guard: FiniteGuard) -> None:
        """Act when due."""
        if state.step % self.period == 0:
            self.on_end(state, guard)

    def on_end(self, state: TrainState, guard: FiniteGuard) -> None:
        """Act unless the last step already did."""
        if self._last != state.step:
            guard.flush()
            self.action(state)
            self._last = state.step

    def on_stop(self, state: TrainState, guard: FiniteGuard) -> None:
        """Act if that is wanted and the last step did not."""
        if self.also_stopped:
            self.on_end(state, guard)


class GarbageHook(Hook):
    """Collects cyclic garbage at the same step on every rank, so that no rank waits for another's collector."""

    period = 500

    def on_start(self, state: TrainState, guard: FiniteGuard) -> None:
        """Take over from the automatic collector."""
        gc.disable()
        gc.collect()

    def after_step(self, state: TrainState, guard: FiniteGuard) -> None:
        """Collect when due."""
        if state.step % self.period == 0:
            gc.collect()

    def close(self) -> None:
        """Give collection back."""
        gc.enable()
