"""RandStainNA: views take on colour statistics of stains that do not exist (Shen et al., arXiv:2206.12694)."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from dinov2.configs.fields import key
from dinov2.data.augment.step import AugmentationStep, View

_LAB = tuple[float, float, float]  # lightness, 0 to 100, and the two colour axes of CIELAB
_FLAT = 1e-3  # least deviation of a channel: below it there is nothing to stretch


class RandStain(AugmentationStep):
    """Reinhard's normalisation towards a mean and deviation of each CIELAB channel that are drawn, not given.

    With m, s those of the view and m', s' drawn from normals over the means and deviations that slides have,
    ``x' = (x - m) / s * s' + m'``. Statistics by default: of 2,150 tiles of LC25000 (arXiv:1912.12142).
    """

    before = "jitter"

    @dataclass(frozen=True)
    class Options:
        """How often, and the statistics of means and deviations over the data's tiles."""

        prob: float = key(0.5, "probability", least=0, most=1)
        strength: float = key(1.0, "factor of the two spreads below", least=0, most=10)
        mean: _LAB = key((67.1, 27.7, -32.1), "of tiles' means of L, a and b", least=-128, most=128)
        mean_spread: _LAB = key((9.0, 8.5, 16.9), "their standard deviations over the tiles", least=0, most=128)
        deviation: _LAB = key((13.9, 12.4, 13.0), "mean of tiles' standard deviations", least=0, most=128)
        deviation_spread: _LAB = key((2.5, 3.8, 2.8), "their standard deviations over the tiles", least=0, most=128)
        per_tile: bool = key(False, "true: all views of a tile alike; false: each by itself")

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.per_tile = options.per_tile

    def draw(self, rng: np.random.Generator, view: View) -> tuple[list[float], list[float]] | None:
        """Draw means and deviations, three each; a deviation is never below 0."""
        o = self.options
        if rng.random() >= o.prob:
            return None
        normals = o.strength * rng.standard_normal((2, 3))
        means = np.array(o.mean) + normals[0] * o.mean_spread
        deviations = np.maximum(0, np.array(o.deviation) + normals[1] * o.deviation_spread)
        return means.tolist(), deviations.tolist()

    def apply(self, image: np.ndarray, params: tuple[list[float], list[float]]) -> np.ndarray:
        """Return a new image of the statistics drawn, but for colours that there are not."""
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        mean, deviation = (moment.ravel() for moment in cv2.meanStdDev(lab))
        factor = np.array(params[1]) / np.maximum(deviation, _FLAT)
        moved = (lab - mean) * factor + params[0]
        rgb = cv2.cvtColor(moved.astype(np.float32), cv2.COLOR_LAB2RGB)
        return np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
