"""The features of one task's tiles, as probes take them, and what a probe is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dinov2.eval.datasets.labelled import LabelledTiles
from dinov2.eval.probe.bootstrap import Predictions, estimate
from dinov2.eval.probe.folds import Division, divide
from dinov2.eval.probe.options import Probing
from dinov2.eval.probe.results import Result

_LABEL_FREE_ROWS = 2048


class Probe(ABC):
    """A measure of features; a subclass in a file of its own and its line in `dinov2.extensions.PROBES` make one.

    Attributes:
        needs_labels: leave tasks without labels out.
        options: an instance of the class's `Options`.
    """

    needs_labels: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        """What the user may set, by `dinov2.configs.fields.key`: ``evaluation.probe_options.<name>``, and a flag of the
        command."""

    def __init__(self, options: Any = None):
        self.options = options or self.Options()

    @abstractmethod
    def measure(self, task: TaskFeatures) -> list[Result]:
        """Measure a task's features, in one process; random numbers come from generators of its own."""


@dataclass(frozen=True)
class Rows:
    """What classifiers are fitted on: tiles, or slides where labels belong to these.

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


@dataclass(frozen=True)
class Fold:
    """One division of a task's rows, on the device.

    Attributes:
        number: of the division.
        train: features (N, D) and class numbers, int64 (N,), to fit on.
        val: the same of the rows to choose on.
        test: features (M, D) to tell the classes of.
        classes: C.
    """

    number: int
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: Tensor
    classes: int


@dataclass(frozen=True)
class TaskFeatures:
    """Features of a task's tiles and what is known of the tiles.

    Attributes:
        name: of the task.
        features: float32 (N, D), one row per tile.
        tiles: labels, groups and splits; None without labels.
        probing: folds, seed and other numbers that all probes share.
        device: for probes that compute on one.
    """

    name: str
    features: np.ndarray
    tiles: LabelledTiles | None
    probing: Probing
    device: torch.device

    @cached_property
    def sample(self) -> np.ndarray:
        """At most 2,048 tiles' features, evenly spread over the test tiles, for measures without labels."""
        rows = self.features
        if self.tiles is not None and self.tiles.splits is not None:
            rows = rows[np.asarray(self.tiles.splits) == "test"]
        count = min(len(rows), _LABEL_FREE_ROWS)
        return rows[np.arange(count) * len(rows) // count]

    @cached_property
    def rows(self) -> Rows:
        """The tiles, or with labels per slide and aggregation of ``features`` the mean feature of each slide."""
        tiles, probing = self.tiles, self.probing
        groups, classes = tiles.groups(probing.group), len(tiles.classes)
        splits = None if tiles.splits is None else np.asarray(tiles.splits)
        if not tiles.per_slide:
            return Rows(self.features, tiles.labels, groups, splits, None, classes)
        if probing.group == "tile":
            raise ValueError("Labels are per slide, so tiles cannot be the groups; slide or patient is possible.")
        slides = tiles.groups("slide")
        if probing.aggregation == "probabilities":
            return Rows(self.features, tiles.labels, groups, splits, slides, classes)
        _, first = np.unique(slides, return_index=True)
        means = _means(self.features, slides).astype(np.float32)
        splits = None if splits is None else splits[first]
        return Rows(means, tiles.labels[first], groups[first], splits, None, classes)

    @cached_property
    def divisions(self) -> list[Division]:
        """Row numbers to fit on, to choose on and to report on: of the splits, or one per fold."""
        rows, probing = self.rows, self.probing
        return divide(rows.labels, rows.groups, rows.splits, probing.folds, probing.seed)

    def classify(self, probe: str, scores: Callable[[Fold], Tensor], with_auroc: bool = True) -> list[Result]:
        """Results of a classifier over all divisions.

        Args:
            probe: name in the results.
            scores: of the M test rows, float (R, M, C) for R runs, the higher the likelier.
            with_auroc: compute that, too.
        """
        rows, probing, parts = self.rows, self.probing, []
        for division, fold in zip(self.divisions, self._folds(), strict=True):
            test, found = division.test, scores(fold).cpu().numpy()
            part = Predictions(rows.labels[test], found, rows.groups[test])
            parts.append(part if rows.slides is None else _pool_by_slide(part, rows.slides[test]))
        count, runs = sum(len(part.target) for part in parts), sum(len(part.scores) for part in parts)
        metrics = estimate(parts, probing.resamples, probing.seed, with_auroc)
        return [Result(self.name, probe, metric, *figures, runs, count) for metric, figures in metrics.items()]

    def _folds(self) -> Iterator[Fold]:
        columns = (self.rows.features, self.rows.labels)
        for number, division in enumerate(self.divisions):
            train, val, test = (
                tuple(torch.from_numpy(column[part]).to(self.device) for column in columns)
                for part in (division.train, division.val, division.test)
            )
            yield Fold(number, train, val, test[0], self.rows.classes)


def _pool_by_slide(part: Predictions, slides: np.ndarray) -> Predictions:
    """Mean scores of each slide's tiles."""
    _, first, members = np.unique(slides, return_index=True, return_inverse=True)
    scores = np.stack([_means(run, members) for run in part.scores])
    return Predictions(part.target[first], scores, part.clusters[first])


def _means(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean over the rows of each member number 0 .. S-1; float64 (S, ..)."""
    sums = np.zeros((int(members.max()) + 1, values.shape[1]))
    np.add.at(sums, members, values)
    return sums / np.bincount(members)[:, None]
