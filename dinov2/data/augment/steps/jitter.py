"""Brightness, contrast, saturation and hue, as Pillow and torchvision define them.

Results differ from theirs by rounding; hue by several levels, as 8-bit HSV does between any two libraries.
"""

from typing import Any

import cv2
import numpy as np

from dinov2.data.augment.step import AugmentationStep, View

# Pillow truncates where OpenCV rounds. Just under a half, since OpenCV rounds exact halves to the even level.
_TRUNCATE = -0.499


class Jitter(AugmentationStep):
    """The four colour adjustments in random order; those of strength 0 are left out."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.per_tile = options.jitter_per_tile
        self._ranges: list[tuple[str, float, float]] = []  # name, lowest amount, width of the range
        for name in ("brightness", "contrast", "saturation"):
            strength = getattr(options, name)
            low = max(0.0, 1 - strength)
            self._ranges.append((name, low, 1 + strength - low))
        self._ranges.append(("hue", -options.hue, 2 * options.hue))

    def draw(self, rng: np.random.Generator, view: View) -> list[tuple[str, float]] | None:
        """Draw (name, amount) of the adjustments in order of application."""
        if rng.random() >= self.options.jitter_prob:
            return None
        draws = rng.random(8).tolist()
        drawn = sorted(zip(draws[4:], draws, self._ranges, strict=False), key=lambda item: item[0])
        return [(name, low + width * draw) for _, draw, (name, low, width) in drawn if width]

    def apply(self, image: np.ndarray, params: list[tuple[str, float]]) -> np.ndarray:
        """Adjust the colours of an image."""
        for name, amount in params:
            image = ADJUSTMENTS[name](image, amount)
        return image


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image``."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATE)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * m``, m the mean grey level of the whole image."""
    mean = round(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + _TRUNCATE)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * grey``."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, _TRUNCATE)


def adjust_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue by ``turn`` of the full circle, in [-0.5, 0.5]."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    # One row of (shift, 0, 0, ...) added to whole rows: three times as fast as to every third byte.
    shift = np.zeros((image.shape[1], 3), np.uint8)
    shift[:, 0] = int(turn * 255) % 256
    rows = hsv.reshape(len(hsv), -1)
    rows += shift.reshape(-1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


ADJUSTMENTS = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}
