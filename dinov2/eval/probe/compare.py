"""Two teachers on the same tiles: the difference of their balanced accuracies, with its interval."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dinov2.eval.probe.metrics import draw_clusters, from_counts, interval, tally
from dinov2.eval.probe.results import COMPARED, DIFFERENCE, HEADLINE, Result
from dinov2.eval.probe.task import Probe, TaskFeatures


class Difference(NamedTuple):
    """Of balanced accuracies, and the ends of its 95 % interval, NaN if none is wanted."""

    mean: float
    low: float
    high: float


class Pair(NamedTuple):
    """What two teachers' features make of the N rows of one test part, R runs each."""

    predicted: tuple[np.ndarray, np.ndarray]  # class numbers, int64 (R, N)
    target: np.ndarray  # int64 (N,)
    clusters: np.ndarray  # patient, slide or tile number, int64 (N,); drawn whole
    classes: int


def paired_difference(
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    draws: int = 2000,
    seed: int = 0,
) -> Difference:
    """Balanced accuracy of predictions a less that of predictions b, of the same rows; all are int (N,).

    The interval is the percentile bootstrap's over whole groups (patients, slides or tiles, by number): in each of the
    draws both are taken on the rows of the same groups, so that what makes a group hard for both moves neither end. No
    draws leave the interval out. Raises ValueError if there are no rows, or not as many of each.
    """
    shapes = [np.shape(column) for column in (predicted_a, predicted_b, labels, groups)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(f"Predictions, labels and groups have the shapes {shapes}; one and the same (N,) is expected.")
    classes, numbers = np.unique(np.stack([predicted_a, predicted_b, labels]), return_inverse=True)
    a, b, target = numbers.reshape(3, -1)
    return difference([Pair((a[None], b[None]), target, groups, len(classes))], draws, seed)


def difference(parts: Sequence[Pair], draws: int, seed: int) -> Difference:
    """`paired_difference` of one test part or one per fold: the mean over parts and runs.

    The groups drawn are those of `dinov2.eval.probe.metrics.estimate` with the same seed.
    """
    rng = np.random.default_rng(seed)
    values, drawn = np.zeros(len(parts)), np.zeros((len(parts), draws))
    for part, pair in enumerate(parts):
        members, times = draw_clusters(pair.clusters, draws, rng)
        for sign, predicted in zip((1, -1), pair.predicted, strict=True):
            counts, resampled = tally(pair.target, predicted, pair.classes, members, times)
            values[part] += sign * from_counts(counts)["balanced_accuracy"].mean()
            drawn[part] += sign * from_counts(resampled)["balanced_accuracy"].mean(-1)
    return Difference(float(values.mean()), *interval(drawn.mean(0)))


def compare(probe: Probe, first: TaskFeatures, second: TaskFeatures) -> list[Result]:
    """Results of a probe on two teachers' features of one task; of classifiers also the difference, first less second.

    Metrics of the second have ``compared_`` before their names.
    """
    results = probe.measure(first)
    others = [replace(result, metric=COMPARED + result.metric) for result in probe.measure(second)]
    probing, differences = first.probing, []
    for result in results:
        name = result.probe
        if result.metric != HEADLINE or name not in first.predictions:
            continue
        parts = [
            Pair((a.scores.argmax(-1), b.scores.argmax(-1)), a.target, a.clusters, first.rows.classes)
            for a, b in zip(first.predictions[name], second.predictions[name], strict=True)
        ]
        found = difference(parts, probing.resamples, probing.seed)
        numbers = {"runs": result.runs, "count": result.count, "division": result.division}
        differences.append(Result(first.name, name, DIFFERENCE, *found, **numbers))
    return [*results, *others, *differences]
