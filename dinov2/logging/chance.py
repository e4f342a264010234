"""The warning of a run whose losses stay at chance."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from dinov2.logging.metrics import OF_CHANCE
from dinov2.logging.sinks import Sink

logger = logging.getLogger("dinov2")

# Of chance. On real tiles, losses of runs that learnt nothing were seen at 0.992 to 0.998, of others at 0.87 to 0.986.
_STUCK = 0.99
_PROGRESS = 0.01  # random predictions may be sure and wrong, 1.4 times chance, and take long to become uniform
_REPEAT = 10  # in units of the patience


class ChanceWatch(Sink):
    """Warns of each loss that stays at chance or above, then again after ten times the patience at the earliest.

    It stays there where no record of the last ``patience`` steps after ``first_step`` is below 0.99, or by 0.01 below
    the lowest one before. That is the step that the process goes on from, or at which the last warm-up ends, whichever
    is later: what was seen before a resume is not known, and the wait begins anew.
    """

    def __init__(self, first_step: int, patience: int) -> None:
        self._first_step, self._patience = first_step, patience
        self._lowest: dict[str, float] = {}
        self._due: dict[str, int] = {}  # step from which on a loss is warned of

    def write(self, record: Mapping[str, Any]) -> None:
        """Look at a record; those of probes hold nothing of the kind."""
        step = record["step"]
        for name, fraction in record.items():
            if not name.endswith(OF_CHANCE):
                continue
            lowest = self._lowest.get(name, math.inf)
            if fraction < max(_STUCK, lowest - _PROGRESS):
                self._lowest[name] = min(lowest, fraction)
                self._due[name] = max(step, self._first_step) + self._patience
            elif step >= self._due[name]:
                self._due[name] = step + _REPEAT * self._patience
                logger.warning(
                    "%s is %.3f at step %d and has not gone below %.2f for %d steps after the warm-up: the student "
                    "predicts nothing of the teacher's targets; weaker augmentation or another learning rate may help.",
                    name, fraction, step, _STUCK, self._patience,
                )  # fmt: skip
