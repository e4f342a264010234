"""k nearest neighbours by cosine similarity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from dinov2.configs.fields import key
from dinov2.eval.probe.results import Result
from dinov2.eval.probe.task import Fold, Probe, TaskFeatures

TEMPERATURE = 0.07
_QUERIES = 512


class Knn(Probe):
    """k-NN with DINO's weighted vote, ``knn<k>``, and with one vote each, ``knn<k>_majority``."""

    @dataclass(frozen=True)
    class Options:
        """Numbers of neighbours."""

        neighbours: tuple[int, ...] = key((5, 20), "neighbours of k-NN", least=1)

    def measure(self, task: TaskFeatures) -> list[Result]:
        """Classify by each vote and number of neighbours."""
        results = []
        for vote, temperature in (("", TEMPERATURE), ("_majority", None)):
            for k in self.options.neighbours:

                def scores(fold: Fold, k: int = k, temperature: float | None = temperature) -> Tensor:
                    return knn_scores(*fold.train, fold.test, fold.classes, k, temperature)[None]

                results += task.classify(f"knn{k}{vote}", scores)
        return results


@torch.no_grad()
def knn_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    k: int = 20,
    temperature: float | None = TEMPERATURE,
) -> Tensor:
    """Shares of the vote for each class, float32 (M, C).

    ::

        score(c) ~ sum_{i among the k nearest, y_i = c} exp(cos(x, x_i) / T)

    as in DINO (Caron et al. 2021, arXiv:2104.14294), or one vote each.

    Args:
        train: features (N, D).
        labels: class numbers, int64 (N,).
        test: features (M, D), on the same device.
        classes: C.
        k: number of neighbours; more than N means N.
        temperature: T, or None for one vote each.
    """
    train, votes = normalize(train.float()), one_hot(labels, classes).float()
    scores = []
    for queries in normalize(test.float()).split(_QUERIES):
        nearness, nearest = (queries @ train.T).topk(min(k, len(train)))
        # Divided by the nearest one's weight, which changes no share and cannot overflow.
        weights = (
            torch.ones_like(nearness)
            if temperature is None
            else ((nearness - nearness[:, :1]) / temperature).exp()
        )
        scores.append((weights[..., None] * votes[nearest]).sum(1) / weights.sum(1, keepdim=True))
    return torch.cat(scores)
