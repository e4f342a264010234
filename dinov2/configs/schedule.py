"""Courses of a value over a run, as sections of the configuration."""

import dataclasses
import math
from dataclasses import dataclass

from dinov2.configs.fields import key


@dataclass(frozen=True)
class Schedule:
    """Linear from ``start`` to ``peak``, then half a cosine to ``end``, which stays; none while ``peak`` is null.

    As DINOv3's section ``schedules``, but that its cosines reach their end one step earlier.
    """

    start: float | None = key(None, "value at the first step; null: peak", least=0)
    peak: float | None = key(None, "after the warm-up; null: no schedule of its own", least=0)
    end: float | None = key(None, "after the cosine; null: peak", least=0)
    warmup_epochs: float = key(0.0, "length of the linear part", least=0)
    cosine_epochs: float | None = key(None, "length of the cosine; null: to the end of optim.epochs", least=0)

    def __post_init__(self) -> None:
        if self.peak is None and not (self.start is None and self.end is None):
            raise ValueError("it has a start or an end, but no peak; give all three, or none")

    @property
    def is_given(self) -> bool:
        """Whether there is one."""
        return self.peak is not None

    def values(self) -> tuple[float, float, float]:
        """Start, peak and end."""
        start, end = (self.peak if value is None else value for value in (self.start, self.end))
        return start, self.peak, end

    def at(self, epoch: float, epochs: float) -> float:
        """Return the value at an epoch, which may be a fraction or infinite, of a run of ``epochs``."""
        start, peak, end = self.values()
        cosine = max(epochs - self.warmup_epochs, 0) if self.cosine_epochs is None else self.cosine_epochs
        if epoch < self.warmup_epochs:
            return start + (peak - start) * epoch / self.warmup_epochs
        if epoch >= self.warmup_epochs + cosine:
            return end
        return end + (peak - end) * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / cosine)) / 2


@dataclass(frozen=True)
class RateSchedule(Schedule):
    """That of the learning rate, whose peak and end are scaled by ``optim.scaling_rule``."""

    freeze_last_layer_epochs: float | None = key(
        None, "in which the heads' last layers do not learn; null: optim.freeze_last_layer_epochs", least=0
    )

    def scaled(self, factor: float) -> "RateSchedule":
        """The same with the scaling rule's factor in peak and end; the start stays, as in DINOv3."""
        if self.peak is None:
            return self
        start, peak, end = self.values()
        return dataclasses.replace(self, start=start, peak=factor * peak, end=factor * end)


NO_SCHEDULE, NO_RATE_SCHEDULE = Schedule(), RateSchedule()
"""Where values are set otherwise."""
