"""Metrics of predictions with their spread: over runs, and over the tiles that might have been tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dinov2.eval.probe.metrics import FROM_COUNTS, auroc, confusion

LEVEL = 0.95


@dataclass(frozen=True)
class Predictions:
    """What the runs of a probe say of one test part.

    Attributes:
        target: class numbers, int64 (N,).
        scores: float (R, N, C), the higher the likelier.
        clusters: patient, slide or tile number, int64 (N,); drawn whole in the bootstrap.
    """

    target: np.ndarray
    scores: np.ndarray
    clusters: np.ndarray


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
        seed: of the draws.
        with_auroc: compute it.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, list[np.ndarray]] = {}
    drawn: dict[str, list[np.ndarray]] = {}
    for part in parts:
        classes = part.scores.shape[-1]
        _, members = np.unique(part.clusters, return_inverse=True)
        times = _draws(int(members.max()) + 1, resamples, rng)
        predicted = part.scores.argmax(-1)
        counts = confusion(part.target, predicted, classes)
        resampled = _resampled_counts(part.target, predicted, classes, members, times)
        for name, metric in FROM_COUNTS.items():
            values.setdefault(name, []).append(metric(counts))
            drawn.setdefault(name, []).append(metric(resampled).mean(-1))
        if with_auroc:
            weights = np.concatenate([np.ones((1, len(members)), np.float32), times[:, members]])
            areas = np.stack([auroc(part.target, scores, weights) for scores in part.scores])
            values.setdefault("auroc", []).append(areas[:, 0])
            drawn.setdefault("auroc", []).append(areas[:, 1:].mean(0))
    return {name: _estimate(np.concatenate(values[name]), np.stack(drawn[name])) for name in values}


def _draws(clusters: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each cluster is drawn, float32 (resamples, clusters)."""
    drawn = [np.bincount(rng.integers(0, clusters, clusters), minlength=clusters) for _ in range(resamples)]
    return np.array(drawn, np.float32).reshape(resamples, clusters)


def _resampled_counts(
    target: np.ndarray, predicted: np.ndarray, classes: int, members: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """Confusion of every resample and run, (resamples, R, C, C): sums over clusters, weighted by the draws."""
    runs, resamples = len(predicted), len(times)
    counts = np.empty((resamples, runs, classes, classes), np.float32)
    for run in range(runs):
        cells = (members * classes + target) * classes + predicted[run]
        per_cluster = np.bincount(cells, minlength=times.shape[1] * classes**2)
        product = times @ per_cluster.reshape(times.shape[1], -1).astype(np.float32)
        counts[:, run] = product.reshape(resamples, classes, classes)
    return counts


def _estimate(values: np.ndarray, drawn: np.ndarray) -> Estimate:
    """From the values (runs of all parts,) and the resamples' (parts, resamples)."""
    known = values[~np.isnan(values)]
    low = high = float("nan")
    means = drawn.mean(0)
    means = means[~np.isnan(means)]
    if len(means):
        tail = (1 - LEVEL) / 2
        low, high = (float(bound) for bound in np.quantile(means, [tail, 1 - tail]))
    sd = float(known.std(ddof=1)) if len(known) > 1 else float("nan")
    return Estimate(float(known.mean()) if len(known) else float("nan"), low, high, sd)
