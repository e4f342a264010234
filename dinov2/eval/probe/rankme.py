"""How far embeddings have spread out: RankMe and the mean cosine."""

from __future__ import annotations

import numpy as np


def rankme(embeddings: np.ndarray) -> float:
    """Effective rank of embeddings, between 1 (collapsed) and min(N, D).

    ::

        RankMe = exp(-sum_k p_k ln p_k),  p_k = sigma_k / sum_l sigma_l

    with the singular values sigma of the (N, D) matrix, not centred (Garrido et al. 2023, arXiv:2210.02885,
    who add a small constant to p where this takes 0 ln 0 = 0). Values of different N or D do not compare.

    Args:
        embeddings: (N, D), N >= 1, not all zero.
    """
    sigma = np.linalg.svd(np.asarray(embeddings, np.float64), compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def mean_cosine(embeddings: np.ndarray) -> float:
    """Mean cosine between two different rows of (N, D), N >= 2: 1 collapsed, about 0 spread out.

    ::

        (|sum_i z_i|^2 - N) / (N (N - 1)),  z_i = row i / |row i|
    """
    z = np.asarray(embeddings, np.float64)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    n = len(z)
    return float((np.square(z.sum(0)).sum() - n) / (n * (n - 1)))
