"""Metrics, accumulated on the device, and what they are of chance."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_global_size

CHANCE, OF_CHANCE = "_chance", "_of_chance"


class MetricAccumulator:
    """Running means of 0-d device tensors; adding a step neither copies to the host nor synchronises."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's values; every step of a period has the same names."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        if self._sum is None:
            self._names, self._sum = list(metrics), values
        else:
            assert list(metrics) == self._names, "metric names changed within a logging period"
            self._sum = self._sum + values
        self._count += 1

    def reduce(self) -> dict[str, float]:
        """Mean over the period's steps and ranks, then start anew: one all-reduce, one sync; all ranks must call."""
        if self._sum is None:
            return {}
        means = all_reduce_sum(self._sum) / (self._count * get_global_size())
        self._sum, self._count = None, 0
        return dict(zip(self._names, means.tolist(), strict=True))


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
