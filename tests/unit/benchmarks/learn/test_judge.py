"""The judge against scikit-learn's own cross-validation."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

from benchmarks.learn.judge import HEADS, Folds, held_out_groups, read_tiles


@pytest.fixture
def labelled(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of three overlapping classes, 60 photographs of up to four tiles each."""
    groups = np.repeat(np.arange(60), rng.integers(1, 5, 60))
    labels = np.array(["a", "b", "c"])[groups % 3]
    features = rng.normal(size=(len(groups), 8)) + (groups % 3)[:, None] * rng.normal(size=8) * 0.4
    return features, labels, groups


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_accuracy_is_that_of_scikit_learns_cross_validation(labelled):
    features, labels, groups = labelled
    folds, splitter = Folds(labels, groups), StratifiedGroupKFold(5, shuffle=True, random_state=0)

    def expected(head, x) -> float:
        return cross_val_score(head, x, labels, groups=groups, cv=splitter, scoring="balanced_accuracy").mean()

    def found(name: str) -> float:
        return folds.accuracy(folds.predict(HEADS[name], features), resamples=0).value

    # Scaling of rows may be done before the folds, scaling of columns may not.
    assert found("knn") == pytest.approx(expected(KNeighborsClassifier(20), normalize(features)))
    scores = []
    for train, test in splitter.split(features, labels, groups):
        scaler = StandardScaler().fit(features[train])
        head = LogisticRegression(C=0.1, max_iter=3000).fit(scaler.transform(features[train]), labels[train])
        right = head.predict(scaler.transform(features[test])) == labels[test]
        scores.append(np.mean([right[labels[test] == label].mean() for label in "abc"]))
    assert found("logistic") == pytest.approx(np.mean(scores))


def test_no_photograph_is_in_two_folds(labelled):
    _, labels, groups = labelled
    for train, test in Folds(labels, groups).parts:
        assert not set(groups[train]) & set(groups[test])


def test_several_runs_count_alike(labelled, rng):
    _, labels, groups = labelled
    folds = Folds(labels, groups)
    said = rng.integers(0, 3, (4, len(labels)))
    each = [folds.accuracy(one, resamples=0).value for one in said]
    value, low, high, _ = folds.accuracy(said, resamples=200)
    assert value == pytest.approx(np.mean(each))
    assert low < value < high


def test_held_out_photographs_are_a_fraction_that_stays(rng):
    groups = np.array([f"photo {number}" for number in rng.integers(0, 40, 500)])
    held_out = held_out_groups(groups, 0.25)
    assert len(held_out) == 10 and set(held_out) < set(groups)
    np.testing.assert_array_equal(held_out, held_out_groups(rng.permutation(groups), 0.25))


def test_tiles_are_read_with_their_photographs(tmp_path, rng):
    images = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    data = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        data.append(buffer.getvalue())
    path = tmp_path / "tiles.parquet"
    table = pa.table({"image_bytes": data, "label": ["x", "y", "x"], "patient": ["p", "q", "r"]})
    pq.write_table(table, path)
    tiles = read_tiles(path, ["p", "r"])
    np.testing.assert_array_equal(np.stack(tiles.images), images[[0, 2]])
    assert tiles.groups.tolist() == ["p", "r"] and tiles.labels.tolist() == ["x", "x"]
    pq.write_table(table.drop_columns("patient"), path)
    with pytest.raises(ValueError, match="patient"):
        read_tiles(path)
