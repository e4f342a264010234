"""Views without colours."""

from typing import Any

import cv2
import numpy as np

from dinov2.data.augment.step import AugmentationStep, View


class Grayscale(AugmentationStep):
    """Drop the colours of a view; what follows works on one channel, in a third of the time."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.per_tile = options.jitter_per_tile

    def draw(self, rng: np.random.Generator, view: View) -> bool | None:
        """Draw whether the colours are dropped."""
        return rng.random() < self.options.grayscale_prob or None

    def apply(self, image: np.ndarray, params: bool) -> np.ndarray:
        """Return luma (ITU-R 601), (H, W)."""
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
