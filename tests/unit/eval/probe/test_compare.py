"""The paired difference against a float64 loop and scipy's bootstrap, and how often its interval holds the truth."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import balanced_accuracy_score

from dinov2.eval.datasets.labels import LabelledTiles
from dinov2.eval.probe.compare import compare, paired_difference
from dinov2.eval.probe.nearest import Knn
from dinov2.eval.probe.options import Probing
from dinov2.eval.probe.task import TaskFeatures


def predictions(count=300, classes=3, groups=40, seed=0, right=(0.8, 0.6)):
    """Of a and b, labels and groups; both err more in some groups than in others."""
    rng = np.random.default_rng(seed)
    members, labels = rng.integers(0, groups, count), rng.integers(0, classes, count)
    hard = rng.uniform(0.5, 1.2, groups)[members]
    wrong = (labels + rng.integers(1, classes, count)) % classes
    a, b = (np.where(rng.random(count) < p * hard, labels, wrong) for p in right)
    return a, b, labels, members


def test_draws_are_those_of_a_plain_loop():
    a, b, labels, groups = predictions()
    labels, a, b, names = labels * 7 - 3, a * 7 - 3, b * 7 - 3, groups * 11 + 5  # any integers will do
    found = paired_difference(a, b, labels, names, draws=60, seed=4)
    rng, values = np.random.default_rng(4), []
    for _ in range(60):
        drawn = np.unique(names)[rng.integers(0, 40, 40)]
        rows = np.concatenate([np.flatnonzero(names == name) for name in drawn])
        recalls = [[np.mean(x[rows][labels[rows] == c] == c) for c in np.unique(labels[rows])] for x in (a, b)]
        values.append(np.mean(recalls[0]) - np.mean(recalls[1]))
    assert found.mean == pytest.approx(balanced_accuracy_score(labels, a) - balanced_accuracy_score(labels, b))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-6)
    assert all(isinstance(value, float) for value in found)


def test_scipy_finds_the_same_interval():
    """With a group per row scipy's paired bootstrap resamples alike; only the random draws differ."""
    a, b, labels, _ = predictions(400, groups=400, seed=1)

    def statistic(a, b, labels):
        return np.mean([np.mean(a[labels == c] == c) - np.mean(b[labels == c] == c) for c in range(3)])

    reference = bootstrap(
        (a, b, labels), statistic, paired=True, vectorized=False, method="percentile", n_resamples=1500, rng=0
    ).confidence_interval
    found = paired_difference(a, b, labels, np.arange(400), draws=4000)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_swapping_the_teachers_turns_the_sign(seed):
    a, b, labels, groups = predictions(seed=seed)
    one, other = paired_difference(a, b, labels, groups, 100), paired_difference(b, a, labels, groups, 100)
    assert one == pytest.approx((-other.mean, -other.high, -other.low))
    assert one != paired_difference(a, b, labels, groups, 100, seed=1)
    assert paired_difference(a, a, labels, groups, 100) == (0, 0, 0)


def test_no_interval_where_none_is_wanted():
    found = paired_difference(*predictions(), draws=0)
    assert found.mean > 0 and np.isnan([found.low, found.high]).all()


def test_what_two_predictions_share_widens_nothing():
    """Groups are hard or easy for both, alike: the difference is known far better than either figure."""
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(60), 20), np.tile([0, 1], 600)
    hard = rng.random(60)[groups]
    both = rng.random(1200)
    a, b = (np.where(both < hard + gain, labels, 1 - labels) for gain in (0.05, 0))
    paired = paired_difference(a, b, labels, groups)
    alone = paired_difference(a, 1 - labels, labels, groups)  # the latter is 0 in every draw
    assert paired.low > 0 and paired.high - paired.low < 0.4 * (alone.high - alone.low)


def test_intervals_cover_the_truth():
    """Groups differ in difficulty and gain; a is right 0.10 more often than b, which 95 of 100 intervals must hold."""
    rng, trials, covered = np.random.default_rng(1), 300, 0
    for _ in range(trials):
        groups = np.repeat(np.arange(50), 6)
        labels = np.tile([0, 1], 150)
        easy = rng.uniform(0.4, 0.9, 50)[groups]
        gain = rng.uniform(0, 0.2, 50)[groups]  # by group, too
        a, b = (np.where(rng.random(300) < p, labels, 1 - labels) for p in (easy + gain - 0.05, easy - 0.05))
        found = paired_difference(a, b, labels, groups, draws=300)
        covered += found.low <= 0.1 <= found.high
    assert 0.91 <= covered / trials <= 0.985


@pytest.mark.parametrize("wrong", [([], [], [], []), ([0], [0, 1], [0, 1], [0, 1]), ([[0]], [[0]], [[0]], [[0]])])
def test_columns_that_do_not_fit(wrong):
    with pytest.raises(ValueError):
        paired_difference(*map(np.array, wrong))


def test_folds_are_shared_and_averaged():
    """The difference of a probe is that of its two figures, its draws those of `paired_difference` fold by fold."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 300)
    first, second = (signal * labels[:, None] + rng.normal(size=(300, 6)) for signal in (1.5, 0.5))
    tiles = LabelledTiles(None, labels, ("a", "b"), patients=tuple(map(str, rng.integers(0, 50, 300))))
    probing = Probing(("knn",), folds=3, resamples=400)
    tasks = [TaskFeatures("t", x.astype(np.float32), tiles, probing, torch.device("cpu")) for x in (first, second)]
    results = compare(Knn(Knn.Options((5,))), *tasks)
    found = {(result.probe, result.metric): result for result in results}
    for probe in ("knn5", "knn5_majority", "knn5_standardized"):
        one, other = (found[probe, name] for name in ("balanced_accuracy", "compared_balanced_accuracy"))
        result = found[probe, "balanced_accuracy_difference"]
        assert result.value == pytest.approx(one.value - other.value)
        assert 0 < result.low < result.value < result.high < 1
        assert (result.runs, result.count, result.division) == (3, 300, "patient")
        parts = list(zip(tasks[0].predictions[probe], tasks[1].predictions[probe], strict=True))
        draws, values = np.random.default_rng(0), []
        for a, b in parts:
            np.testing.assert_array_equal(a.target, b.target)
            names, rows = np.unique(a.clusters), []
            for _ in range(400):
                drawn = names[draws.integers(0, len(names), len(names))]
                chosen = np.concatenate([np.flatnonzero(a.clusters == name) for name in drawn])
                of_class = [chosen[a.target[chosen] == c] for c in (0, 1)]
                figures = [
                    np.mean([np.mean(x.scores[0].argmax(1)[members] == c) for c, members in enumerate(of_class)])
                    for x in (a, b)
                ]
                rows.append(figures[0] - figures[1])
            values.append(rows)
        expected = np.quantile(np.mean(values, axis=0), [0.025, 0.975])
        assert (result.low, result.high) == pytest.approx(tuple(expected), abs=1e-6)
