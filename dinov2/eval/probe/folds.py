"""Divisions of tiles that never part a group (a patient, a slide)."""

import logging
import warnings
from typing import NamedTuple

import numpy as np

logger = logging.getLogger("dinov2")

VALIDATION_PART = 5  # where there is no validation part, one in so many of the training groups is it


class Division(NamedTuple):
    """Row numbers to fit on, to choose the head on, and to report on; int64, ascending."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    fit: np.ndarray  # for what chooses nothing: the training part, whole again where the validation part is of it


def group_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Fold of each row from its class and group numbers, all int64 (N,).

    Groups stay whole, and each class is spread as evenly as they permit: scikit-learn's `StratifiedGroupKFold`, or
    `StratifiedKFold` where every row is a group of its own. Raises ValueError if there are fewer groups than folds, no
    class has as many rows, or fewer than 2 folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    number = len(np.unique(groups))
    most = min(number, np.bincount(labels).max())
    if not 2 <= folds <= most:
        possible = f"2 to {most} are possible" if most >= 2 else "a class needs at least 2 rows to be divided"
        raise ValueError(f"{number} groups cannot be divided into {folds} folds; {possible}.")
    # With a group per row both spread classes alike, but the former takes 10 s for 50,000 rows, the latter 10 ms.
    single = number == len(groups)
    splitter = (StratifiedKFold if single else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed % 2**32)
    fold_of = np.empty(len(labels), np.int64)
    with warnings.catch_warnings():
        # That a class is rarer than folds are many: `divide` refuses what comes of it where it matters.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        for fold, (_, rows) in enumerate(splitter.split(labels, labels, None if single else groups)):
            fold_of[rows] = fold
    return fold_of


def divide(
    labels: np.ndarray, groups: np.ndarray, splits: np.ndarray | None, folds: int, seed: int = 0
) -> list[Division]:
    """Divisions to probe on: that of the splits, or one per fold with each fold as the test part once.

    A validation part that is not given is made of a fifth of the training groups. Raises ValueError if there are too
    few groups, or a part lacks a class that is tested.
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
        fit = train
        if not len(val):
            if (number := len(np.unique(groups[train]))) < 2:
                raise ValueError("All training tiles are of one group; 2 are needed, one to choose the head on.")
            most = min(VALIDATION_PART, number, np.bincount(labels[train]).max())
            chosen = group_folds(labels[train], groups[train], most, seed) == 0
            train, val = train[~chosen], train[chosen]
        if lacking := np.setdiff1d(labels[test], labels[train]).tolist():
            raise ValueError(f"No training tile is of class number {lacking[0]}, which is tested; use fewer folds.")
        divisions.append(Division(train, val, test, fit))
    return divisions
