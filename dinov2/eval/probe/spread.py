"""Spread of embeddings, which needs no labels: RankMe, ODCorr, the mean cosine, and how sites show in it."""

from collections.abc import Sequence

import numpy as np

from dinov2.data.source import Origin
from dinov2.eval.probe.results import Result
from dinov2.eval.probe.task import Probe, TaskFeatures


class RankMe(Probe):
    """`rankme` of up to 2,048 test tiles."""

    needs_labels = False

    def measure(self, task: TaskFeatures) -> list[Result]:
        """Measure the sample."""
        return [Result(task.name, "rankme", "value", rankme(task.sample), count=len(task.sample))]


class ODCorr(Probe):
    """`odcorr` of up to 2,048 test tiles."""

    needs_labels = False

    def measure(self, task: TaskFeatures) -> list[Result]:
        """Measure the sample."""
        return [Result(task.name, "odcorr", "value", odcorr(task.sample), count=len(task.sample))]


def rankme(embeddings: np.ndarray) -> float:
    """Effective rank of embeddings (N, D), not all zero: between 1 (collapsed) and min(N, D).

        RankMe = exp(-sum_k p_k ln p_k),  p_k = sigma_k / sum_l sigma_l

    with the singular values sigma of the matrix, not centred (Garrido et al. 2023, arXiv:2210.02885,
    who add a small constant to p where this takes 0 ln 0 = 0). Values of different N or D do not compare.
    """
    sigma = np.linalg.svd(np.asarray(embeddings, np.float64), compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def mean_cosine(embeddings: np.ndarray) -> float:
    """Mean cosine between two different rows of (N, D), N >= 2: 1 collapsed, about 0 spread out.

    (|sum_i z_i|^2 - N) / (N (N - 1)),  z_i = row i / |row i|
    """
    z = np.asarray(embeddings, np.float64)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    n = len(z)
    return float((np.square(z.sum(0)).sum() - n) / (n * (n - 1)))


def site_leakage(embeddings: np.ndarray, origins: Sequence[Origin], neighbours: int = 10) -> tuple[float, float]:
    """How often near embeddings (N, D) are of one site, and how often any two are: 0 to 1, of tiles of other slides.

    The first is the mean, over tiles, of the fraction of the nearest ones by cosine that are of the tile's site; the
    second that of all. Tiles without a site, or with no tile of another slide, do not count. ValueError if fewer than
    two sites are left.
    """
    sites, slides = (np.array([getattr(origin, name) for origin in origins]) for name in ("site", "slide"))
    known = sites != ""
    if len(set(sites[known])) < 2:
        raise ValueError("The tiles name fewer than two sites, as a column site of shards does.")
    z, sites, slides = np.asarray(embeddings, np.float64)[known], sites[known], slides[known]
    z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    cosines, found, chance = z @ z.T, [], []
    for tile, slide in enumerate(slides):
        others = np.flatnonzero(slides != slide)
        if len(others):
            nearest = others[np.argsort(-cosines[tile, others], kind="stable")[:neighbours]]
            found.append((sites[nearest] == sites[tile]).mean())
            chance.append((sites[others] == sites[tile]).mean())
    return float(np.mean(found)), float(np.mean(chance))


def odcorr(embeddings: np.ndarray) -> float:
    """Off-diagonal correlation of (N, D) embeddings, N >= 2: 0 uncorrelated tiles, 1 collapsed.

        ODCorr = sqrt(sum_{i != j} rho(z_i, z_j)^2 / (N (N - 1)))

    with Pearson's rho over the D entries of two rows (kaiko, arXiv:2404.15217). NaN if a row is constant.
    """
    rows = np.asarray(embeddings, np.float64)
    count = len(rows)
    if count < 2:
        raise ValueError(f"ODCorr compares tiles with each other: {count} is given, 2 are needed.")
    rows = rows - rows.mean(1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        return float("nan")
    rows = rows / norms
    gram = rows.T @ rows if rows.shape[1] < count else rows @ rows.T  # of equal Frobenius norm
    total = np.square(gram).sum() - count
    return float(np.sqrt(max(total, 0.0) / (count * (count - 1))))
