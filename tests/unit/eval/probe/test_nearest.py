"""k-NN against scikit-learn's, and few-shot against its nearest centroid on the same shots."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dinov2.eval.probe.nearest import few_shot_scores, knn_scores, standardized
from dinov2.eval.probe.task import Fold


def clouds(rng, count, classes=3, width=16, spread=1.5):
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(9).normal(size=(classes, width))
    return (centres[labels] + spread * rng.normal(size=(count, width))).astype(np.float32), labels


def fold_of(train, labels, test, classes):
    rows = train, labels
    return Fold(0, rows, rows, test, classes, fit=rows)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [None, 0.07, 1e-3])
def test_fractions_of_the_vote(k, temperature):
    rng = np.random.default_rng(0)
    (train, labels), (test, _) = clouds(rng, 300), clouds(rng, 700)
    weights = "uniform" if temperature is None else lambda d: np.exp((d[:, :1] - d) / temperature)
    reference = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute").fit(train, labels)
    train, labels, test = map(torch.from_numpy, (train, labels, test))
    (scores,) = knn_scores(fold_of(train, labels, test, 3), k, temperature)
    np.testing.assert_allclose(scores, reference.predict_proba(test), atol=2e-3 if temperature == 1e-3 else 1e-5)


def test_neighbours_of_standardised_features():
    """Three directions of large variance, which know nothing, hide the others from the cosine."""
    rng = np.random.default_rng(0)
    (train, labels), (test, target) = clouds(rng, 300), clouds(rng, 700)
    for rows in (train, test):
        rows[:, :3] = 1000 * rng.normal(size=(len(rows), 3))
        rows[:, 3] = 7
    classifier = KNeighborsClassifier(20, metric="cosine", algorithm="brute")
    reference = make_pipeline(StandardScaler(), classifier).fit(train, labels)
    fold = fold_of(*map(torch.from_numpy, (train, labels, test)), 3)
    scaled = standardized(fold)
    (plain,), (scores,) = knn_scores(fold, 20, None), knn_scores(scaled, 20, None)
    np.testing.assert_allclose(scores, reference.predict_proba(test), atol=1e-5)
    accuracy, plain_accuracy = (np.mean(found.argmax(1).numpy() == target) for found in (scores, plain))
    assert plain_accuracy < 0.5 < 0.8 < accuracy
    assert torch.equal(fold.test, torch.from_numpy(test)) and torch.equal(scaled.fit[1], fold.fit[1])


def test_more_neighbours_than_tiles():
    train, labels = torch.eye(3), torch.tensor([0, 1, 1])
    (scores,) = knn_scores(fold_of(train, labels, torch.ones(1, 3), 2), 20, None)
    torch.testing.assert_close(scores, torch.tensor([[1 / 3, 2 / 3]]))


def scores_of(train, labels, test, classes, *numbers, **others):
    return few_shot_scores(fold_of(train, labels, test, classes), *numbers, **others)


def test_all_tiles_as_shots_is_the_nearest_centroid():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    train = (rng.normal(size=(3, 8))[labels] + rng.normal(size=(90, 8))).astype(np.float32)
    test = rng.normal(size=(200, 8)).astype(np.float32)

    def scaled(rows):
        rows = rows - train.mean(0)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    reference = NearestCentroid().fit(scaled(train), labels)
    scores = scores_of(*map(torch.from_numpy, (train, labels, test)), 3, shots=30, draws=2)
    for draw in scores:
        np.testing.assert_array_equal(draw.argmax(1), reference.predict(scaled(test)))
    distances = np.linalg.norm(scaled(test)[:, None] - reference.centroids_, axis=2)
    np.testing.assert_allclose(scores[0], -(distances**2), atol=1e-5)


def test_draws_differ_and_repeat_with_the_seed():
    rows, labels = torch.randn(40, 6), torch.arange(40) % 2
    first, again, other = (scores_of(rows, labels, rows, 2, 1, 3, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_too_few_tiles():
    with pytest.raises(ValueError, match="4 shots per class cannot be drawn: a class has 3"):
        scores_of(torch.randn(7, 2), torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.randn(1, 2), 2, 4)
