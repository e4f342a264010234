"""The features of one task's tiles, as probes take them, and what a probe is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dinov2.eval.datasets.labels import LabelledTiles
from dinov2.eval.probe.folds import Division, divide
from dinov2.eval.probe.metrics import Predictions, estimate
from dinov2.eval.probe.results import Result

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dinov2.eval.probe.options import Probing

_LABEL_FREE_ROWS = 2048


class Probe(ABC):
    """A measure of features; a subclass in a file of its own and its line in `dinov2.extensions.PROBES` make one.

    ``options`` is an instance of the class's `Options`.
    """

    needs_labels: ClassVar[bool] = True  # leaves tasks without labels out

    @dataclass(frozen=True)
    class Options:
        """Options of the user, by `dinov2.configs.fields.key`: ``evaluation.probe_options.<name>``, and a flag of the
        command."""

    def __init__(self, options: Any = None):
        self.options = options or self.Options()

    @abstractmethod
    def measure(self, task: TaskFeatures) -> list[Result]:
        """Measure a task's features, in one process; random numbers come from generators of its own."""


@dataclass(frozen=True)
class Rows:
    """Features that classifiers are fitted on: of tiles, or slides where labels belong to these."""

    features: np.ndarray  # float32 (N, D)
    labels: np.ndarray  # class numbers, int64 (N,)
    groups: np.ndarray  # patient, slide or tile number, int64 (N,)
    splits: np.ndarray | None  # train, val or test, (N,)
    slides: np.ndarray | None  # slide number, int64 (N,), where predictions are to be pooled by slide
    classes: int  # number of classes


@dataclass(frozen=True)
class Fold:
    """One division of a task's rows, on the device."""

    number: int  # of the division
    train: tuple[Tensor, Tensor]  # features (N, D) and class numbers, int64 (N,), to fit on
    val: tuple[Tensor, Tensor]  # the same of the rows to choose on
    test: Tensor  # features (M, D) to tell the classes of
    classes: int  # C
    fit: tuple[Tensor, Tensor]  # to fit on where nothing is chosen: `train`, and `val` where it was taken from it


@dataclass(frozen=True)
class TaskFeatures:
    """Features of a task's tiles and what is known of the tiles."""

    name: str
    features: np.ndarray  # float32 (N, D), one row per tile
    tiles: LabelledTiles | None  # None without labels
    probing: Probing  # folds, seed and other numbers that all probes share
    device: torch.device  # for probes that compute on one
    predictions: dict[str, list[Predictions]] = field(default_factory=dict)  # what `classify` found, by probe

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
        splits = None if tiles.splits is None else np.asarray(tiles.splits)
        rows = Rows(self.features, tiles.labels, tiles.groups(probing.group), splits, None, len(tiles.classes))
        if not tiles.per_slide:
            return rows
        if probing.group == "tile":
            raise ValueError("Labels are per slide, so tiles cannot be the groups; slide or patient is possible.")
        slides = tiles.groups("slide")
        if probing.aggregation == "probabilities":
            return replace(rows, slides=slides)
        _, first = np.unique(slides, return_index=True)
        means = _means(self.features, slides).astype(np.float32)
        splits = None if splits is None else splits[first]
        return Rows(means, rows.labels[first], rows.groups[first], splits, None, rows.classes)

    @cached_property
    def divisions(self) -> list[Division]:
        """Row numbers to fit on, to choose on and to report on: of the splits, or one per fold."""
        rows, probing = self.rows, self.probing
        return divide(rows.labels, rows.groups, rows.splits, probing.folds, probing.seed)

    def classify(self, probe: str, scores: Callable[[Fold], Tensor], with_auroc: bool = True) -> list[Result]:
        """Results of a classifier over all divisions, under the name of a probe.

        Its scores of the M test rows of a fold are float (R, M, C) for R runs, the higher the likelier.
        """
        import torch  # not for a command line that is only read

        rows, probing, parts = self.rows, self.probing, []
        for number, division in enumerate(self.divisions):
            train, val, test, fit = (
                tuple(torch.from_numpy(column[part]).to(self.device) for column in (rows.features, rows.labels))
                for part in division
            )
            found = scores(Fold(number, train, val, test[0], rows.classes, fit)).cpu().numpy()
            target, groups = rows.labels[division.test], rows.groups[division.test]
            if rows.slides is not None:  # the mean scores of each slide's tiles
                _, first, members = np.unique(rows.slides[division.test], return_index=True, return_inverse=True)
                found = np.stack([_means(run, members) for run in found])
                target, groups = target[first], groups[first]
            parts.append(Predictions(target, found, groups))
        self.predictions[probe] = parts
        count, runs = sum(len(part.target) for part in parts), sum(len(part.scores) for part in parts)
        metrics = estimate(parts, probing.resamples, probing.seed, with_auroc)
        origin = self.tiles.grouping(probing.group) if rows.splits is None else "split"
        return [Result(self.name, probe, metric, *figures, runs, count, origin) for metric, figures in metrics.items()]


def _means(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean over the rows of each member number 0 .. S-1; float64 (S, ..)."""
    sums = np.zeros((int(members.max()) + 1, values.shape[1]))
    np.add.at(sums, members, values)
    return sums / np.bincount(members)[:, None]
