"""From tiles to what is classified: tiles, or slides where labels belong to slides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dinov2.eval.datasets.labelled import LabelledTiles
from dinov2.eval.probe.bootstrap import Predictions

AGGREGATIONS = ("features", "probabilities")


@dataclass(frozen=True)
class Rows:
    """What probes are fitted on.

    Attributes:
        features: float32 (N, D).
        labels: class numbers, int64 (N,).
        groups: patient, slide or tile number, int64 (N,).
        splits: train, val or test, (N,), or None.
        slides: slide number, int64 (N,), where predictions are to be pooled by slide; else None.
        classes: number of classes.
    """

    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    splits: np.ndarray | None
    slides: np.ndarray | None
    classes: int


def rows_of(tiles: LabelledTiles, features: np.ndarray, group: str | None, aggregation: str) -> Rows:
    """Rows to classify: the tiles, or with labels per slide and ``features`` the mean feature of each slide.

    Raises:
        ValueError: labels are per slide and groups are tiles.
    """
    groups, classes = tiles.groups(group), len(tiles.classes)
    splits = None if tiles.splits is None else np.asarray(tiles.splits)
    if not tiles.per_slide:
        return Rows(features, tiles.labels, groups, splits, None, classes)
    if group == "tile":
        raise ValueError("Labels are per slide, so tiles cannot be the groups; slide or patient is possible.")
    slides = tiles.groups("slide")
    if aggregation == "probabilities":
        return Rows(features, tiles.labels, groups, splits, slides, classes)
    _, first = np.unique(slides, return_index=True)
    means = _means(features, slides).astype(np.float32)
    return Rows(
        means, tiles.labels[first], groups[first], None if splits is None else splits[first], None, classes
    )


def pool_predictions(part: Predictions, slides: np.ndarray) -> Predictions:
    """Mean scores of each slide's tiles."""
    _, first, members = np.unique(slides, return_index=True, return_inverse=True)
    scores = np.stack([_means(run, members) for run in part.scores])
    return Predictions(part.target[first], scores, part.clusters[first])


def _means(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean over the rows of each member number 0 .. S-1; float64 (S, ..)."""
    sums = np.zeros((int(members.max()) + 1, values.shape[1]))
    np.add.at(sums, members, values)
    return sums / np.bincount(members)[:, None]
