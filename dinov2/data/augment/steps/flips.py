"""Mirrored views."""

import cv2
import numpy as np

from dinov2.data.augment.step import AugmentationStep, View


class Flips(AugmentationStep):
    """Mirror a view left-right, top-bottom or both."""

    is_geometric = True

    def draw(self, rng: np.random.Generator, view: View) -> tuple[bool, bool] | None:
        """Draw (left-right, top-bottom)."""
        first, second = rng.random(2).tolist()
        flips = first < self.options.horizontal_flip_prob, second < self.options.vertical_flip_prob
        return flips if any(flips) else None

    def apply(self, image: np.ndarray, params: tuple[bool, bool]) -> np.ndarray:
        """Mirror an image."""
        left_right, top_bottom = params
        return cv2.flip(image, -1 if left_right and top_bottom else int(left_right))
