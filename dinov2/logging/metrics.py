"""Metrics, accumulated on the device, and what they are of chance."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_global_size

CHANCE, OF_CHANCE = "_chance", "_of_chance"
HEALTH, PEAK = "health/", "_peak"


def is_of_training(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of training steps; others are those of probes."""
    return "total_loss" in record


class MetricAccumulator:
    """Running means of 0-d device tensors; adding a step neither copies to the host nor synchronises.

    Of those whose name begins with one of ``peaks`` the largest value of a period is kept, too.
    """

    def __init__(self, peaks: Sequence[str] = ()) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._peak: Tensor | None = None
        self._count = 0
        self._peaks = tuple(peaks)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's values; every step of a period has the same names."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        if self._sum is None:
            self._names, self._sum, self._peak = list(metrics), values, values
        else:
            assert list(metrics) == self._names, "metric names changed within a logging period"
            self._sum, self._peak = self._sum + values, torch.maximum(self._peak, values)
        self._count += 1

    def reduce(self, beside: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Mean over the period's steps and ranks, then start anew: one all-reduce, one sync; all ranks must call.

        The mean over ranks of each one's largest value follows as ``health/<name>_peak``, and that of what is given
        ``beside``, 0-d tensors of the last step.
        """
        if self._sum is None:
            return {}
        last = [value.detach().float() for value in (beside or {}).values()]
        kept = [name.startswith(self._peaks) for name in self._names]
        values = torch.cat([self._sum / self._count, self._peak, *(value[None] for value in last)])
        means = (all_reduce_sum(values) / get_global_size()).tolist()
        self._sum, self._peak, self._count = None, None, 0
        number = len(self._names)
        peaks = zip(self._names, kept, means[number : 2 * number], strict=True)
        return {
            **dict(zip(self._names, means[:number], strict=True)),
            **{f"{HEALTH}{name}{PEAK}": value for name, keep, value in peaks if keep},
            **dict(zip(beside or {}, means[2 * number :], strict=True)),
        }


class RunningMedian:
    """Median, and median absolute deviation from it, of the newest finite values."""

    def __init__(self, length: int = 50, least: int = 10) -> None:
        self._values: deque[float] = deque(maxlen=length)
        self._least = least

    def before(self, value: float) -> tuple[float, float]:
        """Take one more value; return median and deviation of those before it, NaN as long as they are too few."""
        values = list(self._values)
        if math.isfinite(value):
            self._values.append(value)
        if len(values) < self._least:
            return math.nan, math.nan
        median = statistics.median(values)
        return median, statistics.median(abs(v - median) for v in values)


class GradNormLevel:
    """Gradient norms against their running medians, over records of training."""

    def __init__(self) -> None:
        self._medians: dict[str, RunningMedian] = {}

    def of_median(self, averages: Mapping[str, float]) -> float:
        """Largest ratio of a module's peak to the median of its earlier peaks; NaN as long as these are too few."""
        ratios = []
        for name, value in averages.items():
            if name.startswith(f"{HEALTH}grad_norm_") and name.endswith(PEAK):
                median, _ = self._medians.setdefault(name, RunningMedian()).before(value)
                if median > 0 and math.isfinite(value):  # a loss scaler has to do with others
                    ratios.append(value / median)
        return max(ratios, default=math.nan)


def relative_to_chance(metrics: Mapping[str, float]) -> dict[str, float]:
    """Put ``<term>_of_chance``, a loss as a fraction of its level of chance, in place of the level, ``<loss>_chance``.

    They are fractions of means over a period, so that steps without masks count for nothing, and are left out where
    the level is 0.
    """
    found = dict(metrics)
    for name in metrics:
        loss = name.removesuffix(CHANCE)
        if loss != name and loss in metrics and (level := found.pop(name)) > 0:
            found[of_chance(loss)] = metrics[loss] / level
    return found


def of_chance(loss: str) -> str:
    """Name of the metric of a loss as a fraction of chance."""
    return loss.removesuffix("_loss") + OF_CHANCE
