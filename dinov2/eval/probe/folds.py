"""Divisions of tiles that never part a group (a patient, a slide)."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

logger = logging.getLogger("dinov2")

VALIDATION_PART = 5  # where there is no validation part, one in so many of the training groups is it


class Division(NamedTuple):
    """Row numbers to fit on, to choose the head on, and to report on; int64, ascending."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def group_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Fold of each row from its class and group numbers, all int64 (N,).

    Groups stay whole, and each class is spread as evenly as they permit: groups come in a random order, the large
    ones first, and each goes where the fractions of the classes over the folds vary least after.

    Raises:
        ValueError: if there are fewer groups than folds, or fewer than 2 folds.
    """
    _, members = np.unique(groups, return_inverse=True)
    number = int(members.max()) + 1
    if not 2 <= folds <= number:
        raise ValueError(f"{number} groups cannot be divided into {folds} folds; 2 to {number} are possible.")
    counts = np.zeros((number, int(labels.max()) + 1))
    np.add.at(counts, (members, labels), 1)
    fractions = counts / np.maximum(counts.sum(0), 1)
    order = np.random.default_rng(seed).permutation(number)
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    filled, sizes = np.zeros((folds, counts.shape[1])), np.zeros(folds)
    fold_of, each = np.empty(number, np.int64), np.eye(folds)[:, :, None]
    for group in order:
        after = filled + each * fractions[group]  # [i, j]: of fold j if the group goes to fold i
        spread = after.var(1).sum(-1).tolist()
        best = min(range(folds), key=lambda fold: (round(spread[fold], 12), sizes[fold]))
        filled, fold_of[group] = after[best], best
        sizes[best] += counts[group].sum()
    return fold_of[members]


def divide(
    labels: np.ndarray, groups: np.ndarray, splits: np.ndarray | None, folds: int, seed: int = 0
) -> list[Division]:
    """Divisions to probe on: that of the splits, or one per fold with each fold as the test part once.

    A validation part that is not given is made of a fifth of the training groups.

    Raises:
        ValueError: if there are too few groups, or a part lacks a class that is tested.
    """
    if splits is not None:
        parts = [[np.flatnonzero(splits == name) for name in ("train", "val", "test")]]
        if shared := len(np.intersect1d(groups[splits == "test"], groups[splits != "test"])):
            logger.warning("%d patients or slides have tiles both in the test split and in others.", shared)
    else:
        fold_of = group_folds(labels, groups, folds, seed)
        parts = [[np.flatnonzero(fold_of != f), np.empty(0), np.flatnonzero(fold_of == f)] for f in range(folds)]
    divisions = []
    for train, val, test in parts:
        if not len(val):
            if (number := len(np.unique(groups[train]))) < 2:
                raise ValueError("All training tiles are of one group; 2 are needed, one to choose the head on.")
            chosen = group_folds(labels[train], groups[train], min(VALIDATION_PART, number), seed) == 0
            train, val = train[~chosen], train[chosen]
        if lacking := np.setdiff1d(labels[test], labels[train]).tolist():
            raise ValueError(f"No training tile is of class number {lacking[0]}, which is tested; use fewer folds.")
        divisions.append(Division(train, val, test))
    return divisions
