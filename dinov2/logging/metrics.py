"""Accumulate scalar metrics on the device and reduce them once per logging period."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_global_size


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
        """Mean over the period's steps and over ranks, then start anew; all ranks must call.

        One all-reduce and one host synchronisation.
        """
        if self._sum is None:
            return {}
        means = all_reduce_sum(self._sum) / (self._count * get_global_size())
        self._sum, self._count = None, 0
        return dict(zip(self._names, means.tolist(), strict=True))
