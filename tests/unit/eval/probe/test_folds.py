"""Folds and validation parts never divide a group, and spread classes evenly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from dinov2.eval.probe.folds import divide, group_folds


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 15)), min_size=8, max_size=200), st.integers(0, 5))
def test_groups_stay_whole(rows, seed):
    labels, groups = np.array(rows).T
    number = len(np.unique(groups))
    if number < 2:
        return
    folds = group_folds(labels, groups, min(4, number), seed)
    assert set(folds) == set(range(min(4, number)))
    assert all(len(set(folds[groups == group])) == 1 for group in groups)


def spread(labels, folds):
    fractions = [[np.mean(folds[labels == c] == f) for f in range(5)] for c in np.unique(labels)]
    return np.std(fractions)


def test_classes_are_spread_as_well_as_by_scikit_learn():
    rng = np.random.default_rng(0)
    patient_label = rng.choice([0, 1, 2], 80, p=[0.6, 0.3, 0.1])
    groups = np.repeat(np.arange(80), rng.integers(1, 30, 80))
    labels = patient_label[groups]
    theirs = np.empty(len(labels), int)
    splits = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(labels, labels, groups)
    for fold, (_, test) in enumerate(splits):
        theirs[test] = fold
    assert spread(labels, group_folds(labels, groups, 5)) <= 1.1 * spread(labels, theirs)


def test_single_tiles_are_stratified():
    labels = np.repeat([0, 1], [80, 20])
    folds = group_folds(labels, np.arange(100), 5)
    assert [[np.sum((folds == f) & (labels == c)) for c in (0, 1)] for f in range(5)] == [[16, 4]] * 5


def test_divisions_of_folds():
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 40, 400)
    labels = groups % 2
    divisions = divide(labels, groups, None, 4, seed=2)
    assert np.array_equal(np.sort(np.concatenate([d.test for d in divisions])), np.arange(400))
    for d in divisions:
        assert np.array_equal(np.sort(np.concatenate([d.train, d.val, d.test])), np.arange(400))
        parts = [set(groups[part]) for part in (d.train, d.val, d.test)]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert all(len(set(labels[part])) == 2 for part in (d.train, d.val, d.test))


def test_given_splits_are_kept():
    splits = np.array(["train", "val", "test", "train"])
    (division,) = divide(np.array([0, 0, 0, 1]), np.arange(4), splits, 5)
    assert [part.tolist() for part in (division.train, division.val, division.test)] == [[0, 3], [1], [2]]


def test_validation_is_made_of_training_groups():
    splits = np.repeat(["train", "test"], [50, 50])
    groups = np.repeat(np.arange(20), 5)
    (division,) = divide(groups % 2, groups, splits, 5)
    assert len(division.val) == 10 and set(division.val) | set(division.train) == set(range(50))
    assert not set(groups[division.val]) & set(groups[division.train])


def test_what_cannot_be_divided():
    with pytest.raises(ValueError, match="3 groups cannot be divided into 5 folds; 2 to 3 are possible"):
        group_folds(np.array([0, 1, 1]), np.arange(3), 5)
    with pytest.raises(ValueError, match="No training tile is of class number 1"):
        divide(np.array([0, 0, 0, 1]), np.arange(4), np.array(["train"] * 3 + ["test"]), 5)
    with pytest.raises(ValueError, match="All training tiles are of one group"):
        divide(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), np.array(["train", "train", "test", "test"]), 5)
