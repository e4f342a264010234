"""Metrics of predictions with their spread: over runs, and over the tiles that might have been tested."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
_ELEMENTS = 1 << 22  # of an array held at a time


@dataclass(frozen=True)
class Predictions:
    """Metrics of the runs of a probe on one test part."""

    target: np.ndarray  # class numbers, int64 (N,)
    scores: np.ndarray  # float (R, N, C), the higher the likelier
    clusters: np.ndarray  # patient, slide or tile number, int64 (N,); drawn whole in the bootstrap


class Estimate(NamedTuple):
    """Mean over test parts and runs; 95 % interval, NaN if none is wanted; deviation, NaN for a single run."""

    value: float
    low: float
    high: float
    sd: float


def estimate(
    parts: Sequence[Predictions], resamples: int = 1000, seed: int = 0, with_auroc: bool = True
) -> dict[str, Estimate]:
    """Balanced accuracy, accuracy, macro F1 and AUROC of predictions.

    The interval is the percentile bootstrap's over whole clusters: each of `resamples` times, as many clusters as a
    part has are drawn from it with replacement, and the metric of the drawn tiles is averaged over parts and runs.
    It says how far another choice of test patients could move the figure, not another choice of training data.

    Args:
        parts: of one probe: one, or one per fold.
        resamples: number of draws; 0 leaves intervals out.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, list[np.ndarray]] = defaultdict(list)  # (R,) for each part
    drawn: dict[str, list[np.ndarray]] = defaultdict(list)  # (resamples,) for each part
    for part in parts:
        classes, predicted = part.scores.shape[-1], part.scores.argmax(-1)
        _, members = np.unique(part.clusters, return_inverse=True)
        number = int(members.max()) + 1
        times = [np.bincount(rng.integers(0, number, number), minlength=number) for _ in range(resamples)]
        times = np.array(times, np.float32).reshape(resamples, number)
        for name, metric in from_counts(confusion(part.target, predicted, classes)).items():
            values[name].append(metric)
        # Confusions of every resample are sums over clusters, weighted by the draws: (resamples, R, C, C).
        resampled = np.empty((resamples, len(predicted), classes, classes), np.float32)
        for run, classified in enumerate(predicted):
            cells = (members * classes + part.target) * classes + classified
            per_cluster = np.bincount(cells, minlength=number * classes**2).reshape(number, -1)
            resampled[:, run] = (times @ per_cluster.astype(np.float32)).reshape(resamples, classes, classes)
        for name, metric in from_counts(resampled).items():
            drawn[name].append(metric.mean(-1))
        if with_auroc:
            weights = np.concatenate([np.ones((1, len(members)), np.float32), times[:, members]])
            areas = np.stack([auroc(part.target, scores, weights) for scores in part.scores])
            values["auroc"].append(areas[:, 0])
            drawn["auroc"].append(areas[:, 1:].mean(0))
    return {name: _estimate(np.concatenate(values[name]), np.stack(drawn[name])) for name in values}


def _estimate(values: np.ndarray, drawn: np.ndarray) -> Estimate:
    """From the values (runs of all parts,) and the resamples' (parts, resamples)."""
    known, means = values[~np.isnan(values)], drawn.mean(0)
    means, tail = means[~np.isnan(means)], (1 - LEVEL) / 2
    low, high = map(float, np.quantile(means, [tail, 1 - tail])) if len(means) else (math.nan, math.nan)
    sd = float(known.std(ddof=1)) if len(known) > 1 else math.nan
    return Estimate(float(known.mean()) if len(known) else math.nan, low, high, sd)


def confusion(target: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts [.., target, predicted] of int64 (.., N) predictions; int64 (.., C, C)."""
    cells = target * classes + predicted
    counts = np.stack([np.bincount(row, minlength=classes**2) for row in cells.reshape(-1, cells.shape[-1])])
    return counts.reshape(*cells.shape[:-1], classes, classes)


def from_counts(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics, each (..), of confusions (.., C, C).

    Balanced accuracy is the mean over the classes that occur; F1, ``2 TP / (2 TP + FP + FN)``, is the mean over
    those that occur or are predicted.
    """
    right, occurring = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1)
    return {
        "balanced_accuracy": _mean_of_known(_divide(right, occurring)),
        "accuracy": _divide(right.sum(-1), occurring.sum(-1)),
        "f1": _mean_of_known(_divide(2 * right, occurring + counts.sum(-2))),
    }


def auroc(target: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: of class 1 where there are two, else the mean over classes of one against the rest.

    Of class numbers (N,), scores (N, C), the higher the likelier, and weightings of the rows (B, N): float64 (B,), NaN
    where the weights leave fewer than two classes.
    """
    classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    return _mean_of_known(np.stack([_area(target == number, scores[:, number], weights) for number in classes], -1))


def _area(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """P(positive's score > negative's) + P(equal) / 2."""
    order = np.argsort(score, kind="stable")
    ties = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    step = max(1, _ELEMENTS // len(order))
    areas = []
    for first in range(0, len(weights), step):
        sorted_weights = weights[first : first + step, order].astype(np.float64)
        above = np.add.reduceat(sorted_weights * positive[order], ties, axis=1)
        rest = np.add.reduceat(sorted_weights * ~positive[order], ties, axis=1)
        below = np.cumsum(rest, axis=1) - rest / 2
        areas.append(_divide((above * below).sum(1), above.sum(1) * rest.sum(1)))
    return np.concatenate(areas)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN for division by zero."""
    return numerator / np.where(denominator > 0, denominator, np.nan)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0).sum(-1), known.sum(-1))
