"""The warnings of a run that spikes, diverges, collapses or stands still."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from dinov2.logging.metrics import HEALTH, OF_CHANCE, PEAK, RunningMedian, is_of_training
from dinov2.logging.sinks import Sink

logger = logging.getLogger("dinov2")


class Thresholds(NamedTuple):
    """What is told apart by, with what was seen on the CPU; docs/health.md has the table.

    "Sound" are runs of 40 to 60 records that learnt, "collapsed" those of base_lr 5 with a teacher temperature of 1
    and without KDE, and of base_lr 50.
    """

    # Loss: a record's peak above the median of earlier ones by so many median deviations, and by this factor. Sound
    # runs stayed below 1.06 times the median; deviations alone were up to 2.5, but become small on a plateau.
    loss_deviations: float = 10.0
    loss_factor: float = 1.25
    # Gradient norm: peak over the median of earlier ones. Sound up to 1.6, thousands at base_lr 50.
    grad_norm_of_median: float = 10.0
    # Mean loss over the lowest before. At base_lr 50 up to 9; targets that sharpen or soften move it by a third.
    divergence: float = 2.0
    # Class tokens of the teacher. Sound 0.5 to 0.83 and 5 to 8 of 16 tiles, collapsed 0.02 to 0.05 and 1.3 to 1.5.
    std: float = 0.1
    rankme: float = 1.5
    # Targets: entropy as a fraction of ln K, near 1 or near 0, and prototypes used. Sound 0.2 to 0.92; collapsed 0.9986
    # to 1 with Sinkhorn-Knopp, which spreads prototypes evenly whatever it is given.
    entropy: float = 0.005
    prototypes: float = 2.0
    # Range of a loss over 20 records, as a fraction. Sound 5e-3 and more, collapsed 3e-6 and 6e-6.
    constant: float = 1e-4


_COLLAPSED_RECORDS, _CONSTANT_RECORDS, _DIVERGED_RECORDS = 3, 20, 10  # in a row, before it is told
_RECOVERED_RECORDS = 10  # in a row without an event, before it can be told again


class HealthWatch(Sink):
    """Tells each event once, and again only after it has been over for ten records.

    Tokens and targets of new networks may look collapsed. They count from the first record on in which they do not,
    at the latest ``first_step``.

    Args:
        first_step: by which networks must have left their start.
        prototypes: number K of each term's prototypes, by ``dino`` and ``ibot``.
    """

    def __init__(self, first_step: int, prototypes: Mapping[str, int], thresholds: Thresholds | None = None) -> None:
        self.collapse = ""  # what has collapsed, in a sentence; empty as long as nothing has
        self._first_step, self._prototypes = first_step, prototypes
        self._limits = thresholds or Thresholds()
        self._loss = RunningMedian()
        self._lowest, self._was_sound = math.inf, False
        self._recent: dict[str, deque[float]] = {}
        self._in_a_row: dict[str, int] = {}
        self._records_since: dict[str, int] = {}  # of an event that was told

    def write(self, record: Mapping[str, Any]) -> None:
        """Look at a record of training."""
        if not is_of_training(record):
            return
        self._tell("loss spike", self._loss_spike(record), record)
        self._tell("gradient spike", self._gradient_spike(record), record)
        for name, find, least in (
            ("divergence", self._divergence, _DIVERGED_RECORDS),
            ("collapse", self._collapse, _COLLAPSED_RECORDS),
            ("constant loss", self._constant, 1),
        ):
            text = find(record)
            self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if text else 0
            if self._in_a_row[name] >= least:
                self._tell(name, text, record)
                self.collapse = self.collapse or text
            else:
                self._tell(name, "", record)

    def _tell(self, event: str, text: str, record: Mapping[str, Any]) -> None:
        if text:
            if event not in self._records_since:
                logger.warning("Step %d: %s", record["step"], text)
            self._records_since[event] = 0
        elif event in self._records_since:
            self._records_since[event] += 1
            if self._records_since[event] >= _RECOVERED_RECORDS:
                del self._records_since[event]

    def _loss_spike(self, record: Mapping[str, Any]) -> str:
        peak = record.get(f"{HEALTH}total_loss{PEAK}", record["total_loss"])
        median, deviation = self._loss.before(peak)
        limit = median + max(self._limits.loss_deviations * deviation, (self._limits.loss_factor - 1) * abs(median))
        if not peak > limit:
            return ""
        return (
            f"the loss jumped to {peak:.4g} from a median of {median:.4g} (told from {limit:.4g} on); it usually comes "
            "back, and where it does not or often jumps, a lower optim.base_lr or optim.clip_grad or a longer warm-up "
            "may help."
        )

    def _gradient_spike(self, record: Mapping[str, Any]) -> str:
        ratio, limit = record.get(f"{HEALTH}grad_norm_of_median", math.nan), self._limits.grad_norm_of_median
        if not ratio > limit:
            return ""
        return (
            f"a gradient norm was {ratio:.3g} times its running median (told from {limit:g} on); optim.clip_grad "
            "bounds what one step does, and where it happens often, a lower optim.base_lr may help."
        )

    def _divergence(self, record: Mapping[str, Any]) -> str:
        loss, lowest = record["total_loss"], self._lowest
        self._lowest = min(lowest, loss)
        if not (lowest > 0 and loss > self._limits.divergence * lowest):
            return ""
        return (
            f"the loss is {loss:.4g}, more than {self._limits.divergence:g} times its lowest, {lowest:.4g}, for "
            f"{_DIVERGED_RECORDS} records: training diverges; go back to an earlier checkpoint with a lower "
            "optim.base_lr."
        )

    def _collapse(self, record: Mapping[str, Any]) -> str:
        limits = self._limits
        std, rank = (record.get(HEALTH + name, math.nan) for name in ("class_token_std", "rankme"))
        tokens, targets = std < limits.std or rank < limits.rankme, self._degenerate_targets(record)
        if not (tokens and targets):
            self._was_sound = self._was_sound or (not tokens and math.isfinite(std))
            return ""
        if not self._was_sound and record["step"] <= self._first_step:
            return ""
        return (
            f"the teacher's class tokens are nearly equal (standard deviation {std:.3g}, RankMe {rank:.3g}; told below "
            f"{limits.std:g} or {limits.rankme:g}) and {targets}: the networks have collapsed; go back to an earlier "
            "checkpoint with a lower optim.base_lr, a lower teacher.teacher_temp or a larger dino.kde_loss_weight."
        )

    def _degenerate_targets(self, record: Mapping[str, Any]) -> str:
        """What is wrong with the targets of one term, in words."""
        limits = self._limits
        for term, prototypes in self._prototypes.items():
            entropy = record.get(f"{HEALTH}{term}_entropy", math.nan)
            used = record.get(f"{HEALTH}{term}_prototype_use", math.nan) * prototypes
            if entropy < limits.entropy or entropy > 1 - limits.entropy:
                bounds = f"{limits.entropy:g} to {1 - limits.entropy:g}"
                return f"its {term} targets have {entropy:.4f} of the largest entropy (sound: {bounds})"
            if used < limits.prototypes:
                return (
                    f"its {term} targets use {used:.2g} of {prototypes} prototypes (told below {limits.prototypes:g})"
                )
        return ""

    def _constant(self, record: Mapping[str, Any]) -> str:
        # Of chance, because the loss of masked patches follows the number of masks.
        still = []
        for name in record:
            if name.endswith(OF_CHANCE):
                recent = self._recent.setdefault(name, deque(maxlen=_CONSTANT_RECORDS))
                recent.append(record[name])
                held = max(recent) - min(recent) < self._limits.constant * max(recent)
                if held and len(recent) == _CONSTANT_RECORDS:
                    still.append(f"{name} at {record[name]:.4f}")
        if not still:
            return ""
        return (
            f"no change above {self._limits.constant:g} of its value for {_CONSTANT_RECORDS} records in "
            f"{', '.join(still)}: nothing is learnt; look at optim.base_lr, teacher.teacher_temp and "
            "dino.kde_loss_weight, and start from an earlier checkpoint."
        )
