"""Gaussian blur."""

import math

import cv2
import numpy as np

from dinov2.data.augment.step import AugmentationStep, View


class Blur(AugmentationStep):
    """Blur a view, with a probability per kind of view."""

    takes_grey = True

    def draw(self, rng: np.random.Generator, view: View) -> float | None:
        """Draw sigma in pixels of the view."""
        applied, strength = rng.random(2).tolist()
        if applied >= getattr(self.options, f"blur_prob_{view.kind}"):
            return None
        low, high = self.options.blur_sigma_min_max
        return low + (high - low) * strength

    def apply(self, image: np.ndarray, params: float) -> np.ndarray:
        """Blur an image; borders are reflected without repeating the edge."""
        # cv2.GaussianBlur on 8 bits works in fixed point: twice as slow here and less exact. What lies beyond
        # four sigma is 0.02 levels.
        width = min(self.options.blur_kernel_size, 2 * math.ceil(4 * params) + 1)
        kernel = cv2.getGaussianKernel(width, params)
        return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
