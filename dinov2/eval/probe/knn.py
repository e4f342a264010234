"""k nearest neighbours by cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

TEMPERATURE = 0.07
_QUERIES = 512


@torch.no_grad()
def knn_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    ks: Sequence[int] = (20,),
    temperature: float | None = TEMPERATURE,
) -> dict[int, Tensor]:
    """Shares of the vote for each class, float32 (M, C) by k.

    ::

        score(c) ~ sum_{i among the k nearest, y_i = c} exp(cos(x, x_i) / T)

    as in DINO (Caron et al. 2021, arXiv:2104.14294), or one vote each.

    Args:
        train: features (N, D).
        labels: class numbers, int64 (N,).
        test: features (M, D), on the same device.
        classes: C.
        ks: numbers of neighbours; more than N means N.
        temperature: T, or None for one vote each.
    """
    train, votes = normalize(train.float()), one_hot(labels, classes).float()
    most = min(max(ks), len(train))
    scores: dict[int, list[Tensor]] = {k: [] for k in ks}
    for queries in normalize(test.float()).split(_QUERIES):
        nearness, nearest = (queries @ train.T).topk(most)
        # Divided by the nearest one's weight, which changes no share and cannot overflow.
        weights = (
            torch.ones_like(nearness)
            if temperature is None
            else ((nearness - nearness[:, :1]) / temperature).exp()
        )
        for k in ks:
            kept = weights[:, :k]
            scores[k].append((kept[..., None] * votes[nearest[:, :k]]).sum(1) / kept.sum(1, keepdim=True))
    return {k: torch.cat(parts) for k, parts in scores.items()}
