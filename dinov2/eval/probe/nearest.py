"""Classification without training: by the nearest neighbours, and by the nearest centroid."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dinov2.configs.fields import key
from dinov2.eval.probe.results import Result
from dinov2.eval.probe.task import Fold, Probe, TaskFeatures

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("dinov2")

TEMPERATURE = 0.07
_QUERIES = 512


class Knn(Probe):
    """k-NN with DINO's weighted vote, ``knn<k>``, and with one vote each, ``knn<k>_majority``.

    ``knn<k>_standardized`` is the weighted vote on features of mean 0 and deviation 1: a few directions of large
    variance rule the cosine, and where the plain one is lower, they hide what the others know.
    """

    @dataclass(frozen=True)
    class Options:
        """Numbers of neighbours."""

        neighbours: tuple[int, ...] = key((5, 20), "neighbours of k-NN", least=1)

    def measure(self, task: TaskFeatures) -> list[Result]:
        """Classify by each vote and number of neighbours."""
        variants = {
            "": knn_scores,
            "_majority": partial(knn_scores, temperature=None),
            "_standardized": lambda fold, k: knn_scores(standardized(fold), k),
        }
        results = []
        for variant, scores in variants.items():
            for k in self.options.neighbours:
                results += task.classify(f"knn{k}{variant}", partial(scores, k=k))
        return results


def standardized(fold: Fold) -> Fold:
    """The features that are fitted on and those of the test rows, less the mean and over the deviation of the former.

    Directions without deviation are not divided.
    """
    import torch
    from sklearn.preprocessing import StandardScaler

    (rows, labels), device = fold.fit, fold.test.device
    scaler = StandardScaler().fit(rows.cpu().numpy())
    rows, test = (torch.from_numpy(scaler.transform(part.cpu().numpy())).to(device) for part in (rows, fold.test))
    return replace(fold, fit=(rows, labels), test=test)


def knn_scores(fold: Fold, k: int = 20, temperature: float | None = TEMPERATURE) -> Tensor:
    """Fractions of the vote of the k nearest (or all N) rows to fit on for each class, float32 (1, M, C).

        score(c) ~ sum_{i among the k nearest, y_i = c} exp(cos(x, x_i) / T)

    as in DINO (Caron et al. 2021, arXiv:2104.14294), or where the temperature T is None one vote each.
    """
    import torch
    from torch.nn.functional import normalize, one_hot

    train, votes = normalize(fold.fit[0].float()), one_hot(fold.fit[1], fold.classes).float()
    scores = []
    for queries in normalize(fold.test.float()).split(_QUERIES):
        nearness, nearest = (queries @ train.T).topk(min(k, len(train)))
        weights = torch.ones_like(nearness)
        if temperature is not None:
            # Divided by the nearest one's weight, which changes no fraction and cannot overflow.
            weights = ((nearness - nearness[:, :1]) / temperature).exp()
        scores.append((weights[..., None] * votes[nearest]).sum(1) / weights.sum(1, keepdim=True))
    return torch.cat(scores)[None]


class FewShot(Probe):
    """SimpleShot from several numbers of tiles per class, ``few_shot<shots>``, over many draws of them."""

    @dataclass(frozen=True)
    class Options:
        """Numbers of tiles, and of draws."""

        shots: tuple[int, ...] = key((1, 4, 16), "training tiles per class of few-shot", least=1)
        draws: int = key(100, "draws of few-shot", least=1)

    def measure(self, task: TaskFeatures) -> list[Result]:
        """Classify from each number of tiles that every class has."""
        counts = [np.bincount(task.rows.labels[d.train], minlength=task.rows.classes) for d in task.divisions]
        least = min(count.min() for count in counts)
        if beyond := [shots for shots in self.options.shots if shots > least]:
            logger.warning("Few-shot with %s tiles per class is left out: a class has %d.", beyond, least)
        results = []
        for shots in self.options.shots:
            if shots <= least:
                scores = partial(few_shot_scores, shots=shots, draws=self.options.draws, seed=task.probing.seed)
                # The nearest of few centroids ranks tiles poorly, and a hundred draws would take long.
                results += task.classify(f"few_shot{shots}", scores, with_auroc=False)
        return results


def few_shot_scores(fold: Fold, shots: int, draws: int = 100, seed: int = 0) -> Tensor:
    """Nearness of test rows to class centroids of a few drawn training rows, float32 (draws, M, C).

    SimpleShot (Wang et al. 2019, arXiv:1911.04623): the mean of all training rows, without their labels, is
    subtracted, and rows are scaled to length 1. ``score(c) = -|x - mean of the shots of c|^2``.

    Rows are drawn without replacement, by a generator of ``seed`` plus the fold's number.
    """
    import torch
    from torch.nn.functional import normalize

    train, numbers = fold.train[0].float(), fold.train[1].cpu().numpy()
    of_class = [np.flatnonzero(numbers == number) for number in range(fold.classes)]
    if (least := min(map(len, of_class))) < shots:
        raise ValueError(f"{shots} shots per class cannot be drawn: a class has {least} training tiles.")
    centre = train.mean(0)
    train, test = normalize(train - centre), normalize(fold.test.float() - centre)
    rng = np.random.default_rng(seed + fold.number)
    scores = []
    for _ in range(draws):
        drawn = np.stack([rng.choice(rows, shots, replace=False) for rows in of_class])
        centroids = train[torch.from_numpy(drawn).to(train.device)].mean(1)
        scores.append(2 * test @ centroids.T - centroids.square().sum(1) - 1)
    return torch.stack(scores)
