"""Solarisation, of DINOv2's augmentation for natural images (Grill et al., arXiv:2006.07733, appendix B)."""

from dataclasses import dataclass

import cv2
import numpy as np

from dinov2.configs.fields import key
from dinov2.data.augment.step import AugmentationStep, View

_LEVELS = np.arange(256, dtype=np.uint8)


class Solarize(AugmentationStep):
    """Invert the levels from a threshold on, with a probability per kind of view."""

    takes_grey = True

    @dataclass(frozen=True)
    class Options:
        """How often, and which levels."""

        prob_global1: float = key(0.0, "probability in the first global view", least=0, most=1)
        prob_global2: float = key(0.2, "probability in the second global view", least=0, most=1)
        prob_local: float = key(0.0, "probability in each local view", least=0, most=1)
        threshold: int = key(128, "least level that is inverted", least=0, most=256)

    def draw(self, rng: np.random.Generator, view: View) -> bool | None:
        """Draw whether it is applied."""
        return rng.random() < getattr(self.options, f"prob_{view.kind}") or None

    def apply(self, image: np.ndarray, params: bool) -> np.ndarray:
        """Invert the levels of an image."""
        return cv2.LUT(image, np.where(self.options.threshold > _LEVELS, _LEVELS, 255 - _LEVELS))
