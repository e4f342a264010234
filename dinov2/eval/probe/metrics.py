"""Metrics of predictions with their spread: over runs, and over the tiles that might have been tested."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Formulas instead of scikit-learn's functions, which give the same numbers but take one weighting of rows at a time.
# In a bootstrap of 2,000 tiles of 5 classes `balanced_accuracy_score` takes 76 times as long and `roc_auc_score` 33
# times, and the latter refuses a test part, or a resample, that lacks a class.

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
    """Balanced accuracy, accuracy, macro F1 and AUROC of a probe's predictions on one test part, or one per fold.

    The interval is the percentile bootstrap's over whole clusters: each of `resamples` times, as many clusters as a
    part has are drawn from it with replacement, and the metric of the drawn tiles is averaged over parts and runs.
    It says how far another choice of test patients could move the figure, not another choice of training data.
    No resamples leave intervals out.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, list[np.ndarray]] = defaultdict(list)  # (R,) for each part
    drawn: dict[str, list[np.ndarray]] = defaultdict(list)  # (resamples,) for each part
    for part in parts:
        classes, predicted = part.scores.shape[-1], part.scores.argmax(-1)
        members, times = draw_clusters(part.clusters, resamples, rng)
        counts, resampled = tally(part.target, predicted, classes, members, times)
        for name, metric in from_counts(counts).items():
            values[name].append(metric)
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
    known = values[~np.isnan(values)]
    sd = float(known.std(ddof=1)) if len(known) > 1 else math.nan
    return Estimate(float(known.mean()) if len(known) else math.nan, *interval(drawn.mean(0)), sd)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """Ends of the percentile interval of a bootstrap's values, (resamples,); NaN if there is none that is known."""
    known, tail = drawn[~np.isnan(drawn)], (1 - LEVEL) / 2
    return tuple(map(float, np.quantile(known, [tail, 1 - tail]))) if len(known) else (math.nan, math.nan)


def draw_clusters(clusters: np.ndarray, resamples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw as many clusters as there are, K, with replacement, for each resample.

    The number in 0 .. K - 1 of each row's cluster, int64 (N,), is returned, and how often each is drawn, float32
    (resamples, K).
    """
    _, members = np.unique(clusters, return_inverse=True)
    number = int(members.max()) + 1
    times = np.empty((resamples, number), np.float32)
    for row in times:
        row[:] = np.bincount(rng.integers(0, number, number), minlength=number)
    return members, times


def tally(
    target: np.ndarray, predicted: np.ndarray, classes: int, members: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [.., target, predicted] of R runs' predictions, int64 (R, N), of all rows and of every resample.

    Those of a resample are sums over clusters, weighted by the draws of `draw_clusters`. They are int64 (R, C, C) and
    float32 (resamples, R, C, C).
    """
    number, shape = times.shape[1], (len(predicted), classes, classes)
    counts, resampled = np.empty(shape, np.int64), np.empty((len(times), *shape), np.float32)
    for run, classified in enumerate(predicted):
        cells = (members * classes + target) * classes + classified
        per_cluster = np.bincount(cells, minlength=number * classes**2).reshape(number, -1)
        counts[run] = per_cluster.sum(0).reshape(classes, classes)
        resampled[:, run] = (times @ per_cluster.astype(np.float32)).reshape(-1, classes, classes)
    return counts, resampled


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
