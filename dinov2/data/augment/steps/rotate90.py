"""Views turned by multiples of 90 degrees: histology has no up."""

from dataclasses import dataclass

import cv2
import numpy as np

from dinov2.configs.fields import key
from dinov2.data.augment.step import AugmentationStep, View

_TURNS = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


class Rotate90(AugmentationStep):
    """Turn a view by 90, 180 or 270 degrees, each as often; pixels move and are not interpolated.

    The published recipe does not. With the defaults and left-right mirrors at 0.5 all eight orientations are alike.
    """

    before = "hed"
    is_geometric = True

    @dataclass(frozen=True)
    class Options:
        """How often."""

        prob: float = key(0.75, "probability of a turn; 0.75: all four directions as often", least=0, most=1)

    def draw(self, rng: np.random.Generator, view: View) -> int | None:
        """Draw 1, 2 or 3 quarter turns counterclockwise."""
        applied, turns = rng.random(2).tolist()
        return 1 + int(3 * turns) if applied < self.options.prob else None

    def apply(self, image: np.ndarray, params: int) -> np.ndarray:
        """Turn an image, which is square."""
        return cv2.rotate(image, _TURNS[params - 1])
