"""What predictions are worth, for many weightings of the same tiles at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_ELEMENTS = 1 << 22  # of an array held at a time


def confusion(target: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts [.., target, predicted] of int64 (.., N) predictions; int64 (.., C, C)."""
    cells = target * classes + predicted
    flat = cells.reshape(-1, cells.shape[-1])
    counts = np.stack([np.bincount(row, minlength=classes * classes) for row in flat])
    return counts.reshape(*cells.shape[:-1], classes, classes)


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of right predictions; (.., C, C) to (..)."""
    return _divide(np.trace(counts, axis1=-2, axis2=-1), counts.sum((-2, -1)))


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur of the share of right predictions; (.., C, C) to (..)."""
    return _mean_of_known(_divide(_diagonal(counts), counts.sum(-1)))


def f1(counts: np.ndarray) -> np.ndarray:
    """Mean of ``2 TP / (2 TP + FP + FN)`` over the classes that occur or are predicted; (.., C, C) to (..)."""
    right = _diagonal(counts)
    return _mean_of_known(_divide(2 * right, counts.sum(-1) + counts.sum(-2)))


FROM_COUNTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "f1": f1,
}


def auroc(target: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve: of class 1 where there are two, else the mean over classes of one against the rest.

    Args:
        target: class numbers, int64 (N,).
        scores: (N, C), the higher the likelier.
        weights: of the rows, (B, N); None is one row of ones.

    Returns:
        float64 (B,); NaN where the weights leave fewer than two classes.
    """
    weights = np.ones((1, len(target))) if weights is None else weights
    wanted = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    areas = [_area(target == number, scores[:, number], weights) for number in wanted]
    return _mean_of_known(np.stack(areas, -1))


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


def _diagonal(counts: np.ndarray) -> np.ndarray:
    return np.diagonal(counts, axis1=-2, axis2=-1)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN for division by zero."""
    return numerator / np.where(denominator > 0, denominator, np.nan)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0).sum(-1), known.sum(-1))
