"""How near an image operation comes to the one that defines it."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image


def assert_close(
    tiles: Sequence[np.ndarray],
    fast: Callable[[np.ndarray], np.ndarray],
    slow: Callable[[Image.Image], np.ndarray | Image.Image],
    largest: float,
    mean: float,
) -> None:
    """Both uint8 of one shape, and apart by at most so many grey levels of 255, at most and in the mean."""
    pairs = [(fast(tile), np.asarray(slow(Image.fromarray(tile)))) for tile in tiles]
    assert all(a.dtype == np.uint8 and a.shape == b.shape for a, b in pairs)
    differences = np.stack([np.abs(a.astype(int) - b) for a, b in pairs])
    assert differences.max() <= largest
    assert differences.mean() <= mean
