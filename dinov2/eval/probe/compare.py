"""How much better one set of predictions is than another of the same tiles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dinov2.eval.probe.metrics import LEVEL, confusion, from_counts


class Difference(NamedTuple):
    """Balanced accuracy of a less that of b, and its 95 % interval over groups."""

    mean: float
    low: float
    high: float


def paired_difference(
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    draws: int = 2000,
    seed: int = 0,
) -> Difference:
    """Compare class numbers, int64 (N,), by a percentile bootstrap that draws whole groups, the same for both."""
    classes = int(max(labels.max(), predicted_a.max(), predicted_b.max())) + 1
    _, members = np.unique(groups, return_inverse=True)
    number = int(members.max()) + 1
    rng = np.random.default_rng(seed)
    times = np.array([np.bincount(rng.integers(0, number, number), minlength=number) for _ in range(draws)])
    drawn, whole = [], []
    for predicted in (predicted_a, predicted_b):
        cells = (members * classes + labels) * classes + predicted
        per_group = np.bincount(cells, minlength=number * classes**2).reshape(number, -1)
        counts = (times @ per_group).reshape(draws, classes, classes)
        drawn.append(from_counts(counts)["balanced_accuracy"])
        whole.append(float(from_counts(confusion(labels, predicted, classes))["balanced_accuracy"]))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(drawn[0] - drawn[1], [tail, 1 - tail])
    return Difference(whole[0] - whole[1], float(low), float(high))
