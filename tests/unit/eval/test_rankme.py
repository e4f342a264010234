"""RankMe and the mean cosine against closed forms and a plain double loop."""

import math

import numpy as np
import pytest

from dinov2.eval import mean_cosine, rankme


def test_rankme_of_orthonormal_rows_is_their_number():
    rows, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 10)))
    assert rankme(rows.T) == pytest.approx(10)


def test_rankme_of_a_collapsed_embedding_is_one():
    direction = np.random.default_rng(0).normal(size=32)
    assert rankme(np.outer(np.arange(1, 9), direction)) == pytest.approx(1)


def test_rankme_of_known_singular_values():
    u, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(20, 2)))
    v, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(7, 2)))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(u @ np.diag([6.0, 2.0]) @ v.T) == pytest.approx(math.exp(entropy))


def test_mean_cosine_equals_the_double_loop():
    rows = np.random.default_rng(3).normal(size=(12, 5)).astype(np.float32)
    pairs = [
        rows[i].astype(float) @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
        for i in range(12)
        for j in range(12)
        if i != j
    ]
    assert mean_cosine(rows) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_mean_cosine_of_a_simplex_is_the_least_possible():
    simplex = np.eye(6) - 1 / 6
    assert mean_cosine(simplex) == pytest.approx(-1 / 5)
