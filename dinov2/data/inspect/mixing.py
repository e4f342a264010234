"""How well an order mixes: distinct slides among the samples of some steps, beside uniform sampling."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from dinov2.data.stream.order import SampleOrder


def distinct_in_stream(
    order: SampleOrder,
    slides_at: Callable[[np.ndarray, np.ndarray], np.ndarray],
    batch: int,
    windows: Sequence[int],
) -> list[float]:
    """Count distinct slides among the samples of consecutive steps, from the first step of the first epoch.

    Args:
        order: that training would use.
        slides_at: gives the slide numbers, int (n,), of units (n,) and rows (n,).
        batch: samples of a step.
        windows: numbers of steps; the largest must be a multiple of each.

    Returns:
        For each window its mean over the windows that fit into the largest, side by side.
    """
    steps = []
    for step in range(max(windows)):
        places = order.locate(np.arange(step * batch, (step + 1) * batch))
        steps.append(slides_at(places.unit, places.row))
    slides = np.stack(steps)
    return [
        float(np.mean([len(np.unique(part)) for part in slides.reshape(len(slides) // window, -1)]))
        for window in windows
    ]


def distinct_if_uniform(slide_rows: np.ndarray, samples: int) -> float:
    """Expected distinct slides among rows drawn uniformly without replacement.

    A slide of s of the N rows is missed by n draws with probability C(N-s, n) / C(N, n).

    Args:
        slide_rows: rows of each slide, int (S,).
        samples: n; more than there are rows counts as all of them.
    """
    total = int(slide_rows.sum())
    draws = min(samples, total)
    sizes, counts = np.unique(slide_rows[slide_rows > 0], return_counts=True)
    missed = [math.exp(_ways(total - size, draws) - _ways(total, draws)) for size in sizes.tolist()]
    return float(counts @ (1 - np.array(missed)))


def _ways(rows: int, draws: int) -> float:
    """Logarithm of the ways to draw, order counting."""
    return math.lgamma(rows + 1) - math.lgamma(rows - draws + 1) if rows >= draws else -math.inf
