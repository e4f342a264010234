"""k nearest neighbours by cosine similarity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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
                results += task.classify(f"knn{k}{vote}", partial(knn_scores, k=k, temperature=temperature))
        return results


@torch.no_grad()
def knn_scores(fold: Fold, k: int = 20, temperature: float | None = TEMPERATURE) -> Tensor:
    """Fractions of the vote of the k nearest (or all N) training rows for each class, float32 (1, M, C).

    ::

        score(c) ~ sum_{i among the k nearest, y_i = c} exp(cos(x, x_i) / T)

    as in DINO (Caron et al. 2021, arXiv:2104.14294), or where the temperature T is None one vote each.
    """
    train, votes = normalize(fold.train[0].float()), one_hot(fold.train[1], fold.classes).float()
    scores = []
    for queries in normalize(fold.test.float()).split(_QUERIES):
        nearness, nearest = (queries @ train.T).topk(min(k, len(train)))
        weights = torch.ones_like(nearness)
        if temperature is not None:
            # Divided by the nearest one's weight, which changes no fraction and cannot overflow.
            weights = ((nearness - nearness[:, :1]) / temperature).exp()
        scores.append((weights[..., None] * votes[nearest]).sum(1) / weights.sum(1, keepdim=True))
    return torch.cat(scores)[None]
