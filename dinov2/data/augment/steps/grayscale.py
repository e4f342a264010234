"""Views without colours."""

import cv2
import numpy as np

from dinov2.data.augment.step import AugmentationStep, View


class Grayscale(AugmentationStep):
    """Drop the colours of a view; what follows works on one channel, in a third of the time."""

    def draw(self, rng: np.random.Generator, view: View) -> bool | None:
        """Draw whether the colours are dropped."""
        return rng.random() < self.options.grayscale_prob or None

    def apply(self, image: np.ndarray, params: bool) -> np.ndarray:
        """Return luma (ITU-R 601), (H, W)."""
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
