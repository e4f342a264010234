"""Hooks around the steps: periodic actions (checkpoint, export) and garbage collection."""

import gc
import logging
from collections.abc import Callable

from dinov2.distributed import MainProcessError
from dinov2.train.state import TrainState
from dinov2.train.update.guard import FiniteGuard

logger = logging.getLogger("dinov2")


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

    Not of a collapse that stops the run: what was saved before stays the newest.
    """

    def __init__(self, period: int, action: Callable[[TrainState], None]):
        self.period, self.action = period, action
        self._last: int | None = None

    def on_start(self, state: TrainState, guard: FiniteGuard) -> None:
        """The step that a run resumes from has been acted on."""
        self._last = state.step

    def after_step(self, state: TrainState, guard: FiniteGuard) -> None:
        """Act when due."""
        if state.step % self.period == 0:
            self._act(state, guard)

    def on_end(self, state: TrainState, guard: FiniteGuard) -> None:
        """Act unless the last step already did."""
        self._act(state, guard)

    def _act(self, state: TrainState, guard: FiniteGuard) -> None:
        if self._last != state.step and not guard.collapse_agreed:
            guard.flush()
            self.action(state)
            self._last = state.step


class CheckpointHook(PeriodicHook):
    """Saves as a `PeriodicHook`, and where a run is stopped; ``finish`` waits for a save that is under way."""

    def __init__(self, period: int, action: Callable[[TrainState], None], finish: Callable[[], None]):
        super().__init__(period, action)
        self._finish = finish

    def on_end(self, state: TrainState, guard: FiniteGuard) -> None:
        """Save unless the last step already did, and wait until it is on the disk."""
        super().on_end(state, guard)
        self._finish()

    def on_stop(self, state: TrainState, guard: FiniteGuard) -> None:
        """The same."""
        self.on_end(state, guard)

    def close(self) -> None:
        """After an error, let the save that is under way come to its end."""
        try:
            self._finish()
        except MainProcessError:
            pass  # rank 0 says it
        except OSError as error:  # beside the error that ended training
            logger.error("%s", error)


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
