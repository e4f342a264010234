"""Stain augmentation in haematoxylin-eosin-DAB (HED) space, on 8-bit images.

Definition of scikit-image >= 0.19 (Ruifrok and Johnston, 2001), with rgb in [0, 1] and eps = 1e-6:

    hed = max(0, ln(max(rgb, eps)) / ln(eps) @ HED_FROM_RGB)
    rgb = clip(exp(ln(eps) * hed @ RGB_FROM_HED), 0, 1)

One HED unit is therefore -ln(eps) = 13.8 nepers: tissue lies near 0.02-0.11, and a shift of 0.05 is strong.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from dinov2.data.augment.step import AugmentationStep, View

RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)

_LOG_EPS = np.log(1e-6)
_LOG_255 = np.log(255.0)
_UNMIXING = HED_FROM_RGB.T
_MIXING = _LOG_EPS * RGB_FROM_HED.T
_DENSITY = (np.log(np.maximum(np.arange(256) / 255, 1e-6)) / _LOG_EPS).astype(np.float32)


class Hed(AugmentationStep):
    """Scale and shift the amount of each stain, view by view or in all views of a tile alike."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.per_tile = options.hed_per_tile

    def draw(self, rng: np.random.Generator, view: View) -> tuple[list[float], list[float]] | None:
        """Draw scale and shift, each per stain; a scale is never below 0."""
        if rng.random() >= self.options.hed_prob:
            return None
        draws = rng.random(6).tolist()
        scale, shift = self.options.hed_scale, self.options.hed_shift
        low = max(0.0, 1 - scale)
        return [low + (1 + scale - low) * u for u in draws[:3]], [shift * (2 * u - 1) for u in draws[3:]]

    def apply(self, image: np.ndarray, params: tuple[Sequence[float], Sequence[float]]) -> np.ndarray:
        """Change the stains of an image."""
        return perturb_stains(image, *params, clip=self.options.hed_clip)


def perturb_stains(image: np.ndarray, scale: Sequence[float], shift: Sequence[float], clip: bool = True) -> np.ndarray:
    """Change each stain's amount: ``hed' = scale * hed + shift`` (Tellez et al., arXiv:1808.05896), to 8 bits rounded.

    Args:
        image: uint8 (H, W, 3) RGB, as the result.
        scale: factor per stain (H, E, D), 0 or more; 1 leaves it.
        shift: amount added per stain, in scikit-image's HED units; 0 leaves it.
        clip: whether ``hed'`` is clipped to [0, 1]; else images wash out where a stain is taken that is not there.
    """
    scale, shift = np.array(scale, float), np.array(shift, float)
    unmix, mix = np.empty((3, 4)), np.empty((3, 4))
    # OpenCV's thresholds are one number for all channels. So where amounts are clipped, the shift is added in two
    # parts, and amounts are measured in units of the range that its positive part leaves: for scale >= 0,
    #   clip(scale * max(0, hed) + shift, 0, 1) = up + room * clip((scale * hed + down) / room, 0, 1)
    #   with up = clip(shift, 0, 1), down = min(shift, 0) and room = 1 - up.
    if clip:
        up, down = np.minimum(np.maximum(shift, 0), 1), np.minimum(shift, 0)
        room = np.maximum(1 - up, 1e-9)
        unmix[:, :3] = _UNMIXING * (scale / room)[:, None]
        unmix[:, 3] = down / room
    else:
        up, room = shift, scale
        unmix[:, :3], unmix[:, 3] = _UNMIXING, 0
    mix[:, :3] = _MIXING * room
    mix[:, 3] = _MIXING @ up + _LOG_255
    density = cv2.LUT(image, _DENSITY)
    stains = cv2.transform(density, unmix)
    cv2.threshold(stains, 0, 0, cv2.THRESH_TOZERO, stains)
    if clip:
        cv2.threshold(stains, 1, 0, cv2.THRESH_TRUNC, stains)
    log_rgb = cv2.transform(stains, mix, density)  # into memory that lies in cache
    if not clip:  # negative amounts are brighter than white
        cv2.threshold(log_rgb, _LOG_255, 0, cv2.THRESH_TRUNC, log_rgb)
    return cv2.convertScaleAbs(cv2.exp(log_rgb, log_rgb))
