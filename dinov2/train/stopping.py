"""Stopping before the last step: on a signal, at a limit of time, or before Slurm ends the job."""

import logging
import os
import re
import signal
import time
from collections.abc import Callable

from dinov2.distributed import gather_objects
from dinov2.utils.cli import RUN_AGAIN
from dinov2.utils.signals import STATUS_OF, SignalWatch

logger = logging.getLogger("dinov2")

STARTED = "PATHFM_STARTED"
"""Environment variable: seconds since 1970 at which the launcher started, which may start processes more than once."""
_SLURM_END = "SLURM_JOB_END_TIME"
_MARGIN_S = 120.0  # before Slurm's end, beside twice the longest save


class StopRequest:
    """Whether this process was asked to stop before the last step; while entered, signals ask for that.

    Args:
        hours: after the start of the launch at which training is to stop; 0: no limit.
        newest: the newest checkpoint in words, for one who cannot wait for the next.
        longest_save: seconds that the longest save of a checkpoint took, so far.
    """

    def __init__(self, hours: float, newest: Callable[[], str], longest_save: Callable[[], float]):
        self._newest, self._longest_save = newest, longest_save
        now = time.time()
        limit = _time_in(STARTED, now) + 3600 * hours if hours else float("inf")
        slurm_end = _time_in(_SLURM_END, float("inf"))
        self._ends = {"train.time_limit": limit, "Slurm": slurm_end}  # in seconds since 1970
        # On a clock that nobody sets.
        self._limit, self._slurm_end = (time.monotonic() + at - now for at in (limit, slurm_end))
        self._watch = SignalWatch(self._first_signal, self._next_signal)

    def __enter__(self) -> "StopRequest":
        self._watch.__enter__()
        for what, end in self._ends.items():
            if end < float("inf"):
                logger.info("%s ends this run at %s.", what, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end)))
        return self

    def __exit__(self, *raised: object) -> None:
        self._watch.__exit__(*raised)

    def asked(self) -> bool:
        """Whether to stop, by what this process knows."""
        return self._reason() is not None

    def agreed_reason(self) -> tuple[str, int]:
        """What the first rank that was asked was asked by, and the exit status for it; all ranks must call."""
        return next(reason for reason in gather_objects(self._reason()) if reason is not None)

    def _reason(self) -> tuple[str, int] | None:
        if (number := self._watch.received) is not None:
            return number.name, STATUS_OF[number]
        if time.monotonic() > self._limit:
            return "train.time_limit", RUN_AGAIN
        if time.monotonic() > self._slurm_end - _MARGIN_S - 2 * self._longest_save():
            return "the end of the Slurm job", RUN_AGAIN
        return None

    def _first_signal(self, number: signal.Signals) -> None:
        logger.info("%s: stopping after this step and a checkpoint; once more ends at once.", number.name)

    def _next_signal(self) -> None:
        logger.error("Ended at once; %s", self._newest())


def _time_in(variable: str, otherwise: float) -> float:
    """Whole seconds since 1970 that the environment states; what is none, or after the year 5000, is not one."""
    text = os.environ.get(variable, "")
    return float(text) if re.fullmatch("[0-9]{1,11}", text) else otherwise
