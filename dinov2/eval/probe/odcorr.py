"""How alike the embeddings of different tiles are: ODCorr."""

from __future__ import annotations

import numpy as np


def odcorr(embeddings: np.ndarray) -> float:
    """Off-diagonal correlation of (N, D) embeddings, N >= 2: 0 uncorrelated tiles, 1 collapsed.

    ::

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
