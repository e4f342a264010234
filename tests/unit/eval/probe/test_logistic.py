"""Logistic regression against scikit-learn's pipeline called directly."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dinov2.eval.datasets.labels import LabelledTiles
from dinov2.eval.probe.logistic import Logistic, logistic_scores
from dinov2.eval.probe.options import Probing
from dinov2.eval.probe.task import Fold, TaskFeatures


def clouds(count, seed, classes=3, width=8):
    """Directions of very different variance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    rows = np.random.default_rng(9).normal(size=(classes, width))[labels] + 1.5 * rng.normal(size=(count, width))
    return (rows * np.geomspace(1e-3, 1e3, width)).astype(np.float32), labels


def fold_of(train, labels, test, classes):
    rows = torch.from_numpy(train), torch.from_numpy(labels)
    nothing = rows[0][:0], rows[1][:0]
    return Fold(0, nothing, nothing, torch.from_numpy(test), classes, fit=rows)


@pytest.mark.parametrize("c", [1e-3, 0.1])
@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_are_those_of_the_penalised_likelihood(c, classes):
    """The float64 objective, at weights that are recovered from the probabilities, has no gradient."""
    (train, labels), (test, _) = clouds(300, 0, classes), clouds(100, 1, classes)
    scores = logistic_scores(fold_of(train, labels, np.concatenate([train, test]), classes), c)
    assert scores.shape == (1, 400, classes)
    found = scores[0].double().numpy()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    rows = (np.concatenate([train, test]).astype(np.float64) - train.mean(0, np.float64)) / train.std(0, dtype=float)
    design = np.column_stack([rows, np.ones(400)])
    # Probabilities are linear in their logarithms' differences, of test rows as of the others.
    weights, *_ = np.linalg.lstsq(design, np.log(found) - np.log(found).mean(1, keepdims=True))
    np.testing.assert_allclose(np.exp(log_softmax(design @ weights, axis=1)), found, atol=1e-4)
    gradient = design[:300].T @ (found[:300] - np.eye(classes)[labels])
    # One vector of weights stands for two classes: of w and -w each is half of it, and so is its penalty.
    penalty = weights[:-1] / c * (2 if classes == 2 else 1)
    np.testing.assert_allclose(gradient[:-1] + penalty, 0, atol=0.2 if c < 0.1 else 0.05)


def test_a_class_that_is_not_fitted_on_is_never_said():
    (train, labels), (test, _) = clouds(200, 0), clouds(50, 1)
    (scores,) = logistic_scores(fold_of(train, np.where(labels == 1, 3, labels), test, 5))
    assert (scores[:, [1, 4]] == 0).all() and set(scores.argmax(1).tolist()) == {0, 2, 3}


@pytest.mark.parametrize("options", [Logistic.Options(), Logistic.Options(C=10.0)])
def test_figures_are_those_of_scikit_learn(options):
    """Of folds that keep patients whole, and without a part to choose on."""
    features, labels = clouds(400, 0)
    patients = np.random.default_rng(2).integers(0, 60, 400)
    tiles = LabelledTiles(None, labels, ("a", "b", "c"), patients=tuple(f"{p:02}" for p in patients))
    task = TaskFeatures("t", features, tiles, Probing(("logistic",), resamples=50), torch.device("cpu"))
    found = {result.metric: result for result in Logistic(options).measure(task)}
    head = make_pipeline(StandardScaler(), LogisticRegression(C=options.C, max_iter=3000))
    expected, areas = [], []
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(features, labels, patients):
        head.fit(features[train], labels[train])
        expected.append(balanced_accuracy_score(labels[test], head.predict(features[test])))
        areas.append(roc_auc_score(labels[test], head.predict_proba(features[test]), multi_class="ovr"))
    result = found["balanced_accuracy"]
    assert (result.value, result.sd) == pytest.approx((np.mean(expected), np.std(expected, ddof=1)))
    assert found["auroc"].value == pytest.approx(np.mean(areas))
    assert (result.runs, result.count, result.division) == (5, 400, "patient")
    assert result.low < result.value < result.high
