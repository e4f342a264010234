"""k-NN against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dinov2.eval.probe.knn import knn_scores
from dinov2.eval.probe.task import Fold


def clouds(rng, count, classes=3, width=16, spread=1.5):
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(9).normal(size=(classes, width))
    return (centres[labels] + spread * rng.normal(size=(count, width))).astype(np.float32), labels


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [None, 0.07, 1e-3])
def test_shares_of_the_vote(k, temperature):
    rng = np.random.default_rng(0)
    (train, labels), (test, _) = clouds(rng, 300), clouds(rng, 700)
    weights = "uniform" if temperature is None else lambda d: np.exp((d[:, :1] - d) / temperature)
    reference = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute").fit(train, labels)
    train, labels, test = map(torch.from_numpy, (train, labels, test))
    (scores,) = knn_scores(Fold(0, (train, labels), (train, labels), test, 3), k, temperature)
    np.testing.assert_allclose(scores, reference.predict_proba(test), atol=2e-3 if temperature == 1e-3 else 1e-5)


def test_more_neighbours_than_tiles():
    train, labels = torch.eye(3), torch.tensor([0, 1, 1])
    (scores,) = knn_scores(Fold(0, (train, labels), (train, labels), torch.ones(1, 3), 2), 20, None)
    torch.testing.assert_close(scores, torch.tensor([[1 / 3, 2 / 3]]))
