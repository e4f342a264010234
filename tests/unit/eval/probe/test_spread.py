"""RankMe, the mean cosine and ODCorr against closed forms, a plain double loop and numpy."""

import math

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from dinov2.data.source import Origin
from dinov2.eval import mean_cosine, odcorr, rankme, site_leakage


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


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_odcorr_formula(shape):
    rows = np.random.default_rng(0).normal(1, 1, shape).astype(np.float32)
    rho = np.corrcoef(rows.astype(np.float64))
    off_diagonal = rho[~np.eye(len(rows), dtype=bool)]
    assert odcorr(rows) == pytest.approx(np.sqrt(np.mean(off_diagonal**2)), rel=1e-6)


def test_odcorr_limits():
    direction = np.random.default_rng(1).normal(size=32)
    assert odcorr(np.tile(direction, (8, 1))) == pytest.approx(1)
    assert odcorr(np.stack([direction, -3 * direction + 2])) == pytest.approx(1)
    hadamard = np.array([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])  # centred and orthogonal
    assert odcorr(hadamard) == pytest.approx(0, abs=1e-7)
    assert np.isnan(odcorr(np.ones((3, 4))))
    with pytest.raises(ValueError, match="1 is given, 2 are needed"):
        odcorr(hadamard[:1])


def test_site_leakage_of_the_nearest_of_other_slides():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 6)) + 2
    slides = [f"slide{number % 8}" for number in range(40)]
    origins = [Origin(slide, "", f"site{int(slide[-1]) % 3}") for slide in slides]
    shares, chances = [], []
    for number in range(40):
        others = [i for i in range(40) if slides[i] != slides[number]]
        same = np.array([origins[i].site == origins[number].site for i in others])
        nearest = NearestNeighbors(n_neighbors=7, metric="cosine").fit(rows[others])
        shares.append(same[nearest.kneighbors(rows[[number]])[1][0]].mean())
        chances.append(same.mean())
    assert site_leakage(rows, origins, 7) == pytest.approx((np.mean(shares), np.mean(chances)))


def test_sites_apart_leak_all_and_fewer_than_two_nothing_to_tell():
    rows = np.repeat(np.eye(2), 12, axis=0)
    origins = [Origin(f"slide{number // 3}", "", "ab"[number // 12]) for number in range(24)]
    assert site_leakage(rows, [*origins[:-1], Origin("other")], 5)[0] == 1.0
    with pytest.raises(ValueError):
        site_leakage(rows, [Origin(origin.slide, "", "a") for origin in origins])
