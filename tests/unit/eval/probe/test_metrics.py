"""Metrics against scikit-learn's, intervals against what they promise."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from dinov2.eval.probe.metrics import Predictions, auroc, estimate, from_counts

REFERENCES = {
    "balanced_accuracy": sklearn_metrics.balanced_accuracy_score,
    "accuracy": sklearn_metrics.accuracy_score,
    "f1": lambda target, predicted: sklearn_metrics.f1_score(target, predicted, average="macro"),
}


def predictions(classes, count=200, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, count)
    scores = rng.random((count, classes)) + 0.5 * np.eye(classes)[target]
    return target, (scores / scores.sum(1, keepdims=True)).round(2)  # with ties


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", REFERENCES)
def test_metrics_of_counts(name, classes):
    target, scores = predictions(classes)
    counts = sklearn_metrics.confusion_matrix(target, scores.argmax(1))
    assert from_counts(counts)[name] == pytest.approx(REFERENCES[name](target, scores.argmax(1)))


@pytest.mark.parametrize("classes", [2, 4])
def test_auroc_with_ties_and_weights(classes):
    target, scores = predictions(classes)
    weights = np.random.default_rng(1).integers(0, 3, (3, len(target))).astype(np.float32)
    ours = auroc(target, scores, weights)
    for row, area in zip(weights, ours, strict=True):
        if classes == 2:
            expected = sklearn_metrics.roc_auc_score(target, scores[:, 1], sample_weight=row)
        else:
            one_hot = np.eye(classes)[target]
            areas = [
                sklearn_metrics.roc_auc_score(one_hot[:, c], scores[:, c], sample_weight=row) for c in range(classes)
            ]
            expected = np.mean(areas)
        assert area == pytest.approx(expected)


def test_class_that_is_never_tested_does_not_count():
    target, predicted = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    counts = sklearn_metrics.confusion_matrix(target, predicted)
    assert from_counts(counts)["balanced_accuracy"] == pytest.approx(0.75)
    assert from_counts(counts)["f1"] == pytest.approx(sklearn_metrics.f1_score(target, predicted, average="macro"))


def test_mean_and_deviation_over_runs_and_folds():
    parts, expected = [], []
    for fold in range(3):
        found = [predictions(3, seed=10 * fold + run) for run in range(2)]
        target = found[0][0]
        scores = np.stack([scores for _, scores in found])
        parts.append(Predictions(target, scores, np.arange(len(target))))
        expected += [sklearn_metrics.balanced_accuracy_score(target, run.argmax(1)) for run in scores]
    result = estimate(parts, resamples=50)["balanced_accuracy"]
    assert result.value == pytest.approx(np.mean(expected))
    assert result.sd == pytest.approx(np.std(expected, ddof=1))
    assert result.low < result.value < result.high


def test_resamples_are_those_of_a_plain_bootstrap():
    """Same draws, tile by tile, through scikit-learn."""
    target, scores = predictions(2, 60)
    clusters = np.repeat(np.arange(20), 3)
    result = estimate([Predictions(target, scores[None], clusters)], resamples=40, seed=3)
    rng = np.random.default_rng(3)
    drawn = [np.concatenate([np.flatnonzero(clusters == c) for c in rng.integers(0, 20, 20)]) for _ in range(40)]
    for name, reference in REFERENCES.items():
        values = [reference(target[rows], scores[rows].argmax(1)) for rows in drawn]
        low, high = np.quantile(values, [0.025, 0.975])
        assert (result[name].low, result[name].high) == pytest.approx((low, high), abs=1e-6)
    values = [sklearn_metrics.roc_auc_score(target[rows], scores[rows, 1]) for rows in drawn]
    assert (result["auroc"].low, result["auroc"].high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


@pytest.mark.parametrize("per_cluster", [1, 5])
def test_intervals_cover_the_truth(per_cluster):
    """A cluster is right or wrong as a whole: 95 % intervals must hold the true 0.8 about 95 times in 100."""
    rng, trials, covered = np.random.default_rng(0), 200, 0
    for _ in range(trials):
        target = np.tile([0, 1], 60)
        right = rng.random(120) < 0.8
        scores = np.eye(2)[np.where(right, target, 1 - target)]
        rows = np.repeat(np.arange(120), per_cluster)
        part = Predictions(target[rows], scores[None, rows], rows)
        result = estimate([part], resamples=200, with_auroc=False)["balanced_accuracy"]
        covered += result.low <= 0.8 <= result.high
    assert 0.90 <= covered / trials <= 0.99


def test_no_interval_where_none_is_wanted():
    target, scores = predictions(2)
    result = estimate([Predictions(target, scores[None], np.arange(200))], resamples=0)
    assert all(np.isnan([e.low, e.high, e.sd]).all() and e.value > 0.5 for e in result.values())
