"""Few-shot classification by the nearest centroid: SimpleShot."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize


def few_shot_scores(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, shots: int, draws: int = 100, seed: int = 0
) -> Tensor:
    """Nearness of test rows to class centroids of a few drawn training rows, float32 (draws, M, C).

    SimpleShot (Wang et al. 2019, arXiv:1911.04623): the mean of all training rows, without their labels, is
    subtracted, and rows are scaled to length 1. ``score(c) = -|x - mean of the shots of c|^2``.

    Args:
        train: features (N, D).
        labels: class numbers, int64 (N,).
        test: features (M, D), on the same device.
        classes: C, each with at least `shots` training rows.
        shots: rows drawn per class, without replacement.
        draws: how often.
        seed: of the draws.

    Raises:
        ValueError: a class has too few rows.
    """
    numbers = labels.cpu().numpy()
    of_class = [np.flatnonzero(numbers == number) for number in range(classes)]
    if (least := min(map(len, of_class))) < shots:
        raise ValueError(f"{shots} shots per class cannot be drawn: a class has {least} training tiles.")
    centre = train.float().mean(0)
    train, test = normalize(train.float() - centre), normalize(test.float() - centre)
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(draws):
        drawn = np.stack([rng.choice(rows, shots, replace=False) for rows in of_class])
        centroids = train[torch.from_numpy(drawn).to(train.device)].mean(1)
        scores.append(2 * test @ centroids.T - centroids.square().sum(1) - 1)
    return torch.stack(scores)
