"""Divisions of tiles that never part a group (a patient, a slide)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class Division:
    """Row numbers to fit on, to choose the head on, and to report on; int64, ascending."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


VALIDATION_SHARE = 5
"""Where there is no validation part, one in so many of the training groups is it."""


def group_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Fold of each row, int64 (N,): groups stay whole, and each class is spread as evenly as they permit.

    Groups come in a random order, the large ones first; each goes where the shares of the classes over the folds
    vary least after.

    Args:
        labels: class number of each row, int64 (N,).
        groups: group number of each row, int64 (N,), of any values.
        folds: number of folds, at least 2.
        seed: of the order.

    Raises:
        ValueError: if there are fewer groups than folds.
    """
    _, members = np.unique(groups, return_inverse=True)
    number = int(members.max()) + 1
    if not 2 <= folds <= number:
        raise ValueError(f"{number} groups cannot be divided into {folds} folds; 2 to {number} are possible.")
    counts = np.zeros((number, int(labels.max()) + 1))
    np.add.at(counts, (members, labels), 1)
    shares = counts / np.maximum(counts.sum(0), 1)
    order = np.random.default_rng(seed).permutation(number)
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    filled = np.zeros((folds, counts.shape[1]))
    sizes, fold_of = np.zeros(folds), np.empty(number, np.int64)
    for group in order:
        spread = [_spread_with(filled, fold, shares[group]) for fold in range(folds)]
        best = min(range(folds), key=lambda fold: (round(spread[fold], 12), sizes[fold]))
        filled[best] += shares[group]
        sizes[best] += counts[group].sum()
        fold_of[group] = best
    return fold_of[members]


def _spread_with(filled: np.ndarray, fold: int, share: np.ndarray) -> float:
    after = filled.copy()
    after[fold] += share
    return float(after.var(0).sum())


def divide(
    labels: np.ndarray, groups: np.ndarray, splits: np.ndarray | None, folds: int, seed: int = 0
) -> list[Division]:
    """Divisions to probe on: that of the splits, or one per fold with each fold as the test part once.

    A validation part that is not given is made of a fifth of the training groups.

    Raises:
        ValueError: if there are too few groups, or a part lacks a class that is tested.
    """
    if splits is not None:
        parts = [tuple(np.flatnonzero(splits == name) for name in ("train", "val", "test"))]
        if shared := len(np.intersect1d(groups[splits == "test"], groups[splits != "test"])):
            logger.warning("%d patients or slides have tiles both in the test split and in others.", shared)
    else:
        fold_of = group_folds(labels, groups, folds, seed)
        parts = [
            (np.flatnonzero(fold_of != f), np.empty(0, np.int64), np.flatnonzero(fold_of == f)) for f in range(folds)
        ]
    return [_complete(labels, groups, *part, seed) for part in parts]


def _complete(
    labels: np.ndarray, groups: np.ndarray, train: np.ndarray, val: np.ndarray, test: np.ndarray, seed: int
) -> Division:
    if not len(val):
        number = len(np.unique(groups[train]))
        if number < 2:
            raise ValueError("All training tiles are of one group; 2 are needed, one of them to choose the head on.")
        chosen = group_folds(labels[train], groups[train], min(VALIDATION_SHARE, number), seed) == 0
        train, val = train[~chosen], train[chosen]
    if lacking := np.setdiff1d(labels[test], labels[train]).tolist():
        raise ValueError(f"No training tile is of class number {lacking[0]}, which is tested; use fewer folds.")
    return Division(train, val, test)
